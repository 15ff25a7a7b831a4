"""The CVAT function as nuclio runs it: events of nuclio_sdk in, its responses out, with the real (tiny) model and the
page as judge. C1..C15 are the platform's edge cases, R1.. the promises of reliability."""

import base64
import gzip
import io
import json
import pathlib
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import cvat_page
import nuclio_sdk
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nuclio_sdk.event import EventDeserializerKinds
from nuclio_sdk.json_encoder import Encoder
from PIL import Image
from synthetic import encode_png, make_image

from backends.common.settings import Settings
from backends.cvat_nuclio import main
from backends.cvat_nuclio.service import MAX_ENCODES, Interactor
from inter2former.checkpoints import save_checkpoint
from inter2former.config import tiny
from inter2former.images import decode_image
from inter2former.nn.model import Inter2Former
from inter2former.prompts import Click
from inter2former.segmenter import Segmenter

# The SDK calls a function that Python 3.12 deprecates; not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "cvat"
CAT = (FIXTURES / "cat_226x150.jpg").read_bytes()
REQUESTS = sorted(path.stem.removeprefix("request_") for path in FIXTURES.glob("request_*.json"))
REFUSED = {"broken_image", "not_base64", "bad_point", "nan_point"}
EMPTY = {"negative_only", "empty"}
FORMS = ("mask", "shapes")


def load(name):
    return json.loads((FIXTURES / name).read_text())


def request(name):
    return load(f"request_{name}.json")


def body(image=CAT, pos=(), neg=(), box=None):
    return {
        "image": base64.b64encode(image).decode(),
        "pos_points": [list(p) for p in pos],
        "neg_points": [list(p) for p in neg],
        "obj_bbox": [] if box is None else box,
    }


def new_segmenter():
    torch.manual_seed(0)
    return Segmenter(Inter2Former(tiny()), model_size=256)


@pytest.fixture(scope="module")
def segmenter():
    return new_segmenter()


@pytest.fixture(scope="module", params=FORMS)
def interactor(request, segmenter):
    return Interactor(segmenter, form=request.param)


def context_of(interactor):
    context = nuclio_sdk.Context()
    context.user_data.interactor = interactor
    return context


def ask(interactor, fields, *, page="new"):
    """The masks that the page draws for one request given as a dict."""
    reply = interactor.answer(fields)
    assert reply.status == 200, reply.body
    width, height = Image.open(io.BytesIO(base64.b64decode(fields["image"].partition(",")[2] or fields["image"]))).size
    return cvat_page.draws(json.loads(reply.body), width, height, page)


def mask_of(interactor, fields):
    drawn = ask(interactor, fields)
    assert len(drawn) == 1
    return drawn[0]


def pixel(point, mask):
    return min(int(point[1]), mask.shape[0] - 1), min(int(point[0]), mask.shape[1] - 1)


# -- the recorded requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in REQUESTS if name not in REFUSED | EMPTY])
def test_recorded_requests_get_a_mask_with_every_click_on_its_side(interactor, name):
    fields = request(name)
    drawn = ask(interactor, fields)
    assert len(drawn) <= 1
    if fields["pos_points"]:  # a box alone may be empty with untrained weights
        assert len(drawn) == 1
    for mask in drawn:
        assert all(mask[pixel(point, mask)] for point in fields["pos_points"])
        assert not any(mask[pixel(point, mask)] for point in fields["neg_points"])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_recorded_broken_requests_are_4xx_with_a_reason_and_no_traceback(interactor, name):
    reply = interactor.answer(request(name))
    assert 400 <= reply.status < 500
    answer = json.loads(reply.body)
    assert set(answer) == {"error", "detail"}
    assert {"bad_point": "pos_points[0]", "nan_point": "pos_points[0]"}.get(name, "image") in answer["detail"]
    assert "Traceback" not in answer["detail"]
    assert mask_of(interactor, request("point")).any()


