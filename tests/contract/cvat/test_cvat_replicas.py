"""Several servers behind one gateway, and what the gateway asks CVAT itself: its version."""

import base64
import collections
import contextlib
import gzip
import json
import pathlib
import random
import socket
import threading

import cvat_page
import flask
import httpx
import nuclio_sdk
import numpy as np
import pytest
import torch
from cvat_standin import running

from backends.common.http import FetchError
from backends.cvat_nuclio import contract, gateway, main, serve
from backends.cvat_nuclio.replicas import Replicas
from backends.cvat_nuclio.server_version import ReadsShapes, about
from backends.cvat_nuclio.service import Interactor
from inter2former.config import tiny
from inter2former.masks import mask_to_png
from inter2former.nn.model import Inter2Former
from inter2former.prompts import Click
from inter2former.segmenter import Segmenter

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "cvat"
HEADERS = json.loads((FIXTURES / "dashboard_exchanges.json").read_text())["invoke"]["request"]["headers"]
SIZE = 96  # of the pictures


def new_segmenter():
    torch.manual_seed(0)
    return Segmenter(Inter2Former(tiny()), model_size=256)


def nowhere():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def function(interactor):
    context = nuclio_sdk.Context()
    context.user_data.interactor = interactor
    return serve.create_app(main.handler, context)


@pytest.fixture
def pair():
    """Two replicas with weights and caches of their own; gives them and their addresses."""
    interactors = [Interactor(new_segmenter(), form="shapes") for _ in range(2)]
    with contextlib.ExitStack() as stack:
        yield interactors, [stack.enter_context(running(function(one))) for one in interactors]


