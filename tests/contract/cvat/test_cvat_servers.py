"""CVAT's doors over HTTP: the local server that plays nuclio's processor and the gateway that plays its dashboard,
asked as CVAT's server asks them and judged as its page judges."""

import contextlib
import gzip
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import cvat_page
import flask
import httpx
import nuclio_sdk
import numpy as np
import pytest
import torch
from cvat_standin import running

from backends.common.http import BusyError
from backends.common.settings import Settings
from backends.cvat_nuclio import contract, gateway, main, replicas, serve, service
from backends.cvat_nuclio.service import Interactor
from inter2former.checkpoints import save_checkpoint
from inter2former.config import tiny
from inter2former.nn.model import Inter2Former
from inter2former.segmenter import Segmenter

# The SDK calls a function that Python 3.12 deprecates; not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")

ROOT = pathlib.Path(__file__).parents[3]
FIXTURES = ROOT / "tests" / "fixtures" / "cvat"
RECORDED = json.loads((FIXTURES / "dashboard_exchanges.json").read_text())
HEADERS = RECORDED["invoke"]["request"]["headers"]


def raw(name):
    return (FIXTURES / f"request_{name}.json").read_bytes()


def tiny_model():
    torch.manual_seed(0)
    return Inter2Former(tiny())


@pytest.fixture(scope="module")
def interactor():
    return Interactor(Segmenter(tiny_model(), model_size=256), form="shapes")


@pytest.fixture(params=["bytes", "text"])
def server(request, interactor):
    """The local server, with events as the SDK hands them over by default and as text."""
    context = nuclio_sdk.Context()
    context.user_data.interactor = interactor
    return serve.create_app(main.handler, context, raw_events=request.param == "bytes").test_client()


# -- the local server ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "text/plain", ""])
def test_c14_the_server_hands_events_over_as_nuclio_does(server, interactor, content_type):
    answer = server.post("/", data=raw("points"), headers={"Content-Type": content_type})
    assert answer.status_code == 200
    assert answer.content_type == "application/json"
    assert answer.data == interactor.answer(raw("points")).body


@pytest.mark.parametrize(("accepts", "packed"), [("gzip, deflate", True), ("gzip;q=0", False), ("identity", False)])
@pytest.mark.parametrize("door", ["server", "gateway"])
def test_c13_gzip_for_those_alone_who_accept_it(interactor, door, accepts, packed, monkeypatch):
    monkeypatch.setitem(contract.GZIP_ABOVE_BYTES, "shapes", 10)
    context = nuclio_sdk.Context()
    context.user_data.interactor = interactor
    app = serve.create_app(main.handler, context) if door == "server" else gateway.create_app(interactor)
    answer = app.test_client().post("/", data=raw("points"), headers={"Accept-Encoding": accepts})
    assert ("Content-Encoding" in answer.headers) is packed


def test_c14_health_and_unknown_methods(server):
    assert server.get("/health").json["status"] == "UP"
    assert server.head("/").status_code == 200
    assert server.delete("/").status_code == 405


@pytest.mark.parametrize("excess", [-1, 0, 1, 100_000])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("door", ["server", "gateway"])
def test_c10_r16_bodies_around_the_limit(interactor, monkeypatch, door, chunked, excess):
    limit = 12_000
    monkeypatch.setattr(contract, "MAX_BODY_BYTES", limit)
    if door == "server":
        context = nuclio_sdk.Context()
        context.user_data.interactor = interactor
        client = serve.create_app(main.handler, context).test_client()
    else:
        client = gateway.create_app(interactor).test_client()
    data = raw("point")
    data += b" " * (limit + excess - len(data))
    sent = {"data": data}
    if chunked:
        sent = {"input_stream": io.BytesIO(data), "environ_overrides": {"wsgi.input_terminated": True}}
    answer = client.post("/", content_type="application/json", **sent)
    assert answer.status_code == (413 if excess > 0 else 200)
    if excess > 0:
        assert answer.json["error"] == "too_large"
        assert str(limit) in answer.json["detail"]


