"""The pure half of the CVAT door: run lengths and answers against recorded vectors, request bodies against every
form that CVAT has sent. No model."""

import base64
import gzip
import json
import pathlib

import cvat_page
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from backends.common.http import RequestError
from backends.cvat_nuclio import contract
from inter2former import errors
from inter2former.prompts import Box, Click

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "cvat"
FUNCTION_FOLDER = pathlib.Path(contract.__file__).parent

masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24))


def load(name):
    return json.loads((FIXTURES / name).read_text())


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", load("rle_vectors.json")["vectors"], ids=lambda v: f"{v['height']}x{v['width']}")
def test_run_lengths_equal_the_recorded_ones_of_cvat(vector):
    mask = np.array(vector["mask"], bool)
    if mask.any():  # of an empty mask CVAT's encoder makes four zeros, which must not be sent
        assert contract.run_lengths(mask) == vector["cvat_sdk_encode_mask"]
    else:
        assert json.loads(contract.answer(mask, "shapes")) == {"shapes": []}


@pytest.mark.parametrize("case", load("responses.json")["cases"], ids=lambda case: case["name"])
def test_the_judge_agrees_with_the_recorded_verdicts(case):
    for page, verdict in (("new", case["new_page"]), ("old", case["old_page"])):
        if "error" in verdict:
            with pytest.raises(cvat_page.Wrong):
                cvat_page.draws(case["answer"], 4, 3, page)
        else:
            drawn = cvat_page.draws(case["answer"], 4, 3, page)
            assert [mask.astype(int).tolist() for mask in drawn] == verdict["shows"]


def test_our_answers_are_among_the_recorded_good_ones():
    cases = {case["name"]: case["answer"] for case in load("responses.json")["cases"]}
    mask = np.array(cases["mask_01"]["mask"], bool)
    assert json.loads(contract.answer(mask, "mask")) == cases["mask_01"]
    assert json.loads(contract.answer(~np.zeros((3, 4), bool), "mask")) == cases["mask_full"]
    assert json.loads(contract.answer(np.zeros((3, 4), bool), "mask")) == cases["mask_empty"]
    assert json.loads(contract.answer(np.zeros((3, 4), bool), "shapes")) == cases["shapes_empty"]
    (shape,) = json.loads(contract.answer(mask, "shapes"))["shapes"]
    assert shape.items() <= cases["shapes"]["shapes"][0].items()


@given(mask=masks)
def test_r6_both_forms_are_read_back_as_the_same_mask(mask):
    for form in ("mask", "shapes"):
        answer = json.loads(contract.answer(mask, form))
        assert set(answer) == {form}
        if form == "mask":
            assert answer["mask"] == mask.astype(int).tolist()
        elif mask.any():
            points = answer["shapes"][0]["points"]
            assert all(type(number) is int for number in points)
            assert np.array_equal(cvat_page.decode_points(points, mask.shape[1], mask.shape[0]), mask)
            left, top, right, bottom = points[-4:]
            inside = mask[top : bottom + 1, left : right + 1]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_c12_confidence_is_not_sent_so_that_no_mask_hides_behind_the_slider():
    (shape,) = json.loads(contract.answer(np.ones((4, 4), bool), "shapes"))["shapes"]
    assert shape == {"type": "mask", "points": [0, 16, 0, 0, 3, 3], "attributes": []}


def test_c13_answers_for_a_photo_of_twelve_megapixels_are_small():
    rows, columns = np.mgrid[:3000, :4000]
    mask = ((rows - 1500) / 1300) ** 2 + ((columns - 2000) / 1700) ** 2 < 1  # 4000 x 3000, one object
    mask ^= (np.hypot(rows - 1500, columns - 2000) < 500) & ((rows // 60 + columns // 60) % 4 == 0)  # with holes
    assert len(contract.answer(mask, "shapes")) <= 64_000
    assert len(gzip.compress(contract.answer(mask, "mask"), 1)) <= 300_000


# -- requests ----------------------------------------------------------------------------------------------------------

IMAGE = base64.b64encode(b"an image").decode()


def request(**fields):
    return contract.parse({"image": IMAGE, **fields})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda body: body,
        json.dumps,
        lambda body: json.dumps(body).encode(),
        lambda body: bytearray(json.dumps(body).encode()),
        lambda body: memoryview(json.dumps(body).encode()),
    ],
    ids=["dict", "str", "bytes", "bytearray", "memoryview"],
)
def test_c14_a_body_of_any_kind_is_the_same_request(wrap):
    body = load("request_points.json")
    assert contract.parse(wrap(body)) == contract.parse(body)
    assert contract.parse(wrap({**body, "threshold": 0.4, "roi": None, "job": 5})) == contract.parse(body)