def picture(seed):
    """A PNG of a disc with a ragged edge."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    return mask_to_png((x - 48) ** 2 + (y - 48) ** 2 + rng.integers(-400, 400, (SIZE, SIZE)) < 30**2)


def body(image, pos, neg=()):
    return json.dumps(
        {
            "image": base64.b64encode(image).decode(),
            "pos_points": [list(p) for p in pos],
            "neg_points": [list(p) for p in neg],
            "obj_bbox": [],
        }
    ).encode()


def click(url, data, **headers):
    return httpx.post(url + "/api/function_invocations", content=data, headers={**HEADERS, **headers}, timeout=60)


@pytest.mark.parametrize("n_clicks", [40, pytest.param(400, marks=pytest.mark.soak)])
def test_c15_r2_r9_eight_people_on_four_images_over_two_replicas(pair, n_clicks):
    interactors, addresses = pair
    images = [picture(seed) for seed in range(4)]
    answers, wrong = [], []

    def person(number, url):
        rng = random.Random(number)
        pos, neg = [], []
        with httpx.Client(timeout=60) as client:
            for step in range(n_clicks // 8):
                if step % 10 == 0:  # the next object
                    pos, neg, image = [(48.5, 48.5)], [], images[(number + step // 10) % 4]
                elif step % 5 == 4:  # undo, of any point but the first
                    (pos if len(pos) > 1 else neg or [None]).pop()
                else:
                    (pos if rng.random() < 0.6 else neg).append((rng.randrange(SIZE) + 0.5, rng.randrange(SIZE) + 0.5))
                answer = client.post(url + "/api/function_invocations", content=body(image, pos, neg), headers=HEADERS)
                if answer.status_code != 200:
                    wrong.append((answer.status_code, answer.text))
                else:
                    answers.append((image, tuple(pos), tuple(neg), answer.json()))

    with running(gateway.create_app(Replicas(addresses), admission=serve.Admission(24, 0, 10))) as url:
        people = [threading.Thread(target=person, args=(number, url)) for number in range(8)]
        for thread in people:
            thread.start()
        for thread in people:
            thread.join()
        metrics = httpx.get(url + "/metrics").text
    assert wrong == []
    assert len(answers) == n_clicks
    assert sum(one.segmenter.encodes for one in interactors) == len(images)
    assert f'inter2former_requests_total{{door="cvat_gateway",endpoint="click",status="200"}} {n_clicks}.0' in metrics
    alone = new_segmenter()
    for image, pos, neg, answer in answers:
        clicks = [Click(*p) for p in pos] + [Click(*p, positive=False) for p in neg]
        expected = alone.segment(image, clicks).mask
        drawn = cvat_page.draws(answer, SIZE, SIZE)
        assert np.array_equal(drawn[0] if drawn else np.zeros((SIZE, SIZE), bool), expected) or expected.sum() < 3


def test_an_image_keeps_its_replica_and_one_that_goes_hands_over_its_own_images_only():
    addresses = [f"http://replica-{n}:8080" for n in range(3)]
    digests = [str(n) for n in range(300)]
    here, there, fewer = Replicas(addresses), Replicas(addresses[::-1]), Replicas(addresses[:2])
    owners = {digest: here.order(digest)[0] for digest in digests}
    assert owners == {digest: there.order(digest)[0] for digest in digests}
    shares = collections.Counter(owners.values())
    assert set(shares) == set(addresses)
    assert min(shares.values()) > 60
    assert all(fewer.order(digest)[0] == owner for digest, owner in owners.items() if owner != addresses[2])


def test_c15_another_replica_answers_when_one_is_gone(pair, caplog):
    interactors, addresses = pair
    replicas = Replicas([addresses[0], nowhere()], away_s=600)
    for seed in range(8):  # some of these images belong to the one that is gone
        reply = replicas.answer(body(picture(seed), [(48, 48)]))
        assert reply.status == 200
    assert interactors[0].segmenter.encodes == 8
    assert sum("gave no answer" in record.message for record in caplog.records) <= 1  # then it is asked last
    assert json.loads(replicas.health().body)["status"] == "UP"


def test_c15_no_replica_at_all_is_a_503_that_says_so():
    client = gateway.create_app(Replicas([nowhere(), nowhere()])).test_client()
    answer = client.post("/api/function_invocations", data=body(picture(0), [(48, 48)]), headers=HEADERS)
    assert (answer.status_code, answer.json["error"]) == (503, "busy")
    assert "No server of Inter2Former can be reached" in answer.status
    assert client.get("/health").status_code == 503
    assert set(client.get("/api/functions").json) == {"inter2former"}  # the page stays whole


def test_a_replica_that_hangs_is_a_504_and_is_not_asked_twice():
    release, asked = threading.Event(), []
    app = flask.Flask("slow")

    @app.post("/")
    def hang():
        asked.append(1)
        release.wait(10)
        return {}

    with running(app) as url, running(app) as other:
        reply = Replicas([url, other], answer_s=0.3).answer(body(picture(0), [(48, 48)]))
        release.set()
    assert (reply.status, len(asked)) == (504, 1)


def test_errors_gzip_and_ids_come_through_the_gateway(pair):
    interactors, addresses = pair
    interactors[0].form = interactors[1].form = "mask"
    with running(gateway.create_app(Replicas(addresses))) as url:
        large = body(mask_to_png(np.ones((400, 300), bool)), [(20, 20)])
        with httpx.stream(
            "POST", url + "/api/function_invocations", content=large,
            headers={**HEADERS, "Accept-Encoding": "gzip, deflate", "X-Request-Id": "abc"}, timeout=60,
        ) as answer:  # fmt: skip
            raw = b"".join(answer.iter_raw())
        assert answer.headers["Content-Encoding"] == "gzip"
        assert answer.headers["X-Request-Id"] == "abc"
        assert len(raw) < contract.GZIP_ABOVE_BYTES["mask"]
        assert np.array(json.loads(gzip.decompress(raw))["mask"]).shape == (400, 300)
        plain = click(url, large, **{"Accept-Encoding": "identity"})
        assert "Content-Encoding" not in plain.headers
        assert plain.json() == json.loads(gzip.decompress(raw))
        outside = click(url, body(picture(0), [(500, 20)]))  # only a replica knows how large the image is
        assert outside.status_code == 400
        assert outside.reason_phrase.startswith("pos_points[0] (500, 20) is outside")
        broken = click(url, b"{")  # and this the gateway sees itself
        assert (broken.status_code, broken.json()["error"]) == (400, "request")


@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_workers_of_nuclio_that_ask_servers_share_one_encode(pair, monkeypatch, content_type):
    interactors, addresses = pair
    monkeypatch.setenv("I2F_CVAT_SERVERS", ", ".join(addresses))
    answers = []
    for _ in range(3):  # three workers: processes that have nothing in common
        monkeypatch.setattr(main, "_interactor", None)
        context = nuclio_sdk.Context()
        main.init_context(context)
        worker = serve.create_app(main.handler, context).test_client()
        answers.append(worker.post("/", data=body(picture(0), [(48, 48)]), content_type=content_type))
        assert worker.get("/health").json["status"] == "UP"
    monkeypatch.setattr(main, "_interactor", None)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.data for answer in answers}) == 1
    assert sum(one.segmenter.encodes for one in interactors) == 1
    assert worker.post("/", data=b'{"image": "QQ=="}').status_code == 400


def test_c14_r26_a_body_of_any_kind_goes_to_the_servers_as_the_same_request(pair, caplog):
    interactors, addresses = pair
    fields = json.loads(body(picture(0), [(48, 48)], [(5, 5.5)]))
    replicas = Replicas(addresses)
    for box in ([], None, [[10, 10], [80, 80]], [80, 80, 10, 10], [[10, 10], [80, 80], [1, 1], [2, 2]]):
        asked = {**fields, "obj_bbox": box}
        expected = interactors[0].answer(asked).body
        for variant in (
            asked,
            json.dumps(asked),
            bytearray(json.dumps(asked).encode()),
            {**asked, "threshold": float("nan"), "job": {1, 2}},  # what nobody reads may be anything
            json.dumps(asked)[:-1] + ', "note": "\ud800"}',
            {**asked, "image": "data:image/png;base64," + asked["image"]},
        ):
            reply = replicas.answer(variant)
            assert (reply.status, reply.body) == (200, expected)
    assert contract.parse(contract.body_of(contract.parse(asked))) == contract.parse(asked)
    assert "2 boxes" in caplog.text


def test_health_of_many_replicas_takes_no_longer_than_of_one(pair, monkeypatch):
    _, addresses = pair
    replicas = Replicas([*addresses, "http://a:1", "http://b:1"])
    together = threading.Barrier(4)

    def state(address):
        together.wait(30)  # each is asked while the others are
        return "UP" if address in addresses else "DOWN"

    monkeypatch.setattr(replicas, "_state", state)
    assert json.loads(replicas.health().body)["replicas"] == {
        **dict.fromkeys(addresses, "UP"), "http://a:1": "DOWN", "http://b:1": "DOWN",
    }  # fmt: skip


def test_r42_no_proxy_stands_between_gateway_and_servers(pair, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, nowhere())
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    replicas = Replicas(pair[1])
    assert replicas.answer(body(picture(0), [(48, 48)])).status == 200
    with running(gateway.create_app(replicas)) as url:  # is a dashboard too
        listing = gateway.create_app(replicas, upstream=gateway.Upstream(url)).test_client().get("/api/functions/none")
    assert listing.status_code == 404


# -- the version of CVAT ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cvat(answer, status=200):
    app = flask.Flask("cvat")
    seen = []

    @app.get("/api/server/about")
    def server_about():
        seen.append(flask.request.headers.get("Authorization"))
        return flask.Response(answer, status, content_type="application/json")

    with running(app) as url:
        yield url, seen


@pytest.mark.parametrize(
    ("version", "numbers", "reads"),
    [
        ("2.80.0", (2, 80, 0), True),
        ("2.71.0", (2, 71, 0), True),
        ("2.9.2", (2, 9, 2), False),
        ("3.0", (3, 0, 0), True),
        ("2.70.1.dev2", (2, 70, 1), False),
    ],
)
def test_c13_the_version_of_cvat_tells_whether_it_reads_shapes(version, numbers, reads):
    with cvat(json.dumps({"name": "Computer Vision Annotation Tool", "version": version})) as (url, seen):
        assert about(url, "secret") == numbers
        assert seen == ["Bearer secret"]
        asked = ReadsShapes(url)
        asked.ask()
        assert asked() is reads


@pytest.mark.parametrize(("answer", "status"), [("{}", 200), ("<html>", 200), ('{"version": "x"}', 200), ("", 403)])
def test_c13_what_is_no_cvat_leaves_mask(answer, status):
    with cvat(answer, status) as (url, _):
        with pytest.raises(FetchError):
            about(url)
        asked = ReadsShapes(url)
        asked.ask()
        assert asked() is False
    with pytest.raises(FetchError, match="reached"):
        about(nowhere())


def test_c13_a_cvat_that_starts_later_is_noticed_without_waiting_for_it():
    with cvat('{"version": "2.80.0"}') as (url, seen):
        asked = ReadsShapes(url, again_s=1)
        for _ in range(200):
            if asked():
                break
            threading.Event().wait(0.02)
        assert asked()
        assert seen