def test_c15_r10_a_full_line_is_refused_at_once_and_a_place_is_given_back():
    entered, release = threading.Event(), threading.Event()

    def slow(context, event):
        entered.set()
        release.wait(10)
        return {"shapes": []}

    app = serve.create_app(slow, nuclio_sdk.Context(), admission=serve.Admission(running=1, waiting=0, wait_s=10))
    first = threading.Thread(target=lambda: app.test_client().post("/", data=b"{}"))
    first.start()
    assert entered.wait(10)
    answer = app.test_client().post("/", data=b"{}")
    assert answer.status_code == 503
    assert answer.json["error"] == "busy"
    assert answer.headers["Retry-After"] == "1"
    release.set()
    first.join()
    assert app.test_client().post("/", data=b"{}").status_code == 200


def test_r10_nobody_waits_longer_than_the_limit():
    admission = serve.Admission(running=1, waiting=5, wait_s=0.05)
    with admission.turn(), pytest.raises(BusyError), admission.turn():
        pass
    with admission.turn():
        pass


def test_c15_r14_a_failing_event_gives_its_place_back():
    admission = serve.Admission(running=1, waiting=0, wait_s=0.05)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.place(), admission.turn():
            1 / 0  # noqa: B018
    with admission.place(), admission.turn():
        pass


# -- the gateway -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dashboard(interactor):
    return gateway.create_app(interactor, port=8070).test_client()


def as_cvat_reads(entry):
    """The values that CVAT's server takes from one entry; KeyError where it would fail."""
    annotations = entry["metadata"]["annotations"]
    assert all(isinstance(value, str) for value in annotations.values())
    return {
        "id": entry["metadata"]["name"],
        "kind": annotations["type"],
        "labels_v2": json.loads(annotations["spec"] or "[]"),
        "description": entry["spec"]["description"],
        "name": annotations.get("name", entry["metadata"]["name"]),
        "version": int(annotations.get("version", "1")),
        "min_pos_points": int(annotations.get("min_pos_points", 1)),
        "min_neg_points": int(annotations.get("min_neg_points", -1)),
        "startswith_box": bool(annotations.get("startswith_box", False)),
        "startswith_box_optional": bool(annotations.get("startswith_box_optional", False)),
        "help_message": annotations.get("help_message", ""),
        "animated_gif": annotations.get("animated_gif", ""),
        "port": entry["status"]["httpPort"],
    }


def test_the_function_is_listed_as_cvat_reads_it(dashboard):
    listing = dashboard.get("/api/functions", headers=RECORDED["list"]["request"]["headers"])
    assert listing.status_code == 200
    read = {name: as_cvat_reads(entry) for name, entry in listing.json.items()}
    expected = RECORDED["to_page"]["response_item"]
    assert set(read) == {"inter2former"}
    assert {key: read["inter2former"][key] for key in expected if key not in ("help_message", "description")} == {
        key: expected[key] for key in expected if key not in ("help_message", "description")
    }
    assert dashboard.get("/api/functions/inter2former").json == listing.json["inter2former"]
    assert read["inter2former"]["port"] == 8070


def test_health_and_metrics_of_the_gateway(dashboard):
    assert dashboard.get("/health").json["status"] == "UP"
    assert b"inter2former_queue 0.0" in dashboard.get("/metrics").data
    assert dashboard.get("/api/nope").status_code == 404


def test_an_unknown_function_is_a_404(dashboard):
    assert dashboard.get("/api/functions/nope").status_code == 404
    headers = {**HEADERS, "x-nuclio-function-name": "nope"}
    assert dashboard.post("/api/function_invocations", headers=headers, data=raw("point")).status_code == 404


@pytest.mark.parametrize("path", ["/api/function_invocations", "/"], ids=["dashboard", "direct"])
def test_a_click_through_the_dashboard_or_direct_is_the_functions_answer(dashboard, interactor, path):
    answer = dashboard.post(path, headers=HEADERS, data=raw("points"))
    assert answer.status_code == 200
    assert answer.data == interactor.answer(raw("points")).body
    (mask,) = cvat_page.draws(answer.json, 226, 150)
    assert mask[61, 112]


