"""Inverse pairs of masks.py on random shapes (R6), and readers fed with damaged input (R29)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from inter2former.errors import PromptError
from inter2former.masks import (
    boundary,
    mask_to_png,
    mask_to_polygons,
    png_to_mask,
    polygons_to_mask,
    rle_decode,
    rle_encode,
)

any_masks = arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=24))


@st.composite
def blobs(draw: st.DrawFn) -> np.ndarray:
    """What segmentation gives: smooth regions with holes and specks, [8..120, 8..120]."""
    height, width = draw(st.integers(8, 120)), draw(st.integers(8, 120))
    noise = np.random.default_rng(draw(st.integers(0, 2**32))).random((height, width))
    field = cv2.GaussianBlur(noise, (0, 0), draw(st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0])))
    return np.asarray(field > np.quantile(field, draw(st.floats(0, 1))))


def iou(first: np.ndarray, second: np.ndarray) -> float:
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


@given(any_masks)
def test_r6_rle_is_exact(mask: np.ndarray) -> None:
    rle = rle_encode(mask)
    assert sum(rle["counts"]) == mask.size
    assert min(rle["counts"][1:], default=1) > 0
    np.testing.assert_array_equal(rle_decode(rle), mask)


@given(any_masks)
def test_r6_png_is_exact(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(png_to_mask(mask_to_png(mask)), mask)


@given(any_masks | blobs())
def test_r6_polygons_without_tolerance_are_exact(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(polygons_to_mask(mask_to_polygons(mask, 0), *mask.shape), mask)


@given(any_masks | blobs(), st.floats(0, 20))
def test_r6_polygons_keep_the_stated_iou(mask: np.ndarray, tolerance: float) -> None:
    assert iou(polygons_to_mask(mask_to_polygons(mask, tolerance), *mask.shape), mask) >= 0.85


@given(blobs())
def test_polygons_have_the_area_of_the_mask(mask: np.ndarray) -> None:
    def area(points: np.ndarray) -> float:
        x, y = points.T
        return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2

    polygons = mask_to_polygons(mask, 0)
    assert sum(area(outline) - sum(map(area, holes)) for outline, holes in polygons) == mask.sum()


@given(blobs(), st.integers(1, 12))
def test_the_boundary_is_what_lies_near_the_outside(mask: np.ndarray, width: int) -> None:
    """Against the distance (in eight directions) to the nearest pixel that is not in the mask."""
    padded = np.pad(mask.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_C, 3)[1:-1, 1:-1]
    np.testing.assert_array_equal(boundary(mask, width), mask & (distance <= width))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
sizes = st.integers(-2, 40) | st.integers() | json_values


@given(
    st.fixed_dictionaries(
        {"size": st.lists(sizes, max_size=3) | json_values},
        optional={
            "counts": st.lists(st.integers(-3, 60), max_size=30) | st.text("0123KLMNOPQo", max_size=20) | json_values
        },
    )
    | json_values
)
def test_r29_any_json_is_a_mask_or_a_prompt_error(rle: Any) -> None:
    try:
        mask = rle_decode(rle, max_pixels=10_000)
    except PromptError:
        return
    assert list(mask.shape) == list(rle["size"])
    assert mask.dtype == np.bool_


@given(blobs(), st.data())
def test_r29_a_damaged_rle_is_refused_or_has_its_size(mask: np.ndarray, data: st.DataObject) -> None:
    rle = rle_encode(mask)
    counts = rle["counts"]
    at = data.draw(st.integers(0, len(counts) - 1))
    counts[at] ^= 1 << data.draw(st.integers(0, 40))
    try:
        assert rle_decode(rle).shape == mask.shape
    except PromptError as error:
        assert "COCO mask" in error.message  # noqa: PT017


@given(blobs(), st.data())
def test_r29_a_damaged_png_is_refused_or_is_a_mask(mask: np.ndarray, data: st.DataObject) -> None:
    png = bytearray(mask_to_png(mask))
    for _ in range(data.draw(st.integers(1, 4))):
        png[data.draw(st.integers(0, len(png) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert png_to_mask(bytes(png), max_pixels=100_000).size <= 100_000
    except PromptError as error:
        assert "cannot be read" in error.message  # noqa: PT017


@given(st.lists(st.lists(st.lists(st.floats() | st.integers(), max_size=3), max_size=6) | json_values, max_size=4))
def test_r29_any_polygon_is_filled_or_a_prompt_error(polygons: list[Any]) -> None:
    try:
        mask = polygons_to_mask(polygons, 30, 20)
    except PromptError:
        return
    assert mask.shape == (30, 20)


@given(st.lists(st.tuples(st.floats(-30, 60), st.floats(-30, 60)), min_size=3, max_size=12))
def test_polygons_follow_the_even_odd_rule_at_pixel_centres(polygon: list[tuple[float, float]]) -> None:
    """Against a plain ray to the right of each pixel centre."""
    height, width = 13, 17
    expected = np.zeros((height, width), np.bool_)
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if y0 > y1:
            (x0, y0), (x1, y1) = (x1, y1), (x0, y0)
        for row in range(height):
            if y0 <= row + 0.5 < y1:
                x = x0 + (x1 - x0) / (y1 - y0) * (row + 0.5 - y0)
                expected[row] ^= np.arange(width) + 0.5 >= x
    found = polygons_to_mask([polygon], height, width)
    assert (found ^ expected).sum() <= 1  # a centre exactly on an edge may fall either way by rounding
