"""R20: the place that images come from fails in every way. The click is told which task and why, without secrets, in
time; nothing bad is remembered, so the same click is answered once the place is well again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest
from doors import ImageServer, label_studio_body, mask_in, pictures, send
from flask.testing import FlaskClient

from backends.common.images import Fetcher
from backends.common.settings import Settings
from backends.label_studio.app import create_app
from backends.label_studio.service import Backend
from inter2former.segmenter import Segmenter

LIMIT_S = 4.0  # shorter than the pause that a busy place asks for
SHORT_S = 0.5  # for what takes all of it
SECRET = "token-canary"
(PICTURE,) = pictures(1)
Play = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, **headers: str) -> Play:
    return lambda handler: send(handler, code, b"body-canary", **headers)


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(2 * SHORT_S)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    for _ in range(10):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(SHORT_S / 4)


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(PICTURE.png)))
    handler.end_headers()
    handler.wfile.write(PICTURE.png[:-10])


def close(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def garbage(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\xff" * 200)


def login_page(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b"<html>Please log in. body-canary</html>", Content_Type="text/html; charset=utf-8")


def body(data: bytes, **headers: str) -> Play:
    return lambda handler: send(handler, 200, data, **headers)


def to(place: str) -> Play:
    return lambda handler: send(handler, 302, b"", Location=place)


FAULTS: list[tuple[str, Play, int, str]] = [
    ("hangs", hang, 504, "did not answer within"),
    ("drips", drip, 504, "did not answer within"),
    ("is cut", cut, 502, "broke off"),
    ("closes", close, 502, "broke off"),
    ("is no HTTP", garbage, 502, "broke off"),
    ("shows a login page", login_page, 502, "login page"),
    ("sends text", body(b"body-canary"), 502, "image"),
    ("sends nothing", body(b""), 502, "image"),
    ("sends half an image", body(PICTURE.png[: len(PICTURE.png) // 2]), 502, "image"),
    ("lies about its encoding", body(PICTURE.png, Content_Encoding="gzip"), 502, "compressed"),
    ("redirects in a circle", to(PICTURE.path), 502, "redirects"),
    ("redirects to a file", to("file:///etc/passwd"), 400, "not fetched"),
    ("redirects to a private address", to("http://10.0.0.1/"), 400, "private"),
    ("redirects to HTTPS that is none", to("https://127.0.0.1:1/"), 400, "private"),
    *((f"answers {code}", status(code), 502, f"HTTP {code}") for code in (401, 403, 404, 410, 500, 502, 504)),
    *((f"answers {code}", status(code, Retry_After="60"), 502, f"HTTP {code}") for code in (429, 503)),
]


@pytest.fixture
def door(segmenter: Segmenter) -> Iterator[tuple[ImageServer, FlaskClient, Fetcher]]:
    """The Label Studio backend, its client and what it fetches images with."""
    with ImageServer([PICTURE]) as images:
        settings = Settings(label_studio_url=images.url, label_studio_api_key=SECRET)
        fetcher = Fetcher(max_bytes=2**20, timeout_s=LIMIT_S)
        backend = Backend(segmenter, settings, fetcher=fetcher)
        yield images, create_app(settings, segmenter, backend=backend).test_client(), fetcher
        backend.close()


@pytest.mark.parametrize(("play", "code", "cause"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_r20_a_source_that(
    door: tuple[ImageServer, FlaskClient, Fetcher],
    segmenter: Segmenter,
    caplog: pytest.LogCaptureFixture,
    play: Play,
    code: int,
    cause: str,
) -> None:
    images, client, fetcher = door
    clicks = PICTURE.clicks(3, 0)

    def click() -> Any:
        address = f"{PICTURE.path}?signature=query-canary"
        return client.post("/predict", data=label_studio_body(PICTURE, clicks, address=address))

    images.faults[PICTURE.path] = play
    fetcher.timeout_s = SHORT_S if play in (hang, drip) else LIMIT_S
    told = click()
    assert told.status_code == code
    assert cause in told.json["detail"]
    assert "Task 7" in told.json["detail"]
    for text in (told.text, caplog.text):
        assert "canary" not in text
    del images.faults[PICTURE.path]
    fetcher.timeout_s = LIMIT_S
    assert np.array_equal(
        mask_in("label_studio", click().json, PICTURE), segmenter.segment(PICTURE.pixels, clicks).mask
    )


def test_r20_a_source_that_was_busy_for_a_moment_is_asked_again(door: tuple[ImageServer, FlaskClient, Fetcher]) -> None:
    images, client, _ = door
    answers = iter([429, 503])

    def busy(handler: BaseHTTPRequestHandler) -> None:
        code = next(answers, 200)
        send(handler, code, PICTURE.png if code == 200 else b"", Retry_After="0")

    images.faults[PICTURE.path] = busy
    told = client.post("/predict", data=label_studio_body(PICTURE, PICTURE.clicks(1, 0)))
    assert told.status_code == 200
    assert len(images.asked) == 3