def test_the_sentence_that_explains_is_in_the_status_line(interactor):
    with running(gateway.create_app(interactor)) as url:
        answer = httpx.post(url + "/api/function_invocations", headers=HEADERS, content=raw("bad_point"))
        assert (answer.status_code, answer.reason_phrase) == (400, answer.json()["detail"])
        assert answer.reason_phrase.startswith("pos_points[0] has 1 number")


def test_a_status_line_stays_one_line_of_ascii():
    reply = serve.to_flask(gateway.refused(400, "x", "a\r\nX-Injected: 1\u2028é" + "b" * 500))
    assert "\r" not in reply.status
    assert "\n" not in reply.status
    assert reply.status.isascii()
    assert len(reply.status) < 220


@pytest.fixture
def other_dashboard():
    """A real nuclio dashboard in miniature, with a detector."""
    app = flask.Flask("dashboard")
    entry = {
        "metadata": {"name": "yolo", "annotations": {"type": "detector", "spec": "[]"}},
        "spec": {"description": "a detector"},
        "status": {"httpPort": 1},
    }

    @app.get("/api/functions")
    def functions():
        return {"yolo": entry, "inter2former": {"an": "older copy of ours"}}

    @app.get("/api/functions/yolo")
    def function():
        assert flask.request.headers["x-nuclio-project-name"] == "cvat"
        return entry

    @app.post("/api/function_invocations")
    def invoke():
        if flask.request.headers["x-nuclio-function-name"] != "yolo":
            return {"error": "not found"}, 404
        body = json.dumps(
            {"got": flask.request.get_json(), "timeout": flask.request.headers["X-Nuclio-Invoke-Timeout"]}
        )
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return flask.Response(gzip.compress(body.encode()), headers=headers)

    with running(app) as url:
        yield url


def test_other_functions_are_passed_through_to_the_upstream_dashboard(interactor, other_dashboard):
    client = gateway.create_app(interactor, upstream=gateway.Upstream(other_dashboard)).test_client()
    headers = RECORDED["list"]["request"]["headers"]
    listing = client.get("/api/functions", headers=headers).json
    assert {name: as_cvat_reads(entry)["kind"] for name, entry in listing.items() if name == "inter2former"}
    assert listing["yolo"]["spec"]["description"] == "a detector"
    assert client.get("/api/functions/yolo", headers=headers).json == listing["yolo"]
    assert client.get("/api/functions/nope", headers=headers).status_code == 404
    answer = client.post(
        "/api/function_invocations", headers={**HEADERS, "x-nuclio-function-name": "yolo"}, data=b'{"image": "x"}'
    )
    assert answer.headers["Content-Encoding"] == "gzip"  # as the function wrote it
    assert json.loads(gzip.decompress(answer.data)) == {"got": {"image": "x"}, "timeout": "120s"}
    ours = client.post("/api/function_invocations", headers=HEADERS, data=raw("point"))
    assert ours.data == interactor.answer(raw("point")).body


@pytest.mark.parametrize(
    "half",
    [
        {"metadata": {"name": "yolo", "annotations": {}}, "spec": {}, "status": {}},
        {"metadata": {"name": "yolo", "annotations": {}}, "spec": {"description": ""}},
        {"metadata": {"name": "yolo"}, "spec": {"description": ""}, "status": {}},
        {"metadata": {"name": "yolo", "annotations": {"spec": "{"}}, "spec": {"description": ""}, "status": {}},
        "yolo",
        None,
    ],
    ids=["description", "status", "annotations", "spec", "text", "null"],
)
def test_half_a_function_of_the_upstream_dashboard_does_not_break_the_models_page(interactor, caplog, half):
    whole = {
        "metadata": {"name": "sam", "annotations": {"type": "interactor"}},
        "spec": {"description": "other"},
        "status": {"state": "ready"},
    }
    app = flask.Flask("dashboard")
    app.add_url_rule("/api/functions", view_func=lambda: flask.jsonify({"yolo": half, "sam": whole}))
    with running(app) as url:
        listing = gateway.create_app(interactor, upstream=gateway.Upstream(url)).test_client().get("/api/functions")
    assert set(listing.json) == {"sam", "inter2former"}
    assert listing.json["sam"] == whole
    assert "yolo" in caplog.text


