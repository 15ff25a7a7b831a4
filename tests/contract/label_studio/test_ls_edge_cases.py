"""The edge cases E1..E22 of Label Studio's protocol, each by its number, through the HTTP door and the tiny model."""

from __future__ import annotations

import base64
import copy
import io
import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flask
import numpy as np
import pytest
from flask.testing import FlaskClient
from ls_calls import CONFIG, answer, body, busy, click, one_mask, rectangle, until
from ls_platform import LEGACY, PAT, Platform, at, decode_rle, mask_of, photo, recorded, request_of
from PIL import Image

from backends.common.http import BusyError
from backends.common.server import Admission
from backends.label_studio import contract
from backends.label_studio.app import create_app
from backends.label_studio.images import FETCHES
from backends.label_studio.service import PLACES, THREADS, Backend
from inter2former import brush_rle
from inter2former.segmenter import Segmenter


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    out = io.BytesIO()
    image.save(out, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def test_e1_first_click(client: FlaskClient) -> None:
    (region,) = answer(client, request_of("06"))
    mask = mask_of(region)
    assert mask.shape == (300, 451)
    assert region["value"]["brushlabels"] == ["Cat"]
    assert at(mask, 35.01646542261251, 39.93377241126967)


def test_e2_negative_click(client: FlaskClient) -> None:
    mask = one_mask(client, body(click(50, 50), click(53, 50, False), click(70, 60)))
    assert [at(mask, 50, 50), at(mask, 53, 50), at(mask, 70, 60)] == [True, False, True]


def test_e3_later_clicks_encode_and_fetch_nothing(
    client: FlaskClient, segmenter: Segmenter, platform: Platform
) -> None:
    for count in range(1, 4):
        answer(client, body(*[click(10 * i, 50) for i in range(1, count + 1)]))
    other_task = body(click(10, 50))
    other_task["tasks"][0]["id"] = 8
    answer(client, other_task)
    assert segmenter.encodes == 1
    assert platform.paths == ["/data/upload/1/a-chelsea.jpg"]


def test_e4_polarity_after_a_reload_comes_from_the_draft(client: FlaskClient) -> None:
    reloaded = request_of("11")
    plain = copy.deepcopy(reloaded)
    plain["tasks"][0]["drafts"] = []
    for entry in plain["params"]["context"]["result"]:
        entry["is_positive"] = entry["id"] != "ZIHAbOOLrL"
        entry["id"] += "x"
    assert np.array_equal(one_mask(client, reloaded), one_mask(client, plain))
    negative = next(e for e in reloaded["params"]["context"]["result"] if e["id"] == "ZIHAbOOLrL")
    assert not at(one_mask(client, reloaded), negative["value"]["x"], negative["value"]["y"])


def test_e4_missing_polarity_is_never_negative(client: FlaskClient) -> None:
    mask = one_mask(client, body(click(50, 50, None), click(20, 20, None)))
    assert at(mask, 50, 50)
    assert at(mask, 20, 20)


def test_e5_polarity_after_the_second_reload_is_remembered(
    client: FlaskClient, make_app: Callable[..., flask.Flask]
) -> None:
    call = recorded("12")
    last = call["backend_request"]["body"]
    negative = next(e for e in last["params"]["context"]["result"] if e["id"] == "SIdRutpmgI")["value"]
    for earlier in call["sequence"]:
        client.post("/predict", json=earlier["body"])
    assert not at(one_mask(client, last), negative["x"], negative["y"])
    fresh = make_app().test_client()
    assert at(one_mask(fresh, last), negative["x"], negative["y"])
    other_task = copy.deepcopy(last)
    other_task["tasks"][0]["id"] = 99
    assert at(one_mask(client, other_task), negative["x"], negative["y"])


def test_e6_only_negatives(client: FlaskClient, platform: Platform, segmenter: Segmenter) -> None:
    assert answer(client, body(click(50, 50, False), click(10, 10, False))) == []
    assert platform.requests == []
    assert segmenter.encodes == 0


@pytest.mark.parametrize(
    "params", [None, {}, {"context": None}, {"context": {}}, {"context": {"result": []}}, {"context": {"result": None}}]
)
def test_e7_no_context(client: FlaskClient, params: Any) -> None:
    request = body()
    request["params"] = params
    assert answer(client, request) == []
    del request["params"]
    assert answer(client, request) == []


def test_e8_batch_is_answered_without_looking_at_images(client: FlaskClient, platform: Platform) -> None:
    request = request_of("04")
    for task in request["tasks"]:
        task["data"]["image"] = "http://unreachable.invalid/x.jpg"
    results = client.post("/predict", json=request).json["results"]
    assert [result["result"] for result in results] == [[]] * len(request["tasks"])
    assert platform.requests == []


def test_e9_rectangles_in_any_direction(client: FlaskClient) -> None:
    drawn = one_mask(client, body(rectangle(20, 20, 40, 50)))
    assert np.array_equal(drawn, one_mask(client, body(rectangle(60, 70, -40, -50))))
    assert np.array_equal(drawn, one_mask(client, body(rectangle(20, 70, 40, -50))))
    assert np.array_equal(drawn, one_mask(client, body(rectangle(20, 20, 40, 50, 360))))
    assert answer(client, body(rectangle(20, 20, 0, 50))) == []
    assert answer(client, body(rectangle(20, 20, 40, 0))) == []
    assert answer(client, body(rectangle(130, 20, 40, 50))) == []


def test_e10_several_rectangles(client: FlaskClient) -> None:
    a, b = rectangle(10, 10, 30, 30), rectangle(60, 50, 30, 40)
    both = answer(client, body(a, b, {**a, "id": "again"}))
    assert len(both) == 2
    assert {region["value"]["brushlabels"][0] for region in both} == {"Cat"}
    for region, alone in zip(both, (a, b), strict=True):
        assert np.array_equal(mask_of(region), one_mask(client, body(alone)))


def test_e11_shorter_and_reordered_contexts_are_fresh(
    client: FlaskClient, make_app: Callable[..., flask.Flask]
) -> None:
    a, b, c = click(30, 40), click(60, 60, False), click(70, 30)
    for context in ([a], [a, b], [a, b, c], [a, c], [c, a], [a]):
        fresh = make_app().test_client()
        assert np.array_equal(one_mask(client, body(*context)), one_mask(fresh, body(*context)))


def test_e12_labels_and_annotators_do_not_mix(client: FlaskClient, segmenter: Segmenter) -> None:
    cup = {"x": 70, "y": 60, "keypointlabels": ["Cup"], "labels": ["Cup"]}
    alone = one_mask(client, body(click(70, 60, value=cup)))
    one_mask(client, body(click(30, 40), click(32, 40, False)))
    (region,) = answer(client, body(click(30, 40), click(70, 60, value=cup)))  # a page never sends both
    assert region["value"]["brushlabels"] == ["Cup"]
    assert np.array_equal(mask_of(region), alone)
    assert segmenter.encodes == 1


TWO_IMAGES = """<View><Image name="left" value="$a"/><Image name="right" value="$inner.b"/>
<BrushLabels name="brush_left" toName="left"><Label value="Cat"/></BrushLabels>
<BrushLabels name="brush_right" toName="right"><Label value="Cat"/></BrushLabels>
<KeyPointLabels name="kp" toName="left"><Label value="Cat"/></KeyPointLabels></View>"""


def test_e13_several_image_tags(client: FlaskClient, platform: Platform) -> None:
    images = {"a": "/data/upload/1/a-coffee.jpg", "inner": {"b": "/data/upload/1/b-chelsea.jpg"}}
    request = body(click(5, 5, to_name="left"), click(50, 50, to_name="right"), config=TWO_IMAGES, image=images)
    (region,) = answer(client, request)
    assert (region["from_name"], region["to_name"]) == ("brush_right", "right")
    assert platform.paths == ["/data/upload/1/b-chelsea.jpg"]


PAGES = CONFIG.replace('value="$image"', 'valueList="$pages"')


def test_e14_value_list(client: FlaskClient, platform: Platform) -> None:
    images = {"pages": ["/data/upload/1/a-coffee.jpg", "/data/upload/1/b-chelsea.jpg"]}
    first, second = click(5, 5, item_index=0), click(50, 50, item_index=1)
    (region,) = answer(client, body(first, second, config=PAGES, image=images))
    assert region["item_index"] == 1
    assert platform.paths == ["/data/upload/1/b-chelsea.jpg"]
    alone = one_mask(client, body(second, config=PAGES, image=images))
    assert np.array_equal(mask_of(region), alone)
    negative = click(50, 50, False, item_index=1)
    assert answer(client, body(first, negative, config=PAGES, image=images)) == []
    gone = client.post("/predict", json=body(click(5, 5, item_index=5), config=PAGES, image=images))
    assert gone.status_code == 400


def test_e15_exif_orientation(client: FlaskClient) -> None:
    upright = {"original_width": 300, "original_height": 451}
    (region,) = answer(client, body(click(40, 30, **upright), image="/data/upload/1/x-chelsea_exif6.jpg"))
    assert (region["original_width"], region["original_height"]) == (300, 451)
    assert at(mask_of(region), 40, 30)


def test_e15_another_size_than_the_image(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (region,) = answer(client, body(click(40, 30, original_width=902, original_height=600)))
    assert "902 x 600" in caplog.text
    mask = mask_of(region)
    assert mask.shape == (600, 902)
    assert at(mask, 40, 30)
    huge = client.post("/predict", json=body(click(40, 30, original_width=10_000, original_height=9_000)))
    assert huge.status_code == 400
    assert "10000 x 9000" in huge.json["detail"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_r5_every_orientation_gives_the_mask_of_the_upright_image(client: FlaskClient, orientation: int) -> None:
    upright = Image.open(io.BytesIO(photo("chelsea.jpg"))).crop((100, 50, 231, 127))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright.copy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    stored.save(out, "PNG", exif=exif)
    size = {"original_width": 131, "original_height": 77}
    clicks = click(30, 70, **size), click(80, 20, False, **size)
    turned = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    mask = one_mask(client, body(*clicks, image=turned))
    assert mask.shape == (77, 131)
    assert np.array_equal(mask, one_mask(client, body(*clicks, image=data_url(upright))))


def test_e16_double_entries_count_once(client: FlaskClient) -> None:
    regions = answer(client, request_of("18"))
    assert len(regions) == 2
    assert not np.array_equal(mask_of(regions[0]), mask_of(regions[1]))


LABELS = """<View><Image name="image" value="$image"/><Labels name="lab" toName="image"><Label value="Cat"/></Labels>
<KeyPoint name="kp" toName="image" smart="true"/><Brush name="brush" toName="image"/></View>"""


def test_e16_labels_with_plain_key_points(client: FlaskClient) -> None:
    drawn = click(50, 50, type="keypoint", value={"x": 50, "y": 50, "width": 0.2})
    label = click(50, 50, None, type="labels", from_name="lab", value={"x": 50, "y": 50, "labels": ["Cat"]})
    (region,) = answer(client, body(drawn, label, config=LABELS))
    assert (region["type"], region["from_name"], region["value"]["labels"]) == ("brush", "brush", ["Cat"])
    assert np.array_equal(mask_of(region), one_mask(client, body(click(50, 50))))


@pytest.mark.parametrize(
    "config",
    [
        "",
        "<View",
        "<View/>",
        '<!DOCTYPE x [<!ENTITY a "b">]><View>&a;</View>',
        "x" * 300_000,
        "\ud800",
        '<View><Image name="image" value="$image"/><KeyPointLabels name="kp" toName="image"/></View>',
    ],
)
def test_e17_configs_without_a_place_for_masks(client: FlaskClient, config: str) -> None:
    assert client.post("/setup", json={"project": "1.2", "schema": config}).json["model_version"]
    assert answer(client, body(click(50, 50), config=config)) == []


def test_e17_a_changed_config_counts_at_once(client: FlaskClient) -> None:
    answer(client, body(click(50, 50)))
    (region,) = answer(client, body(click(50, 50), config=CONFIG.replace('"brush"', '"paint"')))
    assert region["from_name"] == "paint"


@pytest.mark.parametrize(("label", "expected"), [(" cat ", ["Cat"]), ("Cat", ["Cat"]), ("Dog", None)])
def test_e17_labels_that_differ(client: FlaskClient, label: str, expected: list[str] | None) -> None:
    entry = click(50, 50, value={"x": 50, "y": 50, "keypointlabels": [label]})
    (region,) = answer(client, body(entry))
    assert region["value"].get("brushlabels") == expected


def test_e17_the_log_explains(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    config = CONFIG.replace(
        '<KeyPointLabels name="kp" toName="image"><Label value="Cat"/>', '<KeyPointLabels name="kp" toName="image">'
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            client.post("/setup", json={"project": "9.9", "schema": config})
    assert caplog.text.count("The labels of 'kp' and 'brush' differ.") == 1


@pytest.mark.parametrize(
    ("status", "headers", "sent", "expected", "cause"),
    [
        (404, {}, b"", 502, "HTTP 404"),
        (500, {}, b"Traceback canary", 502, "HTTP 500"),
        (200, {"Content-Type": "text/html"}, b"<html>", 502, "web page"),
        (200, {}, b"", 502, "empty"),
        (200, {}, b"not an image", 502, "not an image"),
        (200, {}, photo("chelsea.jpg")[:9000], 502, "truncated"),
        (200, {"Content-Length": "40000"}, photo("chelsea.jpg")[:9000], 502, "broke off"),
        (200, {"Content-Length": "999999999"}, b"x", 502, "bytes"),
        (200, {"Content-Encoding": "gzip"}, b"x", 502, "compressed"),
        (302, {"Location": "/data/a"}, b"", 502, "redirects"),
        (302, {"Location": "file:///etc/passwd"}, b"", 400, "not fetched"),
    ],
)
def test_e18_images_that_cannot_be_had(
    client: FlaskClient,
    platform: Platform,
    status: int,
    headers: dict[str, str],
    sent: bytes,
    expected: int,
    cause: str,
) -> None:
    platform.answers["/data/a"] = (status, {"Connection": "close", **headers}, sent)
    response = client.post("/predict", json=body(click(50, 50), image="/data/a"))
    assert response.status_code == expected
    assert set(response.json) == {"error", "detail"}
    assert response.json["detail"].startswith("Task 7: ")
    assert cause in response.json["detail"]
    assert "canary" not in response.text
    platform.answers["/data/a"] = (200, {}, photo("chelsea.jpg"))  # nothing bad was kept
    assert one_mask(client, body(click(50, 50), image="/data/a")).any()


def test_e18_a_silent_host_is_given_up(make_app: Callable[..., flask.Flask], platform: Platform) -> None:
    def drip(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(100):
            time.sleep(0.05)
            handler.wfile.write(b"X-Slow: y\r\n")

    platform.answers["/data/slow"] = drip
    client = make_app(fetch_timeout_s=0.3).test_client()
    response = client.post("/predict", json=body(click(50, 50), image="/data/slow"))
    assert response.status_code == 504
    assert response.json["error"] == "fetch_timeout"


def test_e18_over_the_pixel_limit(tiny_model: Any, platform: Platform, make_app: Callable[..., flask.Flask]) -> None:
    app = create_app(
        make_app().extensions["inter2former"]._settings, Segmenter(tiny_model, model_size=256, max_pixels=1000)
    )
    response = app.test_client().post("/predict", json=body(click(50, 50)))
    assert response.status_code == 502
    assert "over the limit" in response.json["detail"]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_e18_decodable_kinds(client: FlaskClient, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 451 * 300).astype(np.uint16).reshape(300, 451))
    else:
        image = Image.open(io.BytesIO(photo("chelsea.jpg"))).convert(mode)
    url = data_url(image, "TIFF" if mode == "CMYK" else "PNG")
    assert at(one_mask(client, body(click(50, 50), image=url)), 50, 50)


def test_e18_personal_access_token_is_refreshed_once(make_app: Callable[..., flask.Flask], platform: Platform) -> None:
    client = make_app(label_studio_api_key=PAT).test_client()
    answer(client, body(click(50, 50)))
    answer(client, body(click(50, 50), image="/data/upload/1/b-coffee.jpg"))
    assert platform.refreshes == 1
    platform.access.append("the platform forgot the old one")
    answer(client, body(click(50, 50), image="/data/upload/1/c-rocket.jpg"))
    assert platform.refreshes == 2
    platform.answers["/data/no"] = (401, {}, b"")
    response = client.post("/predict", json=body(click(50, 50), image="/data/no"))
    assert response.status_code == 502
    assert "personal access token" in response.json["detail"]
    assert platform.paths.count("/data/no") == 2


def test_e18_a_legacy_token_that_is_switched_off(client: FlaskClient, platform: Platform) -> None:
    platform.legacy_on = False
    response = client.post("/predict", json=body(click(50, 50)))
    assert response.status_code == 502
    assert "Legacy tokens are switched off" in response.json["detail"]


def test_e19_r2_parallel_clicks_and_health(client: FlaskClient, make_app: Callable[..., flask.Flask]) -> None:
    app = make_app()
    photos = ["chelsea", "coffee", "astronaut", "rocket"]
    requests = [
        body(click(20 + 10 * user, 50), click(80, 80, False), image=f"/data/upload/1/a-{name}.jpg")
        for user in range(2)
        for name in photos
    ]
    alone = [one_mask(client, request) for request in requests]
    with ThreadPoolExecutor(9) as pool:
        running = [pool.submit(one_mask, app.test_client(), request) for request in requests * 2]
        assert app.test_client().get("/health").status_code == 200
        for mask, future in zip(alone * 2, running, strict=True):
            assert np.array_equal(mask, future.result(60))


def test_e19_health_and_setup_are_answered_before_eight_predictions_that_wait(
    make_app: Callable[..., flask.Flask],
) -> None:
    app = make_app()
    backend: Backend = app.extensions["inter2former"]
    one_mask(app.test_client(), body(click(50, 50)))
    with ThreadPoolExecutor(8) as pool:
        with busy(backend):
            waiting = [pool.submit(one_mask, app.test_client(), body(click(10 * i, 50))) for i in range(1, 9)]
            until(lambda: backend._admission.waiting == 8)
            assert app.test_client().get("/health").status_code == 200
            assert app.test_client().post("/setup", json=request_of("02")).status_code == 200
            assert not any(future.done() for future in waiting)
        assert all(future.result(60).any() for future in waiting)


def test_e19_a_host_that_hangs_holds_up_nobody_whose_image_is_known(
    make_app: Callable[..., flask.Flask], platform: Platform
) -> None:
    over = threading.Event()

    def hang(handler: Any) -> None:
        over.wait(60)
        platform._send(handler, 404, {}, b"")

    platform.answers["/data/hang"] = hang
    app = make_app(fetch_timeout_s=60)
    client = app.test_client()
    one_mask(client, body(click(50, 50)))
    with ThreadPoolExecutor(FETCHES) as pool:
        hanging = body(click(50, 50), image="/data/hang")
        waiting = [pool.submit(app.test_client().post, "/predict", json=hanging) for _ in range(FETCHES)]
        try:
            until(lambda: platform.paths.count("/data/hang") == FETCHES)
            assert one_mask(client, body(click(50, 50), click(60, 60))).any()
            assert client.get("/health").status_code == 200
            refused = client.post("/predict", json=body(click(50, 50), image="/data/upload/1/b-coffee.jpg"))
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert not any(future.done() for future in waiting)
        finally:
            over.set()
        assert [future.result(60).status_code for future in waiting] == [502] * FETCHES
    assert one_mask(client, body(click(50, 50), image="/data/upload/1/b-coffee.jpg")).any()
    assert THREADS > PLACES + FETCHES


def test_e19_too_many_at_once_hear_it_at_once(make_app: Callable[..., flask.Flask]) -> None:
    app = make_app()
    backend: Backend = app.extensions["inter2former"]
    backend._admission = Admission(running=1, waiting=0, wait_s=0.01)
    with backend._admission.place():
        response = app.test_client().post("/predict", json=body(click(50, 50)))
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    held = threading.Event()
    with backend._admission.turn(), pytest.raises(BusyError), backend._admission.turn():
        held.set()
    assert not held.is_set()


@pytest.mark.parametrize("percent", [0, 100, -0.0, 100.5, -0.5, 99.999999])
def test_e20_clicks_on_the_border(client: FlaskClient, percent: float) -> None:
    mask = one_mask(client, body(click(percent, 100 - percent)))
    assert at(mask, min(max(percent, 0), 100), min(max(100 - percent, 0), 100))


BAD_VALUES = [
    {},
    {"x": 50},
    {"x": float("nan"), "y": 50},
    {"x": float("inf"), "y": 1},
    {"x": "50", "y": 50},
    {"x": True, "y": 1},
    {"x": 10**400, "y": 1},
    {"x": 400, "y": 1},
    None,
    [],
]


@pytest.mark.parametrize("value", BAD_VALUES, ids=str)
def test_e20_an_entry_without_a_place_is_skipped(client: FlaskClient, value: Any) -> None:
    bad = click(1, 1, value=value)
    assert answer(client, body(bad)) == []
    assert np.array_equal(one_mask(client, body(click(50, 50), bad)), one_mask(client, body(click(50, 50))))


def test_e20_predict_before_setup_duplicates_and_sixty_clicks(client: FlaskClient) -> None:
    same = one_mask(client, body(click(50, 50), click(50, 50)))
    assert at(same, 50, 50)
    many = [click(5 + 1.5 * i, 50, i % 3 != 2, id=f"c{i}") for i in range(60)]
    mask = one_mask(client, body(*many))
    assert all(at(mask, e["value"]["x"], 50) == e["is_positive"] for e in many)
    too_many = client.post("/predict", json=body(*[click(50, 50, id=str(i)) for i in range(10_000)]))
    assert too_many.status_code == 400
    assert too_many.json["error"] == "prompt"


def test_e20_a_large_body_with_a_hundred_masks(client: FlaskClient) -> None:
    request = body(click(50, 50))
    rle = {"format": "rle", "rle": list(range(256)) * 110, "brushlabels": ["Cat"]}
    masks = [{"id": f"m{i}", "type": "brushlabels", "value": rle} for i in range(100)]
    request["tasks"][0]["drafts"] = [{"result": masks}]
    request["tasks"][0]["unknown"] = {"key": [1, {"deep": None}]}
    assert one_mask(client, request).any()


@pytest.mark.parametrize("sent", [b"", b"not json", b"[" * 100_000, b'{"tasks": 1}', b"[]", b"null", b"7", b"\xff\xfe"])
def test_e20_bodies_that_are_no_request(client: FlaskClient, sent: bytes) -> None:
    response = client.post("/predict", data=sent, content_type="application/json")
    assert response.status_code == 400
    assert set(response.json) == {"error", "detail"}


def test_e21_a_moved_prompt_is_answered_at_its_new_place(client: FlaskClient) -> None:
    before, after = recorded("57")["before"]["body"], request_of("57")
    mask_before, mask_after = one_mask(client, before), one_mask(client, after)
    entry = after["params"]["context"]["result"][0]
    moved = one_mask(client, body(click(entry["value"]["x"], entry["value"]["y"])))
    assert np.array_equal(mask_after, moved)
    assert not np.array_equal(mask_before, mask_after)


def test_e21_a_turned_box_is_taken_by_its_corners(client: FlaskClient) -> None:
    # 90 degrees clockwise about the first corner, in pixels: the width of 90.2 px goes down, the height goes left.
    turned = one_mask(client, body(rectangle(60, 20, 20, 30, 90)))
    upright = one_mask(client, body(rectangle(60 - 30 * 300 / 451, 20, 30 * 300 / 451, 20 * 451 / 300)))
    assert np.array_equal(turned, upright)


def test_e22_brush_entries_that_lie_or_are_empty(client: FlaskClient) -> None:
    def brush(value: dict[str, Any]) -> dict[str, Any]:
        return {**click(0, 0, None, type="brushlabels", from_name="brush"), "value": {"brushlabels": ["Cat"], **value}}

    assert answer(client, body(brush({"format": "rle", "touches": []}))) == []
    assert answer(client, body(brush({"format": "rle", "rle": []}))) == []
    empty = brush_rle.encode(np.zeros((300, 451), bool))
    assert answer(client, body(brush({"format": "rle", "rle": empty}))) == []
    small = brush_rle.encode(np.ones((3, 4), bool))
    response = client.post("/predict", json=body(brush({"format": "rle", "rle": small})))
    assert response.status_code == 400
    draft = request_of("54")
    assert "rle" not in draft["tasks"][0]["drafts"][0]["result"][0]["value"]
    assert answer(client, draft)


def test_clicks_correct_a_painted_mask(client: FlaskClient) -> None:
    painted = np.zeros((300, 451), bool)
    painted[100:200, 100:300] = True
    stroke = {
        **click(0, 0, None, type="brushlabels", from_name="brush", id="b"),
        "value": {"format": "rle", "rle": brush_rle.encode(painted), "brushlabels": ["Cat"]},
    }
    mask = one_mask(client, body(stroke, click(80, 80), click(45, 50, False)))
    assert at(mask, 80, 80)
    assert not at(mask, 45, 50)


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        ("BitmaskLabels", "bitmasklabels"),
        ("PolygonLabels", "polygonlabels"),
        ("Bitmask", "bitmask"),
        ("Polygon", "polygon"),
    ],
)
def test_other_mask_controls(client: FlaskClient, tag: str, kind: str) -> None:
    config = CONFIG.replace("BrushLabels", tag)
    mask = one_mask(client, body(click(50, 50)))
    regions = answer(client, body(click(50, 50), config=config))
    for region in regions:
        field = kind if kind.endswith("labels") else "labels"
        assert (region["type"], region["value"][field]) == (kind, ["Cat"])
    if kind.startswith("bitmask"):
        (region,) = regions
        png = base64.b64decode(region["value"]["imageDataURL"].partition(",")[2])
        assert np.array_equal(np.array(Image.open(io.BytesIO(png)))[..., 3] > 0, mask)
    else:
        assert all(region["value"]["closed"] and len(region["value"]["points"]) >= 3 for region in regions)
        assert all(0 <= c <= 100 for region in regions for point in region["value"]["points"] for c in point)


def test_the_config_of_the_guide_is_fine() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "label_studio.md").read_text()
    configs = re.findall(r"```xml\n(.*?)```", guide, re.DOTALL)
    assert len(configs) == 2
    for text in configs:
        config = contract.parse_config(text)
        assert config.warnings() == ()
        assert config.mask_control("image") is not None


def test_the_judge_reads_our_masks() -> None:
    mask = np.arange(60).reshape(6, 10) % 7 < 3
    assert np.array_equal(decode_rle(brush_rle.encode(mask), 6, 10) > 0, mask)
    assert LEGACY
