"""The HTTP door itself: passwords, limits, what is logged and measured, who is believed, and starting and stopping."""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask
import pytest
from flask.testing import FlaskClient
from ls_platform import FIXTURES, LEGACY, PAT, Platform, jwt, mask_of, recorded, request_of

from backends.common import log as logs
from backends.common.http import FetchError
from backends.common.images import Fetcher
from backends.common.images import Platform as PlatformAddress
from backends.common.server import START_FAILED, Server
from backends.common.settings import Settings
from backends.label_studio import __main__ as server
from backends.label_studio import app as app_module
from backends.label_studio.credentials import Credentials

ROUTES = [
    ("GET", "/health"),
    ("POST", "/setup"),
    ("POST", "/predict"),
    ("POST", "/webhook"),
    ("GET", "/versions"),
    ("POST", "/job_status"),
    ("GET", "/metrics"),
    ("GET", "/nothing"),
]


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_password_guards_all_but_liveness(make_app: Callable[..., flask.Flask], method: str, path: str) -> None:
    client = make_app(basic_auth_user="u", basic_auth_pass="pä:ss").test_client()
    bare = client.open(path, method=method, json={"tasks": []})
    assert (bare.status_code == 200) == (path == "/health")
    for wrong in (
        basic("u", "x"),
        basic("x", "pä:ss"),
        basic("", ""),
        {"Authorization": "Bearer u"},
        {"Authorization": "?"},
    ):
        refused = client.open(path, method=method, json={"tasks": []}, headers=wrong)
        assert refused.status_code == 401  # /health too: the platform tries it first when a backend is added
        assert refused.json["error"] == "unauthorized"
    right = client.open(path, method=method, json={"tasks": []}, headers=basic("u", "pä:ss"))
    assert right.status_code != 401


@pytest.mark.parametrize(("extra", "status"), [(-1, 200), (0, 200), (1, 413)])
def test_r16_the_size_of_a_body_is_limited(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, extra: int, status: int
) -> None:
    client.application.config["MAX_CONTENT_LENGTH"] = 100_000
    body = json.dumps({"tasks": [], "filler": ""})
    body = body.replace('""', '"' + "x" * (100_000 + extra - len(body)) + '"')
    response = client.post("/predict", data=body, content_type="application/json")
    assert response.status_code == status
    if status == 413:
        assert response.json["error"] == "too_large"


def test_r16_a_body_without_length_is_limited(client: FlaskClient) -> None:
    client.application.config["MAX_CONTENT_LENGTH"] = 1000
    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    response = client.post("/predict", input_stream=io.BytesIO(b"x" * 100_000), environ_overrides=chunked)
    assert response.status_code == 413
    assert app_module.MAX_BODY_BYTES >= 32 * 2**20


def test_r16_foreign_regions_are_not_decoded(client: FlaskClient) -> None:
    request = request_of("06")
    foreign = {"id": "f", "type": "brushlabels", "to_name": "other", "value": {"format": "rle", "rle": [1, 2, 3]}}
    request["params"]["context"]["result"] = [foreign] * 1000 + request["params"]["context"]["result"]
    assert client.post("/predict", json=request).status_code == 200


@pytest.mark.parametrize("path", ["/train", "/validate", "/delete", "/duplicate_model", "/static/x", "/console"])
def test_there_is_nothing_else(client: FlaskClient, path: str) -> None:
    response = client.post(path, json={})
    assert response.status_code in (404, 405)
    assert set(response.json) == {"error", "detail"}