def test_c1_no_box_in_any_spelling_is_the_same_mask_and_cache_entry(interactor):
    fields = request("point")
    expected = interactor.answer(fields).body
    encodes = interactor.segmenter.encodes
    without = {key: value for key, value in fields.items() if key != "obj_bbox"}
    for variant in (without, {**fields, "obj_bbox": None}, request("point_null_box"), request("threshold")):
        assert interactor.answer(variant).body == expected
    assert interactor.segmenter.encodes == encodes


def test_c2_missing_and_null_points_are_no_points(interactor):
    box = request("box")
    expected = interactor.answer(box).body
    for missing in ("pos_points", "neg_points"):
        assert interactor.answer({key: value for key, value in box.items() if key != missing}).body == expected
        assert interactor.answer({**box, missing: None}).body == expected


@pytest.mark.parametrize("name", sorted(EMPTY))
def test_c3_without_a_positive_prompt_the_answer_is_empty_and_costs_no_inference(name):
    interactor = Interactor(new_segmenter(), form="shapes")
    assert interactor.answer(request(name)).body == b'{"shapes":[]}'
    assert interactor.segmenter.encodes == 0
    assert ask(Interactor(interactor.segmenter, form="mask"), request(name)) == []


def test_c4_a_point_on_the_far_border_is_the_last_pixel_and_farther_out_is_refused(interactor):
    assert mask_of(interactor, body(pos=[(226, 150)]))[149, 225]
    assert mask_of(interactor, body(pos=[(226.9, 150.9)]))[149, 225]
    assert mask_of(interactor, body(pos=[(-0.9, -0.9)]))[0, 0]
    reply = interactor.answer(body(pos=[(1, 1), (228, 1)]))
    assert reply.status == 400
    assert "pos_points[1] (228, 1)" in json.loads(reply.body)["detail"]
    assert "226 x 150" in json.loads(reply.body)["detail"]


def test_c5_every_form_of_a_box_is_the_same_box(interactor, caplog):
    expected = interactor.answer(request("box")).body
    (x1, y1), (x2, y2) = request("box")["obj_bbox"]
    assert interactor.answer(request("box_reversed")).body == expected
    assert interactor.answer(body(box=[x1, y1, x2, y2])).body == expected
    caplog.clear()
    assert interactor.answer(request("two_boxes")).body == expected
    assert "2 boxes" in caplog.text
    whole = interactor.answer(body(box=[[0, 0], [226, 150]])).body
    assert interactor.answer(body(box=[[-50, -9], [500, 151]])).body == whole
    point = interactor.answer(body(pos=[(112, 61)])).body
    assert interactor.answer(body(pos=[(112, 61)], box=[[300, 1], [400, 9]])).body == point
    assert ask(interactor, body(box=[[5, 5], [5, 90]])) == []


def test_c6_r3_undo_is_exactly_the_mask_before_and_encodes_nothing(interactor):
    answer = lambda pos, neg=(): interactor.answer(body(pos=pos, neg=neg)).body  # noqa: E731
    a, b, c = (112, 61), (88, 96), (150, 60)
    one, two, all_three, without_middle = answer([a]), answer([a, b]), answer([a, b, c]), answer([a, c])
    encodes = interactor.segmenter.encodes
    assert answer([a, b]) == two
    assert answer([a]) == one
    assert answer([a, c]) == without_middle
    assert answer([a, b, c]) == all_three
    assert interactor.segmenter.encodes == encodes


