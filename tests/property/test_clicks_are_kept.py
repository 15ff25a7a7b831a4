"""R4: the clicked pixel ends on the clicked side, for any image, any T and any clicks."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_image, make_tiny_model

from inter2former import Click, Segmenter
from inter2former.config import tiny


@functools.cache
def segmenter(convention: str) -> Segmenter:
    model = make_tiny_model(dataclasses.replace(tiny(), input_convention=convention))
    return Segmenter(model, cache_bytes=8_000_000)


def check(image: np.ndarray, clicks: list[Click], model_size: int, convention: str) -> None:
    result = segmenter(convention).segment(image, clicks, model_size=model_size)
    assert result.mask.shape == image.shape[:2]
    sides = {(int(click.y), int(click.x)): click.positive for click in clicks}  # the last click on a pixel counts
    assert {pixel: bool(result.mask[pixel]) for pixel in sides} == sides
    logits = result.logits()
    assert ((logits > 0) == result.mask).all()
    assert np.isfinite(logits).all()
    assert 0 <= result.score <= 1


sides = st.integers(1, 40) | st.integers(1, 700)
places = st.sampled_from([0.0, 0.5, 1.0 - 2**-20]) | st.floats(0, 1, exclude_max=True, width=32)
clicks = st.lists(st.tuples(places, places, st.booleans()), min_size=1, max_size=4)


@settings(max_examples=40)
@given(sides, sides, clicks, st.sampled_from([256, 256, 256, 512]), st.sampled_from(["fit", "released"]))
def test_any_image_any_clicks(
    height: int, width: int, told: list[tuple[float, float, bool]], model_size: int, convention: str
) -> None:
    chosen = [Click(x * width, y * height, positive) for x, y, positive in told]
    check(make_image(height, width), chosen, model_size, convention)


@settings(max_examples=20)
@given(
    st.integers(0, 126),
    st.integers(0, 126),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=2, max_size=6),
)
def test_opposite_clicks_in_neighbouring_pixels(left: int, top: int, told: list[tuple[int, int, bool]]) -> None:
    """Closer than a token, closer than a model pixel (T=256 for 384 pixels), on top of each other."""
    image = make_image(384, 384)
    check(image, [Click(3 * left + x, 3 * top + y, positive) for x, y, positive in told], 256, "fit")


@pytest.mark.parametrize("convention", ["fit", "released"])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 2), (2, 1), (1, 4096), (4096, 1), (3, 4000), (1500, 2100), (255, 257), (256, 512)]
)
def test_the_borders_of_extreme_images(height: int, width: int, convention: str) -> None:
    image = make_image(height, width)
    corners = [(x, y) for x in (0, width - 1, width - 0.001) for y in (0, height - 1, height - 0.001)]
    for first_positive in (True, False):
        told = [Click(x, y, (index % 2 == 0) == first_positive) for index, (x, y) in enumerate(corners)]
        check(image, told, 256, convention)
