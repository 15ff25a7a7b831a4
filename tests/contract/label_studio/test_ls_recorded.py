"""Every recorded call of Label Studio 1.23.2, answered (R44): the shape of the answer, its place, its clicks."""

from __future__ import annotations

import numpy as np
import pytest
from flask.testing import FlaskClient
from ls_platform import FIXTURES, Platform, at, decode_rle, mask_of, recorded, request_of

CLICKS = ["06", "07", "08", "10", "11", "12", "13", "17", "57"]
RECTANGLES = ["09", "18", "55", "56"]
STROKES = ["51", "52", "53", "54"]
EMPTY = ["04", "05", "14", "15", "16"]
OTHERS = ["01", "02", "03", "20", "21", "22", "23", "24", "25", "26", "27"]


def test_every_recorded_call_is_in_a_list_here() -> None:
    numbers = sorted(path.name[:2] for path in FIXTURES.glob("*.json"))
    assert numbers == sorted(CLICKS + RECTANGLES + STROKES + EMPTY + OTHERS)


@pytest.mark.parametrize("number", CLICKS + RECTANGLES + STROKES)
def test_a_click_is_answered_as_the_platform_wants_it(client: FlaskClient, number: str) -> None:
    body = request_of(number)
    response = client.post("/predict", json=body)
    assert response.status_code == 200
    (result,) = response.json["results"]
    recorded_result = recorded(number)["backend_response"]["body"]["results"][0]
    assert set(recorded_result) == set(result)
    assert 0 <= result["score"] <= 1
    last = body["params"]["context"]["result"][-1]
    assert result["result"]
    for region in result["result"]:
        expected = recorded_result["result"][0]
        assert set(region) == set(expected) - {"readonly"} | {"meta"}
        for key in ("from_name", "to_name", "type", "original_width", "original_height", "image_rotation"):
            assert region[key] == expected[key]
        assert region["value"]["format"] == "rle"
        assert region["value"]["brushlabels"] == expected["value"]["brushlabels"]
        assert (region["original_width"], region["original_height"]) == (
            last["original_width"],
            last["original_height"],
        )
        assert isinstance(region["id"], str)
        assert region["id"]
        assert mask_of(region).any()
    assert len({region["id"] for region in result["result"]}) == len(result["result"])


@pytest.mark.parametrize("number", [n for n in CLICKS if n not in ("11", "12")])
def test_clicks_are_on_their_side(client: FlaskClient, number: str) -> None:
    body = request_of(number)
    (region,) = client.post("/predict", json=body).json["results"][0]["result"]
    mask = mask_of(region)
    for entry in body["params"]["context"]["result"]:
        assert at(mask, entry["value"]["x"], entry["value"]["y"]) == entry["is_positive"]


@pytest.mark.parametrize("number", STROKES)
def test_e22_a_stroke_is_covered_by_the_answer(client: FlaskClient, number: str) -> None:
    body = request_of(number)
    (region,) = client.post("/predict", json=body).json["results"][0]["result"]
    mask = mask_of(region)
    for entry in body["params"]["context"]["result"]:
        painted = decode_rle(entry["value"]["rle"], *mask.shape) > 0
        assert painted.any()
        assert not (painted & ~mask).any()


@pytest.mark.parametrize("number", EMPTY)
def test_nothing_to_say_is_an_empty_result_for_every_task(client: FlaskClient, platform: Platform, number: str) -> None:
    body = request_of(number)
    results = client.post("/predict", json=body).json["results"]
    assert len(results) == len(body["tasks"])
    assert all(result["result"] == [] and result["score"] == 0 for result in results)
    if len(body["tasks"]) > 1:
        assert platform.requests == []


@pytest.mark.parametrize("number", OTHERS)
def test_other_calls(client: FlaskClient, number: str) -> None:
    call = recorded(number)["backend_request"]
    response = client.open(call["path"], method=call["method"], json=call["body"])
    if number == "27":
        assert response.status_code == 410  # no such job
        return
    assert response.status_code in (200, 201)
    expected = recorded(number)["backend_response"]["body"]
    assert set(expected) - {"job"} <= set(response.json)
    if number == "20":
        assert response.status_code == 201
    if number in ("02", "03"):
        assert isinstance(response.json["model_version"], str)
        assert response.json["model_version"]
    if number == "26":
        assert response.json["versions"] == [client.get("/health").json["model_version"]]


def test_answers_repeat_bit_for_bit(client: FlaskClient) -> None:
    first, second = (client.post("/predict", json=request_of("08")).json["results"][0]["result"][0] for _ in "ab")
    assert np.array_equal(mask_of(first), mask_of(second))
    assert first["id"] != second["id"]  # the page may still show the first one
