"""The doctor: everything in order, and each thing that people get wrong, with the fix that it prints."""

import json
import pathlib
import socket

import flask
import nuclio_sdk
import pytest
import torch
from cvat_standin import StandIn, running

from backends.cvat_nuclio import doctor, gateway, main, serve
from backends.cvat_nuclio.service import Interactor
from inter2former.config import tiny
from inter2former.nn.model import Inter2Former
from inter2former.segmenter import Segmenter

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")

CAT = (pathlib.Path(__file__).parents[2] / "fixtures" / "cvat" / "cat_226x150.jpg").read_bytes()


@pytest.fixture(scope="module")
def interactor():
    torch.manual_seed(0)
    return Interactor(Segmenter(Inter2Former(tiny()), model_size=256), form="shapes")


@pytest.fixture(scope="module")
def address(interactor):
    with running(gateway.create_app(interactor)) as url:
        yield url


def look(capsys, *arguments):
    status = doctor.main(list(arguments))
    return status, capsys.readouterr().out


def test_everything_in_order(address, capsys, monkeypatch):
    cvat = StandIn(dashboard=address)
    cvat.task(7, [("cat.jpg", CAT, 226, 150)], {3: "cat"})
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", "secret")
    with cvat.running() as url:
        status, said = look(capsys, "--server", address, "--cvat", url, "--task", "7")
    assert status == 0, said
    assert "FAIL" not in said
    for line in (
        "answers as a nuclio dashboard",
        "with encoding",
        "next click and undo",
        "and the page shows why",
        "status 413",
        "version 2.80.0 reads shapes and masks",
        "inter2former among 1",
        "click in task 7",
    ):
        assert line in said
    assert "secret" not in said


def test_the_function_itself_and_json(interactor, capsys):
    context = nuclio_sdk.Context()
    context.user_data.interactor = interactor
    with running(serve.create_app(main.handler, context)) as url:
        status, said = look(capsys, "--server", url, "--json")
    found = {one["name"]: one for one in json.loads(said)}
    assert status == 0
    assert "function itself" in found["server"]["text"]
    assert "the status alone" in found["errors"]["text"]
    assert found["CVAT"]["ok"] is None


def test_a_server_that_is_away(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        status, said = look(capsys, "--server", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert status == 1
    assert "cannot be reached" in said
    assert "fix: start it: python -m backends.cvat_nuclio.gateway" in said


def test_a_server_that_gives_no_whole_answer(capsys):
    app = flask.Flask("broken")
    app.add_url_rule("/api/functions", view_func=lambda: flask.Response("{", content_type="application/json"))
    with running(app) as url:
        status, said = look(capsys, "--server", url)
    assert status == 1
    assert "FAIL server: no whole answer came" in said


@pytest.mark.parametrize(
    ("listing", "text"),
    [
        ({"yolo": {"metadata": {"name": "yolo", "annotations": {"type": "detector"}}, "spec": {}}}, "answer 500"),
        ({}, "none of them inter2former"),
        ([], "no object"),
    ],
)
def test_a_dashboard_that_cvat_stumbles_over(listing, text, capsys):
    app = flask.Flask("dashboard")
    app.add_url_rule("/api/functions", view_func=lambda: flask.jsonify(listing))
    with running(app) as url:
        status, said = look(capsys, "--server", url)
    assert status == 1
    assert text in said
    assert "fix:" in said


def test_what_may_be_wrong_on_the_side_of_cvat(address, capsys, monkeypatch):
    other = flask.Flask("other dashboard")
    other.add_url_rule("/api/functions", view_func=lambda: flask.jsonify({}))
    with running(other) as elsewhere:
        for token, dashboard, fix in (
            ("wrong", address, "make a new one"),
            ("secret", None, "CVAT_NUCLIO_HOST"),
            ("secret", elsewhere, "set it to the gateway"),
        ):
            monkeypatch.setenv("CVAT_ACCESS_TOKEN", token)
            with StandIn(dashboard=dashboard).running() as url:
                found = list(doctor.check_cvat(url, token, None, 0))
            assert found[-1].ok is False
            assert fix in found[-1].fix
    with StandIn(version="2.31.0").running() as url:
        found = list(doctor.check_cvat(url, None, None, 0, form="mask"))
        assert [one.ok for one in found] == [True, None]
        found = list(doctor.check_cvat(url, None, None, 0, form="shapes"))
        assert (found[0].ok, "I2F_CVAT_RESPONSE" in found[0].fix) == (False, True)


def test_a_task_without_that_frame_and_a_click_that_fails(address):
    cvat = StandIn(dashboard=address)
    cvat.task(7, [("cat.jpg", CAT[:2000], 226, 150)], {3: "cat"})
    with cvat.running() as url:
        (*_, frame) = doctor.check_cvat(url, "secret", 7, 5)
        assert (frame.ok, frame.text) == (False, "it has no frame 5")
        (*_, click) = doctor.check_cvat(url, "secret", 7, 0)
        assert click.ok is False
        assert "truncated" in click.text  # the sentence came all the way