def test_c7_r1_equal_requests_get_equal_masks_whatever_came_before():
    """Cold, warm, after other images, merged clicks, and in the order that a request defines: the core's mask."""
    warm, other = Interactor(new_segmenter()), request("roi_crop")
    clicks = [(112, 61), (88, 96), (150, 60), (120, 100)]
    for n in range(1, 5):
        warm.answer(body(pos=clicks[:n]))
        warm.answer(other)
    merged = Interactor(new_segmenter())
    merged.answer(body(pos=clicks[:1]))
    final = body(pos=clicks, neg=[(10.5, 20.75), (205.125, 18)])
    expected = new_segmenter().segment(
        decode_image(CAT), [*(Click(x, y) for x, y in clicks), Click(10.5, 20.75, False), Click(205.125, 18, False)]
    )
    for interactor in (warm, merged, Interactor(new_segmenter())):
        assert np.array_equal(mask_of(interactor, final), expected.mask)


@pytest.mark.parametrize("region", [(40, 20, 200, 140), (112, 61, 113, 62), (0, 0, 226, 150), (100, 50, 226, 52)])
def test_c8_a_region_of_interest_gets_an_answer_of_its_own_size(interactor, region):
    left, top, right, bottom = region
    crop = io.BytesIO()
    Image.open(io.BytesIO(CAT)).crop(region).save(crop, "PNG")
    reply = interactor.answer(body(crop.getvalue(), pos=[(112.5 - left, 61.5 - top if top <= 61 < bottom else 0.5)]))
    assert reply.status == 200
    moved = cvat_page.move_to_full_image(json.loads(reply.body), region, 226, 150)
    for mask in cvat_page.draws(moved, 226, 150):
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0


def picture(mode="RGB", kind="PNG", size=(31, 17), **options):
    """An encoded image of `size` with a gradient in it."""
    y, x = np.mgrid[: size[1], : size[0]]
    rgba = np.stack([x * 255 // size[0], y * 255 // size[1], (x + y) % 251, 255 - x % 9], axis=2).astype(np.uint8)
    image = Image.fromarray(rgba)
    if mode == "I;16":
        image = Image.fromarray((rgba[:, :, 0].astype(np.uint16) << 8) + 77)
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


KINDS = (
    "jpeg",
    "cmyk",
    "grey",
    "exif",
    "png",
    "rgba",
    "palette",
    "bits",
    "grey-alpha",
    "16bit",
    "webp",
    "bmp",
    "tiff",
    "gif",
    "column",
    "row",
)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (picture(kind="JPEG"), (31, 17)),
        (picture(kind="JPEG", mode="CMYK"), (31, 17)),
        (picture(kind="JPEG", mode="L"), (31, 17)),
        (picture(kind="JPEG", exif=ROTATED), (17, 31)),
        (picture(kind="PNG"), (31, 17)),
        (picture(mode="RGBA"), (31, 17)),
        (picture(mode="P"), (31, 17)),
        (picture(mode="1"), (31, 17)),
        (picture(mode="LA"), (31, 17)),
        (picture(mode="I;16"), (31, 17)),
        (picture(kind="WEBP"), (31, 17)),
        (picture(kind="BMP"), (31, 17)),
        (picture(kind="TIFF"), (31, 17)),
        (picture(kind="GIF"), (31, 17)),
        (picture(size=(1, 40)), (1, 40)),
        (picture(size=(40, 1)), (40, 1)),
    ],
    ids=KINDS,
)
def test_c9_r5_images_of_every_kind_are_answered_in_their_upright_size(interactor, image, size):
    width, height = size
    x, y = width * 0.75, height * 0.75
    reply = interactor.answer(body(image, pos=[(x, y)]))
    assert reply.status == 200, reply.body
    drawn = cvat_page.draws(json.loads(reply.body), width, height)
    assert drawn[0][int(y), int(x)]
    url = {**body(image, pos=[(x, y)])}
    url["image"] = "data:image/png;base64," + url["image"]
    assert interactor.answer(url).body == reply.body


@pytest.mark.parametrize(
    "image",
    [b"", b"GIF89a", CAT[:600], CAT[:-4000], b"%!PS-Adobe-3.0 EPSF-3.0", b"<svg/>", bytes(100)],
    ids=["empty", "head only", "no scan", "half", "postscript", "svg", "zeros"],
)
def test_c9_r28_what_is_no_whole_image_is_a_400(interactor, image):
    reply = interactor.answer(body(image, pos=[(1, 1)]))
    assert reply.status == 400
    assert json.loads(reply.body)["error"] == "image"


