"""Correcting a mask that is on the page already, masks of what a task already points at, and what newer pages ask."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask
import numpy as np
import pytest
from flask.testing import FlaskClient
from ls_calls import CONFIG, answer, body, busy, click, one_mask, rectangle, until
from ls_platform import Platform, at, mask_of, photo, recorded, request_of
from PIL import Image

from backends.common.server import Admission
from backends.label_studio import contract
from backends.label_studio.contract.values import _signed_area
from backends.label_studio.polarity import Polarities
from backends.label_studio.service import DROP_SUPERSEDED, Backend
from inter2former import brush_rle
from inter2former.errors import PromptError
from inter2former.masks import polygons_to_mask
from inter2former.prompts import Box, Click
from inter2former.segmenter import Segmenter


def painted(top: int = 100, bottom: int = 200, left: int = 100, right: int = 300) -> np.ndarray:
    mask = np.zeros((300, 451), bool)
    mask[top:bottom, left:right] = True
    return mask


def brush(mask: np.ndarray, region: str = "old", label: str = "Cat", **more: Any) -> dict[str, Any]:
    value = {"format": "rle", "rle": brush_rle.encode(mask), "brushlabels": [label]}
    place = {"id": region, "from_name": "brush", "to_name": "image", "type": "brushlabels"}
    return {**place, "original_width": 451, "original_height": 300, "value": value, **more}


def with_draft(request: dict[str, Any], *regions: dict[str, Any]) -> dict[str, Any]:
    request["tasks"][0]["drafts"] = [{"result": list(regions), "created_at": "2026-01-01"}]
    return request


# -- correcting ------------------------------------------------------------------------------------------------------


def test_a_click_near_a_mask_corrects_it_when_that_is_wanted(make_app: Callable[..., flask.Flask]) -> None:
    client = make_app(correct_within=3).test_client()
    near = click(30, 67.5)  # below the painted box, by some pixels
    (region,) = answer(client, with_draft(body(near), brush(painted())))
    assert region["id"] == "old"  # accepting it replaces the old one
    assert region["meta"]["inter2former"]["started_from"] == "a region"
    assert at(mask_of(region), 30, 67.5)
    # It goes on from the old mask, whatever its second click is near to.
    (again,) = answer(client, with_draft(body(near, click(90, 90)), brush(painted())))
    assert again["id"] == "old"
    # A negative click alone is enough of a correction.
    (less,) = answer(client, with_draft(body(click(30, 67.5, False)), brush(painted())))
    assert less["id"] == "old"
    assert not at(mask_of(less), 30, 67.5)


@pytest.mark.parametrize(
    "region",
    [
        brush(painted(0, 10, 0, 10)),  # far away
        brush(painted(), label="Cup"),
        brush(painted(), to_name="other"),
        brush(painted(), item_index=1),
        brush(painted()) | {"type": "keypointlabels"},
        brush(painted()[:10]),  # of another size
    ],
    ids=["far", "label", "image", "page", "kind", "size"],
)
def test_other_masks_are_left_alone(make_app: Callable[..., flask.Flask], region: dict[str, Any]) -> None:
    client = make_app(correct_within=3).test_client()
    plain = one_mask(client, body(click(30, 67.5)))
    (found,) = answer(client, with_draft(body(click(30, 67.5)), region))
    assert found["id"] != "old"
    assert np.array_equal(mask_of(found), plain)


def test_by_default_a_click_begins_an_object(client: FlaskClient) -> None:
    plain = one_mask(client, body(click(30, 67.5)))
    assert np.array_equal(one_mask(client, with_draft(body(click(30, 67.5)), brush(painted()))), plain)
    assert answer(client, with_draft(body(click(30, 67.5, False)), brush(painted()))) == []


def test_a_submitted_annotation_is_corrected_too_if_it_is_the_only_one(make_app: Callable[..., flask.Flask]) -> None:
    client = make_app(correct_within=3).test_client()
    request = body(click(30, 67.5))
    request["tasks"][0]["annotations"] = [{"result": [brush(painted())]}]
    assert answer(client, request)[0]["id"] == "old"
    request["tasks"][0]["annotations"] *= 2
    assert answer(client, request)[0]["id"] != "old"


def test_masks_of_every_control_are_read() -> None:
    mask = painted()
    rgba = np.zeros((300, 451, 4), np.uint8)
    rgba[mask, 3] = 255
    out = io.BytesIO()
    Image.fromarray(rgba).save(out, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    x0, y0, x1, y1 = (100 * v for v in (100 / 451, 100 / 300, 300 / 451, 200 / 300))
    for value in (
        {"rle": brush_rle.encode(mask)},
        {"imageDataURL": picture},
        {"points": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]},
        {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0},
    ):
        assert np.array_equal(contract.region_mask(value, 300, 451), mask)
    bomb = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (10**6).to_bytes(4, "big") * 2 + b"\x08\6\0\0\0"
    for bad in (
        {},
        {"x": 1},
        {"points": 7, "x": 1, "y": 1},
        {"points": [["a", 1]] * 3},
        {"imageDataURL": "data:image/png;base64,####"},
        {"imageDataURL": "data:image/png;base64," + base64.b64encode(bomb).decode()},
        {"imageDataURL": picture.replace("png", "svg", 1)},
    ):
        with pytest.raises(PromptError):
            contract.region_mask(bad, 300, 451)
    with pytest.raises(PromptError):
        contract.region_mask({"imageDataURL": picture}, 301, 451)


# -- outputs ---------------------------------------------------------------------------------------------------------


def test_a_config_with_boxes_alone_gets_the_box_around_the_mask(client: FlaskClient) -> None:
    mask = one_mask(client, body(click(50, 50)))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    config = "".join(line for line in CONFIG.splitlines() if "Brush" not in line) + "</View>"
    (region,) = answer(client, body(click(50, 50), config=config))
    value = region["value"]
    assert (region["type"], region["from_name"], value["rectanglelabels"]) == ("rectanglelabels", "rect", ["Cat"])
    assert round(value["x"] * 4.51) == columns[0]
    assert round((value["x"] + value["width"]) * 4.51) == columns[-1] + 1
    assert round(value["y"] * 3) == rows[0]
    assert round((value["y"] + value["height"]) * 3) == rows[-1] + 1
    assert "boxes" in contract.parse_config(config).warnings()[0]


def test_outlines_leave_holes_out_and_drop_specks() -> None:
    rows, columns = np.mgrid[:200, :300]
    mask = (rows - 100) ** 2 + (columns - 150) ** 2 < 90**2
    for row, column in ((70, 120), (100, 190), (140, 140)):
        mask &= (rows - row) ** 2 + (columns - column) ** 2 > 15**2
    mask[2, 3] = True
    control = contract.Control("polygonlabels", "p", "image", ("Cat",))
    place = contract.Interaction((), (), (), "image", None, "Cat", 300, 200)
    (region,) = contract.regions(mask, 0.5, control, place)
    outline = np.array(region["value"]["points"]) * (3, 2)
    again = polygons_to_mask([outline], 200, 300)
    assert (again & mask).sum() / (again | mask).sum() > 0.97
    assert len(outline) < 120
    coarse = contract.regions(mask, 0.5, control, place, tolerance=6)[0]["value"]["points"]
    assert len(coarse) < len(outline)
    assert abs(_signed_area(outline)) / 2 == pytest.approx(mask.sum(), rel=0.03)  # holes turn the other way


def test_the_meta_of_a_region_makes_its_mask_again(client: FlaskClient, segmenter: Segmenter) -> None:
    (region,) = answer(client, body(click(50, 50), click(53.3, 50.1, False)))
    said = region["meta"]["inter2former"]
    assert said["model"] == client.get("/health").json["model_version"]
    clicks = [Click(x, y, bool(positive)) for x, y, positive in said["clicks"]]
    again = segmenter.segment(photo("chelsea.jpg"), clicks, model_size=said["model_size"])
    assert np.array_equal(again.mask, mask_of(region))
    (boxed,) = answer(client, body(rectangle(20, 20, 40, 50)))
    box = Box(*boxed["meta"]["inter2former"]["box"])
    assert np.array_equal(segmenter.segment(photo("chelsea.jpg"), box=box).mask, mask_of(boxed))


# -- signs -----------------------------------------------------------------------------------------------------------


def test_e5_polarity_survives_a_restart_when_there_is_a_file(
    make_app: Callable[..., flask.Flask], tmp_path: Path
) -> None:
    call = recorded("12")
    last = call["backend_request"]["body"]
    negative = next(e for e in last["params"]["context"]["result"] if e["id"] == "SIdRutpmgI")["value"]
    first = make_app(memory_file=tmp_path / "signs.sqlite3")
    for earlier in call["sequence"]:
        first.test_client().post("/predict", json=earlier["body"])
    first.extensions["inter2former"].close()
    second = make_app(memory_file=tmp_path / "signs.sqlite3").test_client()
    assert not at(one_mask(second, last), negative["x"], negative["y"])


def test_the_file_of_signs_is_bounded_and_may_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "signs.sqlite3"
    signs = Polarities(file, limit=10)
    keys = [("p", "1", "2", f"r{i}") for i in range(30)]
    for key in keys:
        signs.set(key, False)
    signs.set(keys[-1], True)
    signs.close()
    again = Polarities(file, limit=10)
    assert [again.get(key) for key in keys] == [None] * 20 + [False] * 9 + [True]
    again.close()
    file.write_bytes(b"this is no database, but a text that is long enough to be looked at" * 20)
    broken = Polarities(file)
    broken.set(keys[0], False)
    assert broken.get(keys[0]) is False
    assert "in memory only" in caplog.text
    broken.close()


def test_newer_pages_say_the_sign_in_the_value(client: FlaskClient) -> None:
    def newer(x: float, y: float, positive: bool) -> dict[str, Any]:
        plain = click(x, y, None)
        return {**plain, "value": {**plain["value"], "positive": positive}}

    old = one_mask(client, body(click(50, 50), click(53, 50, False)))
    assert np.array_equal(one_mask(client, body(newer(50, 50, True), newer(53, 50, False))), old)
    assert answer(client, body(newer(50, 50, False))) == []


# -- what newer pages ask --------------------------------------------------------------------------------------------


def event(name: str, **more: Any) -> dict[str, Any]:
    request = body()
    request["params"]["context"] = {"event": name, **more}
    return request


def test_capabilities(client: FlaskClient) -> None:
    (entry,) = answer(client, event("capabilities"))
    assert entry["type"] == "capabilities"
    assert {"tag": "BrushLabels", "output": "mask"} in entry["value"]["targets"]
    assert {"point", "box"} <= set(entry["value"]["prompts"])
    bare = {**event("capabilities"), "tasks": []}
    assert answer(client, bare)[0]["type"] == "capabilities"


def test_prewarm_and_release(client: FlaskClient, segmenter: Segmenter, platform: Platform) -> None:
    (first,) = answer(client, event("prewarm", frame=0, window=10))
    assert (first["type"], first["from_name"], first["to_name"]) == ("prewarm_ack", "brush", "image")
    assert first["value"]["status"] == "ok"
    until(lambda: answer(client, event("prewarm"))[0]["value"]["cached"] == [0])
    assert segmenter.encodes == 1
    assert one_mask(client, body(click(50, 50))).any()
    assert segmenter.encodes == 1
    assert len(platform.paths) == 1
    (gone,) = answer(client, event("release"))
    assert (gone["type"], gone["value"]) == ("release_ack", {"status": "released"})
    assert one_mask(client, body(click(50, 50))).any()
    assert len(platform.paths) == 2
    for unknown in ("track", "", "predict", "nonsense"):
        assert answer(client, event(unknown)) == []


# -- ahead -----------------------------------------------------------------------------------------------------------


def test_e3_a_file_that_was_forgotten_is_fetched_once_more(client: FlaskClient, platform: Platform) -> None:
    one_mask(client, body(click(50, 50)))
    released = {"event": "release"}
    client.post("/predict", json={**body(), "params": {"context": released}})
    for count in range(2, 5):  # the encoding is known all the time
        one_mask(client, body(*[click(10 * i, 50) for i in range(1, count + 1)]))
    assert platform.paths == ["/data/upload/1/a-chelsea.jpg"] * 2


def test_opening_a_task_encodes_it_and_the_next_ones(
    make_app: Callable[..., flask.Flask], platform: Platform, segmenter: Segmenter
) -> None:
    listed = [{"id": 8, "data": {"image": "/data/upload/1/b-coffee.jpg"}}, {"id": 9, "data": {"image": "/data/no"}}]
    platform.answers["/api/tasks"] = (200, {}, flask.json.dumps({"tasks": listed}).encode())
    client = make_app(ahead_tasks=2).test_client()
    assert answer(client, request_of("05")) == []
    until(lambda: segmenter.encodes == 2 and "/data/no" in platform.paths)
    asked = next(path for path in platform.paths if path.startswith("/api/tasks"))
    assert "project=1&page_size=2&" in asked
    assert answer(client, request_of("06"))
    assert segmenter.encodes == 2
    quiet = make_app(ahead_tasks=0).test_client()
    platform.requests.clear()
    answer(quiet, request_of("05"))
    until(lambda: len(platform.requests) == 1)
    assert platform.paths == ["/data/upload/1/7e9f4e0c-chelsea.jpg"]


def test_prewarm_takes_all_images_of_a_task(client: FlaskClient, segmenter: Segmenter, platform: Platform) -> None:
    config = CONFIG.replace('value="$image"', 'valueList="$pages"').replace(
        "<View>", '<View><Image name="other" value="$other"/>'
    )
    pages = ["/data/upload/1/a-coffee.jpg", None, "/data/no", "/data/upload/1/b-chelsea.jpg"]
    task = {"pages": pages, "other": "/data/upload/1/a-coffee.jpg"}
    request = body(config=config, image=task)
    request["params"] = {"context": {"event": "prewarm", "wait": True}}
    response = client.post("/predict", json=request)
    assert response.status_code == 502  # says which failed, after the others
    assert "HTTP 404" in response.json["detail"]
    assert segmenter.encodes == 2
    request["params"]["context"]["wait"] = False
    (said,) = answer(client, request)
    assert (said["value"]["cached"], said["value"]["pending"]) == ([0, 2], [1])
    pages.remove("/data/no")
    request["params"]["context"]["wait"] = True
    (said,) = answer(client, request)
    assert (said["value"]["cached"], said["value"]["pending"]) == ([0, 1], [])
    assert answer(client, body(click(50, 50, item_index=2.0), config=config, image=task))[0]["item_index"] == 2
    assert segmenter.encodes == 2


def test_r11_a_click_on_a_known_image_does_not_wait_for_an_encode(client: FlaskClient) -> None:
    backend: Backend = client.application.extensions["inter2former"]
    one_mask(client, body(click(50, 50)))
    with backend._encodes.turn():
        assert one_mask(client, body(click(50, 50), click(60, 60))).any()


def test_r11_what_is_encoded_ahead_goes_after_what_somebody_waits_for(
    client: FlaskClient, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Backend = client.application.extensions["inter2former"]
    encode, order = segmenter.prefetch, list[int]()
    monkeypatch.setattr(segmenter, "prefetch", lambda image: (order.append(image.info.width), encode(image)))
    opened = body(image="/data/upload/1/a-chelsea.jpg")  # 451 pixels wide
    clicked = body(click(50, 50), image="/data/upload/1/b-coffee.jpg")  # 600
    waiting = threading.Thread(target=lambda: answer(client.application.test_client(), clicked))
    with backend._encodes.turn():
        assert answer(client, opened) == []
        until(lambda: backend._encodes.waiting == 1)
        waiting.start()
        until(lambda: backend._encodes.waiting == 2)
    waiting.join(60)
    until(lambda: len(order) == 2)
    assert order == [600, 451]


def test_superseded_clicks_step_back_and_are_dropped_under_load(
    client: FlaskClient, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Backend = client.application.extensions["inter2former"]
    one_mask(client, body(click(50, 50)))
    found: dict[str, list[dict[str, Any]]] = {}

    def ask(name: str, request: dict[str, Any]) -> threading.Thread:
        def work() -> None:
            found[name] = answer(client.application.test_client(), request)

        thread = threading.Thread(target=work)
        before = backend._admission.waiting
        thread.start()
        until(lambda: backend._admission.waiting == before + 1)
        return thread

    for drop in (False, True):
        found.clear()
        with busy(backend):
            threads = [
                ask("old", body(click(50, 50), click(70, 20, drop))),
                ask("new", body(click(50, 50), click(70, 20, drop), click(20, 80))),
            ]
            if drop:  # as if many others waited too
                monkeypatch.setattr(Admission, "waiting", DROP_SUPERSEDED)
        for thread in threads:
            thread.join(60)
        assert found["new"]
        assert bool(found["old"]) is not drop


def test_r43_clicks_an_object_and_undone_ones_are_counted(client: FlaskClient) -> None:
    for context in ([click(50, 50)], [click(50, 50), click(60, 60)], [click(50, 50)], [click(20, 20)]):
        answer(client, body(*context))
    text = client.get("/metrics").text
    for what, count in (("objects", 2), ("prompts", 4), ("undone", 1)):
        assert f'inter2former_annotation_total{{door="label_studio",what="{what}"}} {count}.0' in text


# -- many tasks ------------------------------------------------------------------------------------------------------


def test_a_batch_gets_masks_of_what_its_tasks_point_at(
    make_app: Callable[..., flask.Flask], client: FlaskClient
) -> None:
    box, point = rectangle(20, 20, 40, 50), click(70, 60, None, id="p")
    polygon = {
        **click(0, 0, None, id="poly", type="polygonlabels", from_name="poly"),
        "value": {"points": [[20, 20], [60, 20], [60, 70]], "polygonlabels": ["Cat"]},
    }
    request = body()
    task = request["tasks"][0]
    request["tasks"] = [
        {**task, "predictions": [{"model_version": "other", "result": [box, click(40, 45, False, id="n"), point]}]},
        {**task, "id": 8},
        {**task, "id": 9, "annotations": [{"result": [polygon]}], "predictions": [{"result": [box]}]},
        {**task, "id": 10, "data": {"image": "/data/none"}, "annotations": [{"result": [box]}]},
    ]
    request["params"] = {"context": None}
    batch = make_app(batch="prompts").test_client()
    results = batch.post("/predict", json=request).json["results"]
    assert [len(result["result"]) for result in results] == [2, 0, 1, 0]
    first, second = results[0]["result"]
    assert np.array_equal(mask_of(first), one_mask(client, body(box, click(40, 45, False))))
    assert np.array_equal(mask_of(second), one_mask(client, body(click(70, 60), click(40, 45, False))))
    assert (first["type"], first["value"]["brushlabels"]) == ("brushlabels", ["Cat"])
    version = batch.get("/health").json["model_version"]
    request["tasks"] = [{**task, "predictions": [{"model_version": version, "result": [box]}]}]
    assert answer(batch, request) == []  # our own