def test_an_unexpected_error_is_a_plain_500(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("canary")

    monkeypatch.setattr(client.application.extensions["inter2former"], "predict", fail)
    response = client.post("/predict", json=request_of("06"))
    assert response.status_code == 500
    assert response.json["error"] == "internal"
    assert "canary" not in response.text


def test_r43_metrics_ids_and_timing(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        response = client.post("/predict", json=request_of("08"), headers={"X-Request-Id": "abc"})
    assert response.headers["X-Request-Id"] == "abc"
    key = response.headers["X-Image-Key"]
    stages = ("fetch", "queue", "decode_image", "encode", "click", "reply", "total")
    assert all(f"{stage};dur=" in response.headers["Server-Timing"] for stage in stages)
    assert f"image {key}" in caplog.text
    assert "3 clicks" in caplog.text
    client.post("/predict", data=b"?")
    text = client.get("/metrics").text
    for line in (
        'inter2former_requests_total{door="label_studio",endpoint="predict",status="200"} 1.0',
        'inter2former_requests_total{door="label_studio",endpoint="predict",status="400"} 1.0',
        'inter2former_errors_total{code="request",door="label_studio"} 1.0',
        'inter2former_stage_seconds_count{door="label_studio",stage="encode"} 1.0',
        "inter2former_encodes_total 1.0",
        "inter2former_queue 0.0",
    ):
        assert line in text
    for name in ("cache_bytes", "cache_hits_total", "cache_evictions_total", "info"):
        assert f"inter2former_{name}" in text
    assert "chelsea" not in text
    assert key not in text


def test_r43_labels_do_not_grow_with_what_callers_send(client: FlaskClient) -> None:
    for i in range(20):
        client.get(f"/{i}")
    assert client.get("/metrics").text.count("inter2former_requests_total{") == 1


# -- who is believed -------------------------------------------------------------------------------------------------


def setup_body(platform: Platform, token: str = LEGACY, **changes: Any) -> dict[str, Any]:
    return {**request_of("02"), "hostname": platform.url, "access_token": token, **changes}


def click_status(client: FlaskClient) -> int:
    return client.post("/predict", json=request_of("06")).status_code


NO_URL: dict[str, Any] = {"label_studio_url": None, "label_studio_api_key": None}


def test_the_platform_introduces_itself(make_app: Callable[..., flask.Flask], platform: Platform) -> None:
    client = make_app(**NO_URL).test_client()
    unknown = client.post("/predict", json=request_of("06"))
    assert unknown.status_code == 502
    assert "LABEL_STUDIO_URL" in unknown.json["detail"]
    client.post("/setup", json=setup_body(platform))
    assert click_status(client) == 200


@pytest.mark.parametrize(
    ("peer", "headers"),
    [
        ("203.0.113.9", {}),
        ("127.0.0.1", {"X-Forwarded-For": "203.0.113.9"}),
        ("127.0.0.1", {"Origin": "http://evil.example"}),
        ("127.0.0.1", {"Content-Type": "text/plain"}),
    ],
)
def test_r37_a_stranger_cannot_point_us_at_a_private_address(
    make_app: Callable[..., flask.Flask], platform: Platform, peer: str, headers: dict[str, str]
) -> None:
    client = make_app(**NO_URL).test_client()
    sent = {"Content-Type": "application/json", **headers}
    client.post("/setup", data=json.dumps(setup_body(platform)), headers=sent, environ_base={"REMOTE_ADDR": peer})
    assert click_status(client) == 400
    assert platform.requests == []


def test_a_stranger_does_not_get_the_configured_key(make_app: Callable[..., flask.Flask], platform: Platform) -> None:
    key = {"label_studio_url": None, "label_studio_api_key": "configured-key"}
    listed = make_app(**key, allow_private_hosts=("127.0.0.1",)).test_client()
    body = setup_body(platform, token="own-token")
    listed.post("/setup", json=body, environ_base={"REMOTE_ADDR": "203.0.113.9"})
    click_status(listed)
    assert [headers["authorization"] for _, _, headers in platform.requests] == ["Token own-token"]
    platform.requests.clear()
    proven = make_app(**key, basic_auth_user="u", basic_auth_pass="p").test_client()
    proven.post("/setup", json=body, headers=basic("u", "p"), environ_base={"REMOTE_ADDR": "203.0.113.9"})
    proven.post("/predict", json=request_of("06"), headers=basic("u", "p"))
    assert [headers["authorization"] for _, _, headers in platform.requests] == ["Token configured-key"]


def test_a_configured_address_wins(make_app: Callable[..., flask.Flask], platform: Platform) -> None:
    client = make_app().test_client()
    client.post("/setup", json=setup_body(platform, hostname="http://127.0.0.1:1", access_token="x"))
    assert click_status(client) == 200


def test_tasks_use_the_public_address_and_we_the_configured_one(client: FlaskClient, platform: Platform) -> None:
    public = "https://label.example.org"
    client.post("/setup", json=setup_body(platform, hostname=public))
    request = with_image(f"{public}/data/upload/1/a-chelsea.jpg")
    assert client.post("/predict", json=request).status_code == 200
    assert platform.paths == ["/data/upload/1/a-chelsea.jpg"]
    assert platform.requests[0][2]["authorization"] == f"Token {LEGACY}"


@pytest.mark.parametrize("hostname", ["", "label-studio", "ftp://x", "http://u:p@h", 7, None, "http://[", "\ud800"])
def test_setup_answers_whatever_the_hostname(make_app: Callable[..., flask.Flask], hostname: Any) -> None:
    client = make_app(**NO_URL).test_client()
    body = {**request_of("02"), "hostname": hostname}
    assert client.post("/setup", json=body).json["model_version"]
    assert click_status(client) == 502


# -- other places of images ------------------------------------------------------------------------------------------


def with_image(address: str) -> dict[str, Any]:
    request = copy.deepcopy(request_of("06"))
    request["tasks"][0]["data"]["image"] = address
    return request


def test_images_by_every_kind_of_address(client: FlaskClient, platform: Platform) -> None:
    for address, path in (
        ("/data/local-files/?d=set1/chelsea.jpg", "/data/local-files/?d=set1/chelsea.jpg"),
        (f"{platform.url}/data/local-files/?d=set2/chelsea.jpg", "/data/local-files/?d=set2/chelsea.jpg"),
        ("/data/upload/1/my photo-chelsea.jpg", "/data/upload/1/my%20photo-chelsea.jpg"),
        ("/data/upload/1/фото-chelsea.jpg", "/data/upload/1/%D1%84%D0%BE%D1%82%D0%BE-chelsea.jpg"),
        ("s3://bucket/my photos/chelsea.jpg", "/tasks/1/presign/?fileuri=czM6Ly9idWNrZXQvbXkgcGhvdG9zL2NoZWxzZWEuanBn"),
        ("/storage-data/uploaded/?filepath=upload/1/chelsea.jpg", None),
    ):
        platform.answers["/storage-data/uploaded/"] = (200, {}, (FIXTURES / "images" / "chelsea.jpg").read_bytes())
        response = client.post("/predict", json=with_image(address))
        assert response.status_code == 200, response.json
        if path:
            assert platform.paths[-1] == path
        assert platform.requests[-1][2]["authorization"] == f"Token {LEGACY}"


def test_r38_local_files_from_the_shared_folder(make_app: Callable[..., flask.Flask], platform: Platform) -> None:
    client = make_app(local_files_root=FIXTURES / "images").test_client()
    address = "/data/local-files/?d=chelsea.jpg"
    assert client.post("/predict", json=with_image(address)).status_code == 200
    assert platform.requests == []
    for bad in ("../README.md", "%2e%2e/README.md", "/etc/passwd", "a%00b", "..%2F..%2Fx"):
        response = client.post("/predict", json=with_image(f"/data/local-files/?d={bad}"))
        assert response.status_code == 400
    assert platform.requests == []
    absent = client.post("/predict", json=with_image("/data/local-files/?d=set1/chelsea.jpg"))
    assert absent.status_code == 200  # not in our folder: the platform has it
    assert len(platform.requests) == 1


def test_a_platform_that_lives_in_a_folder(make_app: Callable[..., flask.Flask], platform: Platform) -> None:
    client = make_app(label_studio_url=platform.url + "/ls").test_client()
    for address in ("/data/upload/1/a-chelsea.jpg", "/ls/data/upload/1/b-chelsea.jpg"):
        assert client.post("/predict", json=with_image(address)).status_code == 200
    assert platform.paths == ["/ls/data/upload/1/a-chelsea.jpg", "/ls/data/upload/1/b-chelsea.jpg"]


@pytest.mark.parametrize(
    "address",
    [
        "//evil.example/x.png",
        "/\\evil.example/x.png",
        "file:///etc/passwd",
        "x.png",
        "C:\\x.png",
        "http://10.0.0.1/x",
        "\ud800",
        "http://\ud800/",
        "http://a host/x.png",
        "http://host/x\ty.png",
        "javascript:1",
        "data:text/html,x",
        "data:image/png;base64,AAAA",
    ],
    ids=ascii,
)
def test_addresses_that_are_refused(client: FlaskClient, platform: Platform, address: str) -> None:
    response = client.post("/predict", json=with_image(address))
    assert response.status_code == 400
    assert response.json["error"] in ("url", "image")
    assert platform.requests == []


# -- secrets ---------------------------------------------------------------------------------------------------------


def test_r39_no_secret_in_logs_replies_or_metrics(
    make_app: Callable[..., flask.Flask], platform: Platform, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recorded calls at DEBUG, with tokens in every place that has one, and failures that carry them."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    secrets = ["setup-canary", "canary-password", LEGACY, PAT, "sig-canary", "url-canary", "canary-in-a-body"]
    replies: list[str] = []
    try:
        for key in (LEGACY, PAT, None):
            settings = {"basic_auth_user": "u", "basic_auth_pass": "canary-password", "label_studio_api_key": key}
            app = make_app(**settings, **({} if key else {"label_studio_url": None}))
            known = app.extensions["inter2former"]._settings.secrets()
            logs.configure(level=logging.DEBUG, known_secrets=known)
            client = app.test_client()
            for path in sorted(FIXTURES.glob("*.json")):
                call = recorded(path.name[:2])["backend_request"]
                body = copy.deepcopy(call["body"])
                if call["path"] == "/setup":
                    body |= {"access_token": "setup-canary", "hostname": platform.url}
                headers = basic("u", "canary-password")
                for auth in (headers, basic("u", "canary-password-wrong")):
                    response = client.open(call["path"], method=call["method"], json=body, headers=auth)
                    replies.append(response.text + str(response.headers))
            for address in (
                f"{platform.url}/x.png?X-Amz-Signature=sig-canary",
                "http://u:url-canary@example.invalid/x.png",
                "http://10.0.0.1/x.png?sig=sig-canary",
                "/data/missing.png?token=sig-canary",
            ):
                response = client.post("/predict", json=with_image(address), headers=headers)
                assert response.status_code >= 400
                replies.append(response.text + str(response.headers))
            replies.append(client.get("/metrics", headers=headers).text)
    finally:
        logs_written = capsys.readouterr()
        root.handlers[:] = handlers
        root.setLevel(level)
    assert "predict" in logs_written.err
    everything = logs_written.err + logs_written.out + "".join(replies)
    for secret in [*secrets, *platform.access, PAT.split(".")[1], base64.b64encode(b"u:canary-password").decode()]:
        assert secret not in everything
    assert "canary" not in repr(vars(app.extensions["inter2former"]._projects))


def test_r40_no_unpickling_in_a_server() -> None:
    for file in (Path(__file__).parents[3] / "backends").rglob("*.py"):
        text = file.read_text()
        assert not any(word in text for word in ("pickle", "torch.load", "eval(", "exec(", "yaml.load(", "marshal"))


# -- credentials -----------------------------------------------------------------------------------------------------


def test_an_access_token_is_kept_until_shortly_before_its_end(platform: Platform) -> None:
    now = [time.time()]
    fetcher = Fetcher(max_bytes=10_000, timeout_s=5)
    credentials = Credentials(fetcher, now=lambda: now[0])
    at = PlatformAddress(platform.url, None)
    assert credentials.headers(at, "") == {}
    assert credentials.headers(at, "plain") == {"Authorization": "Token plain"}
    first = credentials.headers(at, PAT)
    now[0] += 265
    assert credentials.headers(at, PAT) == first
    now[0] += 10
    assert credentials.headers(at, PAT) != first
    assert platform.refreshes == 2
    assert not credentials.forget(at, "plain", {})
    fetcher.close()


@pytest.mark.parametrize("access", ["", "x", None, 7, jwt(), jwt(exp="soon"), jwt(exp=True), "a.b.c", jwt(exp=1e308)])
def test_odd_answers_to_a_refresh(platform: Platform, monkeypatch: pytest.MonkeyPatch, access: Any) -> None:
    fetcher = Fetcher(max_bytes=10_000, timeout_s=5)
    monkeypatch.setattr(fetcher, "post_json", lambda *_, **__: json.dumps({"access": access}).encode())
    credentials = Credentials(fetcher)
    at = PlatformAddress(platform.url, None)
    if isinstance(access, str) and access.count(".") == 2:
        assert credentials.headers(at, PAT) == {"Authorization": f"Bearer {access}"}
    else:
        with pytest.raises(FetchError):
            credentials.headers(at, PAT)
    fetcher.close()


# -- the process -----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]


def test_r17_wrong_settings_stop_the_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("I2F_THREADS", "x")
    monkeypatch.setenv("I2F_MODEL_SIZE", "1")
    assert server.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_r17_a_broken_checkpoint_stops_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tmp_path / "w.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(SystemExit) as stopped:
        Server(lambda: server.create(Settings(checkpoint=broken)), "127.0.0.1", 1).load()
    assert stopped.value.code == START_FAILED
    assert "cannot start" in caplog.text
    assert all(record.exc_info is None for record in caplog.records)


def test_r19_the_server_starts_answers_and_drains(tiny_checkpoint: Path, platform: Platform) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {
        "I2F_CHECKPOINT": str(tiny_checkpoint),
        "I2F_MODEL_SIZE": "256",
        "I2F_THREADS": "1",
        "LABEL_STUDIO_URL": platform.url,
        "LABEL_STUDIO_API_KEY": LEGACY,
        "HOME": "/nonexistent",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "backends.label_studio", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=30) as health:
                    assert json.load(health)["status"] == "UP"
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        # The image comes slowly, so that the click is in work when the server is told to stop.
        image = (FIXTURES / "images" / "chelsea.jpg").read_bytes()

        def slow(handler: Any) -> None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            platform._send(handler, 200, {}, image)

        platform.answers["/data/upload/1/7e9f4e0c-chelsea.jpg"] = slow
        request = urllib.request.Request(
            f"{url}/predict", json.dumps(request_of("06")).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert mask_of(json.load(answer)["results"][0]["result"][0]).any()
        _, text = process.communicate(timeout=60)
        assert process.returncode == 0
        assert b"ready after" in text
        assert b"Traceback" not in text
        assert LEGACY.encode() not in text
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