def test_c10_r28_an_image_above_the_pixel_limit_is_refused_with_both_numbers():
    torch.manual_seed(0)
    interactor = Interactor(Segmenter(Inter2Former(tiny()), model_size=256, max_pixels=500))
    reply = interactor.answer(body(picture(), pos=[(1, 1)]))
    assert reply.status in (400, 413)
    assert "527" in json.loads(reply.body)["detail"]
    assert "500" in json.loads(reply.body)["detail"]


def test_c11_r4_a_single_click_stays_visible_even_where_the_model_finds_nothing(interactor):
    for point in [(0, 0), (225, 149), (112, 61), (3, 140)]:
        mask = mask_of(interactor, body(pos=[point]))
        assert mask[pixel(point, mask)]
        assert mask.sum() >= 4


def test_c13_the_two_forms_hold_the_same_mask_for_both_page_generations(segmenter):
    fields = request("points")
    full, runs = (Interactor(segmenter, form=form) for form in FORMS)
    (new,), (old,), (shape,) = ask(full, fields), ask(full, fields, page="old"), ask(runs, fields)
    assert np.array_equal(new, old)
    assert np.array_equal(new, shape)
    assert set(json.loads(full.answer(fields).body)) == {"mask"}
    assert len(runs.answer(fields).body) < len(full.answer(fields).body) / 2


def test_c13_large_answers_are_gzipped_for_those_who_accept_it(segmenter):
    interactor = Interactor(segmenter, form="mask")
    fields = body(picture(size=(400, 300)), pos=[(10, 10)])
    plain, packed = interactor.answer(fields), interactor.answer(fields, accepts_gzip=True)
    assert "Content-Encoding" not in plain.headers
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    assert packed.body == interactor.answer(fields, accepts_gzip=True).body  # no clock inside
    small = interactor.answer(body(picture(), pos=[(1, 1)]), accepts_gzip=True)
    assert "Content-Encoding" not in small.headers


def test_c15_r9_people_on_one_image_encode_it_once():
    interactor = Interactor(new_segmenter())
    points = [(20 + 10 * i, 70) for i in range(8)]
    replies = {}

    def click(point):
        replies[point] = interactor.answer(body(pos=[point]))

    threads = [threading.Thread(target=click, args=[point]) for point in points]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert interactor.segmenter.encodes == 1
    alone = Interactor(new_segmenter())
    assert {point: reply.body for point, reply in replies.items()} == {
        point: alone.answer(body(pos=[point])).body for point in points
    }


def made(seed):
    return body(encode_png(make_image(60, 80, seed)), pos=[(30, 20)])


def test_r11_who_clicks_on_a_known_image_waits_for_no_encoding(monkeypatch):
    segmenter = new_segmenter()
    interactor = Interactor(segmenter, form="shapes")
    known, new = made(1), made(2)
    assert interactor.answer(known).status == 200
    begun, may_end, prefetch = threading.Event(), threading.Event(), segmenter.prefetch

    def slow(image):
        begun.set()
        assert may_end.wait(60)
        return prefetch(image)

    monkeypatch.setattr(segmenter, "prefetch", slow)
    with ThreadPoolExecutor(8) as people:
        waiting = [people.submit(interactor.answer, new) for _ in range(4)]
        assert begun.wait(60)
        other = {**new, "pos_points": [[20, 20]]}
        waiting.append(people.submit(interactor.answer, other))
        for x in range(4):
            assert interactor.answer({**known, "pos_points": [[x, 5]]}).status == 200
        assert not any(answer.done() for answer in waiting)
        may_end.set()
        assert [answer.result().status for answer in waiting] == [200] * 5
    assert segmenter.encodes == 2