def test_an_upstream_that_is_away_does_not_take_ours_along(interactor, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = gateway.create_app(interactor, upstream=gateway.Upstream(url)).test_client()
    assert set(client.get("/api/functions").json) == {"inter2former"}
    assert "upstream" in caplog.text
    assert client.get("/api/functions/yolo").status_code == 503
    headers = {**HEADERS, "x-nuclio-function-name": "yolo"}
    assert client.post("/api/function_invocations", headers=headers, data=b"{}").status_code == 503
    assert client.post("/api/function_invocations", headers=HEADERS, data=raw("point")).status_code == 200


def test_an_upstream_that_hangs_is_a_504(interactor):
    release = threading.Event()
    app = flask.Flask("slow")

    @app.route("/<path:path>", methods=["GET", "POST"])
    def hang(path):
        release.wait(10)
        return {}

    with running(app) as url:
        client = gateway.create_app(interactor, upstream=gateway.Upstream(url, timeout_s=0.2)).test_client()
        headers = {**HEADERS, "x-nuclio-function-name": "yolo"}
        assert client.post("/api/function_invocations", headers=headers, data=b"{}").status_code == 504
        release.set()


# -- the commands ------------------------------------------------------------------------------------------------------


def test_the_gateway_command_serves_a_session_and_stops_when_told(tmp_path):
    """The whole way of CVAT's server, with one process of the gateway: five steps with an undo."""
    save_checkpoint(tmp_path / "tiny.safetensors", tiny_model())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("I2F_")}
    environ |= {"I2F_CHECKPOINT": str(tmp_path / "tiny.safetensors"), "I2F_THREADS": "1", "HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "backends.cvat_nuclio.gateway", "--port", str(port)],
        cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").status_code == 200:
                    break
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        body = json.loads(raw("empty"))
        clicks, masks = [], []
        for step in json.loads((FIXTURES / "session_cat.json").read_text())["steps"]:
            clicks = clicks[:-1] if step.get("undo") else [*clicks, step]
            for key, side in (("pos_points", True), ("neg_points", False)):
                body[key] = [[click["x"], click["y"]] for click in clicks if click["positive"] is side]
            answer = httpx.post(url + "/api/function_invocations", headers=HEADERS, json=body, timeout=60)
            assert answer.status_code == 200
            (mask,) = cvat_page.draws(answer.json(), 226, 150, "old")
            assert all(mask[int(click["y"]), int(click["x"])] == click["positive"] for click in clicks)
            masks.append(mask)
        assert np.array_equal(masks[3], masks[1])
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]  # serving writes nothing


def test_r17_wrong_settings_stop_the_server_with_every_one_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("I2F_CHECKPOINT", str(tmp_path / "none"))
    monkeypatch.setenv("I2F_CVAT_RESPONSE", "polygons")
    monkeypatch.setattr("sys.argv", ["gateway"])
    assert gateway.main() == 2
    printed = capsys.readouterr().err
    assert "I2F_CHECKPOINT" in printed
    assert "I2F_CVAT_RESPONSE" in printed


@pytest.mark.parametrize("option", ["--replica", "--upstream"])
def test_r17_an_address_that_is_none_stops_the_gateway(monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["gateway", option, "one:8080"])
    with pytest.raises(SystemExit, match="2"):
        gateway.main()
    assert "'one:8080' is no address such as http://" in capsys.readouterr().err


def test_r15_every_wait_is_shorter_than_the_platforms():
    """CVAT gives up after 120 s, and its pages show nothing better than an error then."""
    assert service.WAIT_S + service.ENCODE_WAIT_S < 60
    assert replicas.CONNECT_S + replicas.ANSWER_S < 120
    assert gateway.UPSTREAM_TIMEOUT_S < 120
    assert Settings().fetch_timeout_s < 90
