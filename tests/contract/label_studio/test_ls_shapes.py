"""Shapes of calls that the recordings do not have, and all recorded calls at once from many sides."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flask
import numpy as np
import pytest
from flask.testing import FlaskClient
from ls_calls import CONFIG, answer, body, click, one_mask, rectangle
from ls_platform import Platform, mask_of, recorded, request_of

from backends.label_studio import contract

RECORDED = ("06", "07", "08", "09", "10", "11", "12", "13", "14", "17", "18", "51", "52", "53", "54", "55", "56", "57")


def without_size(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("original_width", "original_height")}


def test_turned_rectangles_without_the_size_of_the_image(client: FlaskClient) -> None:
    turned, upright = rectangle(50, 20, 20, 50, 30), rectangle(10, 20, 20, 50)
    wanted = one_mask(client, body(turned))
    assert np.array_equal(one_mask(client, body(without_size(turned))), wanted)
    both = answer(client, body(without_size(turned), upright))
    assert np.array_equal(mask_of(both[0]), wanted)


@pytest.mark.parametrize("sides", [(451.0, 300.0), (None, None), (451.5, 300), (0, 0), (-451, -300), ("451", "300")])
def test_odd_sizes_of_the_image(client: FlaskClient, sides: tuple[Any, Any]) -> None:
    odd = body(click(30, 40, original_width=sides[0], original_height=sides[1]))
    assert np.array_equal(one_mask(client, odd), one_mask(client, body(click(30, 40))))


def test_the_label_may_come_before_the_point(client: FlaskClient) -> None:
    config = CONFIG.replace("BrushLabels", "Brush")
    config = config.replace(
        "<KeyPointLabels", '<Labels name="lab" toName="image"><Label value="Cat"/></Labels><KeyPointLabels'
    )
    label = click(
        50, 50, None, type="labels", from_name="lab", value={"x": 50, "y": 50, "width": 0.2, "labels": ["Cat"]}
    )
    point = click(50, 50, False, type="keypoint", value={"x": 50, "y": 50, "width": 0.2})
    first = {**click(20, 50), "id": "first"}
    (region,) = answer(client, body(first, label, point, config=config))
    assert region["value"]["labels"] == ["Cat"]
    assert np.array_equal(mask_of(region), one_mask(client, body(first, click(50, 50, False))))


def test_what_is_said_about_a_region_is_no_label(client: FlaskClient) -> None:
    said = click(50, 50, None, type="choices", from_name="state", value={"x": 50, "y": 50, "choices": ["Cup"]})
    written = click(50, 50, None, type="textarea", from_name="note", value={"x": 50, "y": 50, "text": ["Cup"]})
    point = click(50, 50, False)
    first = {**click(20, 50), "id": "first"}
    (region,) = answer(client, body(first, said, point, written))
    assert region["value"]["brushlabels"] == ["Cat"]
    assert np.array_equal(mask_of(region), one_mask(client, body(first, point)))


def test_one_control_for_several_image_tags(client: FlaskClient, platform: Platform) -> None:
    config = """<View><Image name="left" value="$a"/><Image name="right" value="$b"/>
    <KeyPointLabels name="kp" toName="left, right"><Label value="Cat"/></KeyPointLabels>
    <BrushLabels name="brush" toName="left,right"><Label value="Cat"/></BrushLabels></View>"""
    images = {"a": "/data/upload/1/a-coffee.jpg", "b": "/data/upload/1/b-chelsea.jpg"}
    (region,) = answer(client, body(click(50, 50, to_name="right"), config=config, image=images))
    assert (region["from_name"], region["to_name"]) == ("brush", "right")
    assert platform.paths == ["/data/upload/1/b-chelsea.jpg"]


def test_of_several_controls_the_one_that_has_the_label(client: FlaskClient) -> None:
    labels = '<Label value="Cat"/><Label value="Cup"/><Label value="Sky"/>'
    config = f"""<View><Image name="image" value="$image"/>
    <KeyPointLabels name="kp" toName="image">{labels}</KeyPointLabels>
    <RectangleLabels name="box" toName="image">{labels}</RectangleLabels>
    <BrushLabels name="animals" toName="image"><Label value="Cat"/></BrushLabels>
    <BrushLabels name="things" toName="image"><Label value="Cup"/></BrushLabels></View>"""

    def answered(label: str) -> tuple[str, Any]:
        entry = click(50, 50, value={"x": 50, "y": 50, "keypointlabels": [label]})
        (region,) = answer(client, body(entry, config=config))
        return region["from_name"], region["value"].get("brushlabels")

    assert answered("Cat") == ("animals", ["Cat"])
    assert answered("cup ") == ("things", ["Cup"])
    assert answered("Sky") == ("animals", None)  # a mask without a label rather than a box
    assert contract.parse_config(config).warnings()  # Sky is nobody's
    fine = config.replace('<Label value="Sky"/>', "")
    assert contract.parse_config(fine).warnings() == ()


@pytest.mark.parametrize(
    ("value", "data", "path"),
    [
        ("/data/upload/1/$name", {"name": "a-chelsea.jpg"}, "/data/upload/1/a-chelsea.jpg"),
        ("$at/$file.name", {"at": "/data/upload/1", "file": {"name": "b-chelsea.jpg"}}, "/data/upload/1/b-chelsea.jpg"),
        ("$my-key", {"my-key": "/data/upload/1/c-chelsea.jpg"}, "/data/upload/1/c-chelsea.jpg"),
        ("/data/upload/1/$nothing", {}, "/data/upload/1/"),
    ],
)  # fmt: skip
def test_addresses_that_are_put_together(
    client: FlaskClient, platform: Platform, value: str, data: dict[str, Any], path: str
) -> None:
    request = body(click(50, 50), config=CONFIG.replace("$image", value), image=data)
    response = client.post("/predict", json=request)
    assert platform.paths == [path]
    assert response.status_code == (502 if "nothing" in value else 200)


def test_points_from_before_a_reload_do_not_join_the_next_object(client: FlaskClient) -> None:
    old, taken_back, last = click(20, 40), click(25, 60, False), click(30, 50)
    (accepted,) = answer(client, body(old, taken_back, last))
    left_over = [{**entry, "is_positive": None} for entry in (old, taken_back)]  # the page has lost their signs
    new = click(70, 60)
    request = body(*left_over, new)
    with_them = one_mask(client, request)
    request["tasks"][0]["drafts"] = [{"result": [accepted, *left_over]}]
    alone = one_mask(client, body(new))
    assert np.array_equal(one_mask(client, request), alone)
    assert not np.array_equal(with_them, alone)
    # A point that made nothing yet counts, and so does a new one at the same place.
    other = {**click(60, 20), "is_positive": None}
    more = {**request, "params": {"context": {"result": [*left_over, other, new]}}}
    assert np.array_equal(one_mask(client, more), one_mask(client, body(other, new)))
    again = {**request, "params": {"context": {"result": [*left_over, {**old, "id": "again"}]}}}
    assert np.array_equal(one_mask(client, again), one_mask(client, body(old)))
    # Another image's mask says nothing about this one's points.
    request["tasks"][0]["drafts"] = [{"result": [{**accepted, "to_name": "other"}]}]
    assert np.array_equal(one_mask(client, request), with_them)


@pytest.mark.parametrize(
    "meta", [None, 7, {"inter2former": 7}, {"inter2former": {"clicks": [1, [], ["a", 1, 1], [None]]}}]
)
def test_the_meta_of_others_is_no_trouble(client: FlaskClient, meta: Any) -> None:
    request = body({**click(20, 40), "is_positive": None}, click(70, 60))
    request["tasks"][0]["drafts"] = [{"result": [{"id": "m", "to_name": "image", "meta": meta}]}]
    assert one_mask(client, request).any()


def test_recorded_calls_at_once_get_what_they_get_one_by_one(make_app: Callable[..., flask.Flask]) -> None:
    calls = []
    for number in RECORDED:
        call = recorded(number)
        earlier = [step["body"] for step in call.get("sequence", [])]
        calls.append([*earlier, request_of(number)])

    def masks(app: flask.Flask, bodies: list[dict[str, Any]]) -> list[list[bytes]]:
        client = app.test_client()
        return [[mask_of(region).tobytes() for region in answer(client, one)] for one in bodies]

    serial = [masks(make_app(), bodies) for bodies in calls]
    together = make_app()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(masks, together, bodies) for bodies in calls * 2]
        assert [future.result(120) for future in futures] == serial * 2
