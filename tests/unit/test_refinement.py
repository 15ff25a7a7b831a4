"""Spreading what was found over a larger frame, what the outline network looks at there, and what it adds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inter2former.images import MEAN, OUTSIDE, STD, Frame
from inter2former.nn.outline import BEFORE, CHANNELS, CLICKS, LATEST, LOGITS, SCALE
from inter2former.refinement import SIDE, SURE, Float32, Spread, TokenBox, drawn, look, spread, view


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
    sizes=st.sampled_from([(256, 256), (512, 512), (256, 512), (256, 768), (512, 768), (512, 1024), (256, 1280)]),
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
    end = frame.size // 16
    assert 0 <= left <= x0
    assert 0 <= top <= y0
    assert x1 <= right <= end
    assert y1 <= bottom <= end
    assert found.logits.shape == (16 * (bottom - top), 16 * (right - left))
    truth = np.zeros((frame.size, frame.size), bool)
    truth[16 * y0 : 16 * y1, 16 * x0 : 16 * x1] = larger[0] > 0
    mask = np.zeros(truth.shape, bool)
    mask[16 * top : 16 * bottom, 16 * left : 16 * right] = found.logits > 0
    overlap = (mask & truth).sum() / (mask | truth).sum()
    assert overlap == 1 if sizes[0] == sizes[1] else overlap > 0.9


def test_there_is_room_for_a_larger_object() -> None:
    frame = Frame(512, 512, 512)
    found = spread(np.full((160, 160), 5, np.float32), (11, 11, 21, 21), frame, frame)
    assert found is not None
    assert found.box == (9, 9, 23, 23)  # an eighth of 160 pixels on each side, and whole tokens
    assert found.logits[0, 0] == OUTSIDE


def test_nothing_has_no_outline() -> None:
    coarse, frame = Frame(100, 100, 256), Frame(100, 100, 512)
    assert spread(np.full((32, 16), -1.0, np.float32), (1, 1, 2, 3), coarse, frame) is None


def patterned(rows: int, columns: int) -> np.ndarray:
    picture = np.zeros((rows, columns, 3), np.uint8)
    picture[..., 0] = np.arange(rows)[:, None] % 251
    picture[..., 1] = np.arange(columns) % 241
    return picture


def test_an_object_as_large_as_a_crop_is_seen_pixel_by_pixel() -> None:
    found = Spread(np.linspace(-90, 90, SIDE * 160, dtype=np.float32).reshape(SIDE, 160), (3, 2, 13, 18))
    picture = patterned(300, 400)
    seen = look(view(found, None, picture, [(40, 60, True), (90, 100, False), (900, 900, True)]))
    assert seen.shape == (CHANNELS, SIDE, 160)
    colours = seen[:3].transpose(1, 2, 0) * np.array(STD) + np.array(MEAN)
    assert np.allclose(colours, picture[32 : 32 + SIDE, 48:208], atol=1e-3)
    assert np.allclose(seen[LOGITS] * SCALE, found.logits.clip(-SURE, SURE), atol=1e-5)
    assert np.allclose(
        np.log(seen[LOGITS + 1] / (1 - seen[LOGITS + 1]))[120:140], SCALE * seen[LOGITS][120:140], atol=1e-2
    )
    for channel, at in ((CLICKS, (8, 12)), (CLICKS + 1, (58, 52))):
        assert np.unravel_index(seen[channel].argmax(), seen[channel].shape) == at
        assert seen[channel][at] == 1
    change = np.ones((SIDE, 160), np.float32)
    assert np.array_equal(drawn(view(found, None, picture, []), change).logits, found.logits.clip(-SURE, SURE) + 1)
    assert drawn(view(found, None, picture, []), change).box == found.box


@settings(deadline=None, max_examples=60)
@given(
    box=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 64), st.integers(1, 64)),
    rows=st.integers(1, 1024),
    columns=st.integers(1, 1024),
    side=st.floats(150, 400),
)
def test_whatever_was_found_fits_the_network(box: TokenBox, rows: int, columns: int, side: float) -> None:
    left, top, wide, high = box
    right, bottom = min(left + wide, 64), min(top + high, 64)
    found = Spread(np.full((16 * (bottom - top), 16 * (right - left)), 2, np.float32), (left, top, right, bottom))
    seen = look(view(found, None, patterned(rows, columns), [(16 * top, 16 * left, True)], side))
    h, w = seen.shape[1:]
    assert h % 16 == w % 16 == 0
    assert 16 <= min(h, w) <= max(h, w) <= side + 8
    assert np.isfinite(seen).all()
    assert seen[CLICKS].max() > 0.5
    assert np.array_equal(seen[CLICKS], seen[LATEST])
    changed = drawn(view(found, None, patterned(rows, columns), [], side), np.full((h, w), -3, np.float32))
    assert changed.logits.shape == found.logits.shape
    assert np.allclose(changed.logits, -1)


def test_beyond_the_picture_there_is_nothing_to_be_seen() -> None:
    found = Spread(np.full((64, 64), 1, np.float32), (0, 0, 4, 4))
    seen = look(view(found, None, np.full((40, 30, 3), 255, np.uint8), []))  # twice as large in the crop
    assert seen.shape[1:] == (128, 128)
    assert (seen[:3, :80, :60] > 1).all()
    assert not seen[:3, 80:].any()
    assert not seen[:3, :, 60:].any()


@pytest.mark.parametrize("positive", [True, False])
def test_clicks_on_one_place_do_not_add_up(positive: bool) -> None:
    found = Spread(np.full((64, 64), 1, np.float32), (0, 0, 4, 4))
    once, twice = (look(view(found, None, patterned(64, 64), n * [(30, 31, positive)])) for n in (1, 2))
    assert np.array_equal(once, twice)


@pytest.mark.parametrize("box", [(3, 2, 13, 18), (2, 2, 8, 11), (5, 9, 20, 22), (13, 0, 20, 20)])
def test_what_was_shown_before_is_seen_where_it_was(box: TokenBox) -> None:
    found = Spread(np.full((SIDE, 160), 1, np.float32), (3, 2, 13, 18))
    left, top, right, bottom = (16 * side for side in box)
    frame = np.full((400, 400), OUTSIDE, np.float32)
    frame[top:bottom, left:right] = np.linspace(-3, 20, right - left, dtype=np.float32)
    seen = look(view(found, Spread(frame[top:bottom, left:right], box), patterned(300, 400), []))
    assert np.allclose(seen[BEFORE] * SCALE, frame[32 : 32 + SIDE, 48:208].clip(-SURE, SURE), atol=1e-5)
    assert np.allclose(seen[BEFORE + 1], 1 / (1 + np.exp(-SCALE * seen[BEFORE])), atol=1e-5)
    nothing = look(view(found, None, patterned(300, 400), []))
    assert not nothing[BEFORE : BEFORE + 2].any()
    assert np.array_equal(nothing[:BEFORE], seen[:BEFORE])


def test_the_latest_click_is_told_from_the_others() -> None:
    found = Spread(np.full((64, 64), 1, np.float32), (0, 0, 4, 4))
    clicks = [(10, 11, True), (40, 41, False), (20, 50, True)]
    for n in range(1, 4):
        seen = look(view(found, None, patterned(64, 64), clicks[:n]))
        alone = look(view(found, None, patterned(64, 64), clicks[n - 1 : n]))
        assert np.array_equal(seen[LATEST], alone[LATEST])
        assert np.array_equal(alone[LATEST], alone[CLICKS if clicks[n - 1][2] else CLICKS + 1])
    assert not look(view(found, None, patterned(64, 64), []))[LATEST].any()