def test_r10_too_many_new_images_are_refused_and_clicks_are_not(monkeypatch):
    segmenter = new_segmenter()
    interactor = Interactor(segmenter, form="shapes")
    known, *new = (made(seed) for seed in range(MAX_ENCODES + 2))
    assert interactor.answer(known).status == 200
    may_end, prefetch = threading.Event(), segmenter.prefetch
    monkeypatch.setattr(segmenter, "prefetch", lambda image: may_end.wait(60) and prefetch(image))
    with ThreadPoolExecutor(len(new)) as people:
        waiting = [people.submit(interactor.answer, body) for body in new]
        refused, _ = wait(waiting, timeout=60, return_when=FIRST_COMPLETED)
        assert [answer.result().status for answer in refused] == [503]
        assert interactor.answer({**known, "pos_points": [[3, 5]]}).status == 200
        may_end.set()
        assert sorted(answer.result().status for answer in waiting) == [200] * MAX_ENCODES + [503]


def test_a_wrong_point_of_the_first_to_come_is_no_error_of_those_who_wait(monkeypatch):
    segmenter = new_segmenter()
    interactor = Interactor(segmenter, form="shapes")
    asked = made(1)
    begun, may_go, known = threading.Event(), threading.Event(), segmenter.known

    def slow(data):
        begun.set()
        assert may_go.wait(60)
        return known(data)

    monkeypatch.setattr(segmenter, "known", slow)
    with ThreadPoolExecutor(2) as people:
        wrong = people.submit(interactor.answer, {**asked, "pos_points": [[5000, 5]]})
        assert begun.wait(60)
        right = people.submit(interactor.answer, asked)
        while interactor._at_encode.info().hits == 0:
            time.sleep(0.001)
        may_go.set()
        assert (wrong.result().status, right.result().status) == (400, 200)


def test_r2_nobody_gets_the_mask_of_another_image():
    """Threads through nuclio's handler on images of different size, with a cache that holds only some of them."""
    torch.manual_seed(0)
    interactor = Interactor(Segmenter(Inter2Former(tiny()), model_size=256, cache_bytes=2**20), files_bytes=20_000)
    context = context_of(interactor)
    images = [picture(size=(30 + 7 * i, 50 - 5 * i)) for i in range(4)]
    questions = [body(image, pos=[(5 + n, 6)], neg=[(12, 2 + n)]) for image in images for n in range(2)]
    expected = [Interactor(new_segmenter()).answer(question).body.decode() for question in questions]
    wrong = []

    def person(seed):
        for index in np.random.default_rng(seed).permutation(len(questions)):
            if main.handler(context, nuclio_sdk.Event(body=questions[index])).body != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=person, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_of_image_files_is_bounded():
    interactor = Interactor(new_segmenter(), files_bytes=3000)
    for size in range(20, 30):
        assert interactor.answer(body(picture(size=(size, size)))).status == 200
        assert interactor._files.info().nbytes <= 3000
    assert interactor.answer(body(CAT, pos=[(5, 5)])).status == 200  # larger than the budget: served, not kept
    assert interactor._files.info().nbytes <= 3000


# -- nuclio ----------------------------------------------------------------------------------------------------------


def wire(fields, content_type, **others):
    return {
        "body": fields if isinstance(fields, bytes) else json.dumps(fields).encode(),
        "content_type": content_type,
        "trigger": {"kind": "http", "name": "http"},
        "headers": {"Content-Type": content_type, "Accept-Encoding": "gzip, deflate", "X-Nuclio-Path": "/"},
        "fields": {}, "id": "1", "method": "POST", "path": "/", "size": 1, "timestamp": 1700000000, "url": "/",
        "shard_id": 0, "num_shards": 0, "type": "", "type_version": "", "version": "", **others,
    }  # fmt: skip