@pytest.mark.parametrize(
    "text",
    [
        '{"image": "QUJD", "pos_points": [[1, 2]]}',
        '{"pos_points": [[1, 2]],"image"\n:\t"QUJD"}',
        '{"image": "QU\\u004aD", "pos_points": [[1, 2]]}',
        '{"image": "data:image\\/png;base64,QUJD", "pos_points": [[1, 2]]}',
        '{"image": "AAAA", "image": "QUJD", "pos_points": [[1, 2]]}',
        '{"old": {"image": "AAAA"}, "image": "QUJD", "pos_points": [[1, 2]]}',
        '{"a\\"image": "AAAA", "image": "QUJD", "pos_points": [[1, 2]]}',
        '{"note": "\\"image\\": \\"AAAA", "image": "QUJD", "pos_points": [[1, 2]]}',
    ],
)  # fmt: skip
def test_c14_the_image_is_found_in_every_spelling_of_json(text):
    expected = contract.parse({"image": "QUJD", "pos_points": [[1, 2]]})
    found = contract.parse(text.encode())
    assert found == contract.parse(text) == contract.parse(json.loads(text))
    assert (found.image_base64, found.image_digest) == (expected.image_base64, expected.image_digest)


@pytest.mark.parametrize("text", ['{"image": "QUJD', '{"image": "QUJD"', '["image", "QUJD"]', '{"image": "QUJD"]'])
def test_r26_a_broken_body_with_an_image_is_refused(text):
    with pytest.raises(RequestError):
        contract.parse(text.encode())


@pytest.mark.parametrize("box", [{}, {"obj_bbox": None}, {"obj_bbox": []}], ids=["missing", "null", "empty"])
def test_c1_no_box_in_any_spelling_is_the_same_request(box):
    assert request(pos_points=[[1, 2]], **box) == request(pos_points=[[1, 2]])
    assert request(**box).corners is None


@pytest.mark.parametrize("points", [{}, {"pos_points": None, "neg_points": None}], ids=["missing", "null"])
def test_c2_missing_points_are_no_points(points):
    assert request(**points) == request(pos_points=[], neg_points=[])


def test_c4_coordinates_are_clamped_only_at_the_border():
    inside = request(pos_points=[[0, 0], [9, 5], [10, 6], [10.9, -0.5], [9.75, 5.75]])
    clicks, box = contract.prompts(inside, height=6, width=10)
    assert box is None
    assert [click.pixel(6, 10) for click in clicks] == [(0, 0), (5, 9), (5, 9), (0, 9), (5, 9)]
    assert (clicks[4].x, clicks[4].y) == (9.75, 5.75)
    assert request(pos_points=[[1, 2]]) == request(pos_points=[[1.0, 2.0]])


@pytest.mark.parametrize("key", ["pos_points", "neg_points"])
@pytest.mark.parametrize(
    "point",
    [[1], [1, 2, 3], [], "1,2", 5, None, ["1", 2], [None, 2], [True, 2], [float("nan"), 1], [1, float("inf")],
     [10**400, 1], [[1], 2], {"x": 1, "y": 2}],
    ids=repr,
)  # fmt: skip
def test_c4_a_point_that_is_none_is_named(key, point):
    with pytest.raises(errors.PromptError, match=rf"{key}\[1\]"):
        request(**{key: [[1, 2], point]})


@pytest.mark.parametrize("point", [[11.5, 2], [-1.5, 2], [2, 7.5], [2, -9], [1e300, 1]], ids=repr)
def test_c4_a_point_far_outside_is_named_with_the_size(point):
    with pytest.raises(errors.PromptError, match=r"neg_points\[0\].*10 x 6"):
        contract.prompts(request(neg_points=[point]), height=6, width=10)


@pytest.mark.parametrize(
    ("corners", "box"),
    [
        ([[1, 1], [8, 5]], Box(1, 1, 8, 5)),
        ([[8, 5], [1, 1]], Box(1, 1, 8, 5)),
        ([[8, 1], [1, 5]], Box(1, 1, 8, 5)),
        ([1, 1, 8, 5], Box(1, 1, 8, 5)),
        ([[1, 1], [8, 5], [0, 0], [2, 2]], Box(1, 1, 8, 5)),
        ([[1, 1, 8, 5]], Box(1, 1, 8, 5)),
        ([[8, 5, 1, 1], [0, 0, 2, 2]], Box(1, 1, 8, 5)),
        ([[-50, -50], [4, 3]], Box(0, 0, 4, 3)),
        ([[4, 3], [500, 500]], Box(4, 3, 10, 6)),
        ([[4, 3], [4, 3]], None),
        ([[4, 3], [8, 3]], None),
        ([[20, 20], [30, 30]], None),
    ],
    ids=repr,
)
def test_c5_every_form_of_a_box(corners, box):
    found = request(obj_bbox=corners)
    assert contract.prompts(found, height=6, width=10)[1] == box
    assert found.n_boxes == np.size(corners) // 4


@pytest.mark.parametrize(
    "corners",
    [[[1, 1]], [1, 2, 3], "box", 5, {"a": 1}, [[1, 1], [2]], [[1, 1], [None, 2]], [[1, 1], 2], [[]]],
    ids=repr,
)
def test_c5_a_box_that_is_none_is_named(corners):
    with pytest.raises(errors.PromptError, match="obj_bbox"):
        request(obj_bbox=corners)


