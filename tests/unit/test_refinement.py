"""Spreading what was found over a larger frame, and where the finer logits decide."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inter2former import refinement
from inter2former.images import OUTSIDE, Frame
from inter2former.reference_mask import from_mask
from inter2former.refinement import MARGIN, REACH, Float32, TokenBox, spread


def disc(frame: Frame, y: float, x: float, radius: float) -> tuple[Float32, TokenBox]:
    """Logits of a disc, in image pixels, inside its tight box of tokens."""
    rows, columns = frame.valid
    steps = frame.height / rows, frame.width / columns
    at_y, at_x = ((np.arange(frame.size) + 0.5) * step for step in steps)
    logits = (radius - np.hypot(at_y[:, None] - y, at_x[None] - x)).astype(np.float32)
    inside = np.argwhere(logits > 0)
    (top, left), (bottom, right) = inside.min(0) // 16, inside.max(0) // 16 + 1
    box = (int(left), int(top), int(right), int(bottom))
    return np.ascontiguousarray(logits[16 * top : 16 * bottom, 16 * left : 16 * right]), box


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(40, 900),
    width=st.integers(40, 900),
    sizes=st.sampled_from([(256, 512), (256, 768), (512, 768), (512, 1024), (256, 1280)]),
    place=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9)),
    share=st.floats(0.15, 0.6),
)
def test_what_was_found_lies_where_it_lay(
    height: int, width: int, sizes: tuple[int, int], place: tuple[float, float], share: float
) -> None:
    coarse, frame = (Frame(height, width, size) for size in sizes)
    radius = max(share * min(height, width), 8 / coarse.scale)
    where = place[0] * height, place[1] * width, radius
    found, larger = spread(*disc(coarse, *where), coarse, frame), disc(frame, *where)
    assert found is not None
    (left, top, right, bottom), (x0, y0, x1, y1) = found.box, larger[1]
    assert left <= x0
    assert top <= y0
    assert right >= min(x1, right)
    assert bottom >= min(y1, bottom)
    assert found.logits.shape == found.near.shape == (16 * (bottom - top), 16 * (right - left))
    truth = np.zeros((frame.size, frame.size), bool)
    truth[16 * y0 : 16 * y1, 16 * x0 : 16 * x1] = larger[0] > 0
    mask = np.zeros(truth.shape, bool)
    mask[16 * top : 16 * bottom, 16 * left : 16 * right] = found.logits > 0
    assert np.array_equal(found.reference(frame.size), from_mask(mask))
    assert (mask & truth).sum() / (mask | truth).sum() > 0.9
    # What differs lies close to the outline, and so does what the finer logits decide.
    step = sizes[1] / sizes[0]
    ring = cv2.morphologyEx(
        np.pad(mask, 1).view(np.uint8), cv2.MORPH_GRADIENT, np.ones((2 * int(step * (REACH + 2)) + 3,) * 2, np.uint8)
    )[1:-1, 1:-1]
    assert (ring[16 * top : 16 * bottom, 16 * left : 16 * right][found.near] > 0).all()


def test_the_finer_logits_decide_near_the_outline_alone() -> None:
    coarse, frame = Frame(100, 100, 256), Frame(100, 100, 512)
    found = spread(*disc(coarse, 50, 50, 20), coarse, frame)
    assert found is not None
    left, _, right, bottom = found.box
    assert 0.05 < found.near.mean() < 0.5
    whole = (0, 0, 32, 32)
    for value in (-7.0, 7.0):
        drawn = found.drawn(np.full((512, 512), value, np.float32), whole)
        assert (drawn[found.near] == value).all()
        assert np.array_equal(drawn[~found.near], found.logits[~found.near])
    part = (left + 1, 0, right + 1, bottom - 1)  # where the network drew nothing it is sure of background
    drawn = found.drawn(np.full((16 * (bottom - 1), 16 * (right - left)), 3.0, np.float32), part)
    assert (drawn[:-16, 16:][found.near[:-16, 16:]] == 3).all()
    assert (drawn[:, :16][found.near[:, :16]] == OUTSIDE).all()
    elsewhere = found.drawn(np.full((16, 16), 3.0, np.float32), (0, 0, 1, 1))
    assert (elsewhere[found.near] == OUTSIDE).all()


def test_nothing_has_no_outline() -> None:
    coarse, frame = Frame(100, 100, 256), Frame(100, 100, 512)
    assert spread(np.full((32, 16), -1.0, np.float32), (1, 1, 2, 3), coarse, frame) is None


@pytest.mark.parametrize(
    ("box", "window"),
    [((10, 8, 12, 9), (6, 4, 16, 13)), ((0, 1, 64, 2), (0, 0, 64, 6)), ((63, 63, 64, 64), (59, 59, 64, 64))],
)
def test_a_window_is_the_box_and_its_surroundings(box: TokenBox, window: TokenBox) -> None:
    assert 1024 // 16 // MARGIN == 4
    nothing = np.zeros((0, 0))
    assert refinement.Spread(nothing.astype(np.float32), nothing.astype(bool), box).window(1024) == window