def as_bytes(value):
    if isinstance(value, dict):
        return {as_bytes(key): as_bytes(item) for key, item in value.items()}
    return value.encode() if isinstance(value, str) else value


def event_of(message, kind):
    if kind == "msgpack_raw":
        message = as_bytes(message)
    return nuclio_sdk.Event.deserialize(message, kind=EventDeserializerKinds[kind])


def encoded(response):
    return nuclio_sdk.Response.from_entrypoint_output(Encoder().encode, response)


@pytest.mark.parametrize("recorded", load("nuclio_sdk.json")["deserialize"][:4], ids=lambda r: r["content_type"])
def test_c14_events_of_every_recorded_kind_are_answered_alike(interactor, recorded):
    kind = recorded["kind"].split(" ")[0]
    fields = request("points")
    event = event_of(wire(fields, recorded["content_type"]), kind)
    assert type(event.body).__name__ == recorded["event.body"]
    output = encoded(main.handler(context_of(interactor), event))
    assert output["status_code"] == 200
    assert output["content_type"] == "application/json"
    assert output["body_encoding"] == "text"
    assert output["body"].encode() == interactor.answer(fields).body


@pytest.mark.parametrize("kind", ["msgpack_raw", "msgpack"])
def test_c14_gzip_through_bytes_headers(segmenter, kind):
    interactor = Interactor(segmenter, form="mask")
    fields = body(picture(size=(400, 300)), pos=[(10, 10)])
    output = encoded(main.handler(context_of(interactor), event_of(wire(fields, "application/json"), kind)))
    assert output["headers"]["Content-Encoding"] == "gzip"
    assert output["body_encoding"] == "base64"
    assert gzip.decompress(base64.b64decode(output["body"])) == interactor.answer(fields).body


def test_c14_a_body_that_is_not_json_is_a_400(interactor, capfd):
    event = event_of(wire(b"not JSON", "application/json"), "msgpack_raw")
    output = encoded(main.handler(context_of(interactor), event))
    assert output["status_code"] == 400
    assert json.loads(output["body"])["error"] == "request"


@pytest.mark.parametrize("kind", ["msgpack_raw", "msgpack"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/health"), ("POST", "/health"), ("HEAD", "/")])
def test_c14_get_and_health_are_answered(interactor, kind, method, path):
    event = event_of(wire(b"", "", method=method, path=path), kind)
    output = encoded(main.handler(context_of(interactor), event))
    assert output["status_code"] == 200
    assert json.loads(output["body"])["status"] == "UP"


def test_init_context_loads_the_configured_weights_once_a_process(tmp_path, monkeypatch):
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, Inter2Former(tiny()))
    monkeypatch.setenv("I2F_CHECKPOINT", str(path))
    monkeypatch.setenv("I2F_CVAT_RESPONSE", "shapes")
    monkeypatch.setattr(main, "_interactor", None)
    monkeypatch.setattr(main, "configure", lambda **_: None)  # the log of the whole process stays as it is
    first, second = nuclio_sdk.Context(), nuclio_sdk.Context()
    main.init_context(first)
    main.init_context(second)
    assert first.user_data.interactor is second.user_data.interactor
    output = encoded(main.handler(first, event_of(wire(request("point"), "application/json"), "msgpack_raw")))
    assert set(json.loads(output["body"])) == {"shapes"}


def test_r43_reply_and_log_carry_the_request_id_and_the_stages(interactor, caplog):
    caplog.set_level("INFO")
    message = wire(request("point"), "application/json")
    message["headers"]["X-Request-Id"] = "abc-123"
    output = encoded(main.handler(context_of(interactor), event_of(message, "msgpack_raw")))
    assert output["headers"]["X-Request-Id"] == "abc-123"
    assert "reply;dur=" in output["headers"]["Server-Timing"]
    assert "1 positive, 0 negative" in caplog.text
    assert "reply" in caplog.text
    anonymous = interactor.answer(request("bad_point"))
    assert len(anonymous.headers["X-Request-Id"]) == 16


def test_r43_metrics_are_a_page_for_prometheus():
    interactor = Interactor(new_segmenter())
    interactor.answer(request("point"))
    interactor.answer(request("bad_point"))
    event = event_of(wire(b"", "", method="GET", path="/metrics"), "msgpack_raw")
    output = encoded(main.handler(context_of(interactor), event))
    assert output["content_type"].startswith("text/plain")
    for line in (
        'inter2former_requests_total{door="cvat",endpoint="click",status="200"} 1.0',
        'inter2former_requests_total{door="cvat",endpoint="click",status="400"} 1.0',
        'inter2former_errors_total{code="prompt",door="cvat"} 1.0',
        "inter2former_encodes_total 1.0",
    ):
        assert line in output["body"]


@pytest.mark.parametrize(("setting", "form"), [("auto", "mask"), ("mask", "mask"), ("shapes", "shapes")])
def test_c13_auto_is_mask_because_no_request_tells_the_version_of_the_page(tmp_path, setting, form):
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, Inter2Former(tiny()))
    interactor = main.create_interactor(Settings(checkpoint=path, cvat_response=setting))
    assert set(json.loads(interactor.answer(request("point")).body)) == {form}