def test_c7_the_order_of_prompts_is_all_positive_then_all_negative():
    clicks, _ = contract.prompts(request(pos_points=[[5, 1], [2, 2]], neg_points=[[1, 1], [0, 3]]), 6, 10)
    assert clicks == (Click(5, 1), Click(2, 2), Click(1, 1, positive=False), Click(0, 3, positive=False))


def test_c3_what_needs_no_inference():
    assert not contract.wants_mask((), None)
    assert not contract.wants_mask((Click(1, 1, positive=False),), None)
    assert contract.wants_mask((Click(1, 1),), None)
    assert contract.wants_mask((), Box(1, 1, 2, 2))


@pytest.mark.parametrize("image", [None, 5, [], {}, True, "", "data:image/png;base64,"], ids=repr)
def test_c9_a_body_without_an_image_is_refused(image):
    with pytest.raises(errors.ImageError, match="image"):
        contract.parse({"image": image, "pos_points": [[1, 2]]})


@pytest.mark.parametrize("text", ["@@@", "YQ", "é", "\ud800", "http://host/image.jpg", "YW Jj!"], ids=repr)
def test_c9_an_image_that_is_not_base64_is_refused(text):
    with pytest.raises(errors.ImageError, match="base64"):
        contract.image_bytes(contract.parse({"image": text}))


def test_c9_base64_with_line_breaks_or_as_a_data_url_is_accepted():
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    broken = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for variant in (
        text,
        broken,
        broken.replace("\n", "\r\n"),
        "data:image/jpeg;base64," + text,
        "DATA:;base64,\n" + broken,
    ):
        assert contract.image_bytes(contract.parse({"image": variant})) == data
    assert contract.parse({"image": "data:image/png;base64," + text}) == contract.parse({"image": text})


def test_c8_a_crop_is_another_image():
    full, crop = contract.parse(load("request_point.json")), contract.parse(load("request_roi_crop.json"))
    assert full.image_digest != crop.image_digest
    assert full.image_digest == contract.parse(load("request_points.json")).image_digest


def test_c10_r16_a_body_above_the_limit_is_refused_before_parsing(monkeypatch):
    monkeypatch.setattr(contract, "MAX_BODY_BYTES", 100)
    for body in (b"{" * 101, "{" * 101, {"image": "A" * 101}):
        with pytest.raises(contract.TooLargeError, match=r"101.*100"):
            contract.parse(body)


@pytest.mark.parametrize(
    "body",
    [
        None,
        5,
        [],
        "",
        b"",
        b"\xff\xfe",
        "[1, 2]",
        "null",
        "{",
        b'{"image": ',
        "[" * 100_000,
        "9" * 5000,
        '{"a": \ud800}',
    ],
    ids=lambda body: repr(body)[:20],
)
def test_r26_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(RequestError):
        contract.parse(body)


def test_r26_ten_thousand_points_are_refused():
    with pytest.raises(errors.PromptError, match="10000"):
        request(pos_points=[[1, 1]] * 10_000)


def test_messages_never_carry_the_image():
    body = load("request_point.json")
    assert body["image"][:20] not in repr(contract.parse(body))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    body=json_values | st.dictionaries(st.sampled_from(["image", "pos_points", "neg_points", "obj_bbox"]), json_values)
)
@settings(max_examples=150, deadline=None)
def test_r26_any_json_is_a_request_or_a_named_error(body):
    code = ""
    try:
        found = contract.parse(body)
        contract.image_bytes(found)
        contract.prompts(found, 6, 10)
    except errors.Inter2FormerError as error:
        code = error.code
    assert code in {"", "request", "image", "prompt"}


# -- what CVAT's server reads of the function ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["function.yaml", "function-image.yaml"])
def test_the_function_file_says_what_cvat_reads(name):
    config = yaml.safe_load((FUNCTION_FOLDER / name).read_text())
    annotations = config["metadata"]["annotations"]
    recorded = load("dashboard_exchanges.json")["get"]["response"]["body"]["metadata"]["annotations"]
    assert config["metadata"]["name"] == "inter2former"
    assert set(annotations) == set(recorded)
    assert {key: annotations[key] for key in annotations if key != "help_message"} == {
        key: recorded[key] for key in recorded if key != "help_message"
    }
    assert all(isinstance(value, str) for value in annotations.values())
    assert "Start with a bounding box" in annotations["help_message"]  # the switch is on at first
    assert config["spec"]["description"]
    trigger = config["spec"]["triggers"]["http"]
    assert trigger["maxWorkers"] == 1
    assert trigger["attributes"]["maxRequestBodySize"] == contract.MAX_BODY_BYTES


def test_the_two_function_files_differ_in_the_image_alone():
    first, second = (
        yaml.safe_load((FUNCTION_FOLDER / f).read_text()) for f in ("function.yaml", "function-image.yaml")
    )
    for config in (first, second):
        config["spec"].pop("build")
        config["spec"].pop("image", None)
    assert first == second