def test_c13_auto_is_shapes_for_a_server_that_reads_them_but_not_for_a_page_that_spells_like_an_old_one(segmenter):
    for reads, name, form in (
        (True, "point", "shapes"),
        (True, "point_null_box", "mask"),
        (False, "point", "mask"),
    ):
        interactor = Interactor(segmenter, form="auto", reads_shapes=lambda reads=reads: reads)
        assert set(json.loads(interactor.answer(request(name)).body)) == {form}


# -- R26: nothing makes a 5xx ------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just([[1, 2]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
KEYS = ["image", "pos_points", "neg_points", "obj_bbox", "threshold", "roi"]
SMALL = picture()


@given(data=st.data(), name=st.sampled_from(REQUESTS), form=st.sampled_from(FORMS))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_r26_recorded_requests_bent_in_any_way_never_make_a_5xx(segmenter, data, name, form):
    fields = request(name) if data.draw(st.booleans()) else body(SMALL, pos=[(3, 3)])
    for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        how = data.draw(st.sampled_from(["drop", "retype", "repeat", "cut", "number"]))
        if how == "drop":
            fields.pop(key, None)
        elif how == "retype":
            fields[key] = data.draw(values)
        elif how == "number":
            fields[key] = [[data.draw(st.floats(-5, 300)), data.draw(st.floats(-5, 300))]]
        elif isinstance(fields.get(key), list | str):
            fields[key] = fields[key] * 2 if how == "repeat" else fields[key][: len(fields[key]) // 2]
    reply = Interactor(segmenter, form=form).answer(fields)
    answer = json.loads(reply.body)
    assert reply.status in (200, 400, 413), answer
    assert set(answer) == ({form} if reply.status == 200 else {"error", "detail"})


@given(junk=st.binary(max_size=60) | st.text(max_size=60))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_r26_any_bytes_as_a_body_or_as_an_image_are_a_4xx(segmenter, junk):
    interactor = Interactor(segmenter)
    assert interactor.answer(junk).status == 400
    image = junk if isinstance(junk, bytes) else junk.encode()
    assert interactor.answer(body(image, pos=[(1, 1)])).status == 400


def test_r8_weights_gone_bad_are_an_error_with_a_code_and_the_next_request_lives():
    torch.manual_seed(0)
    model = Inter2Former(tiny())
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    interactor = Interactor(Segmenter(model, model_size=256))
    for _ in range(2):
        reply = interactor.answer(request("point"))
        assert reply.status == 500
        assert json.loads(reply.body)["error"] == "numeric"
    assert interactor.answer(request("empty")).status == 200
