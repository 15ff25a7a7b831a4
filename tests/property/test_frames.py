"""Between image and model frame on random sizes: clicks are kept (R4), frames agree (R5), shortcuts are exact."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from inter2former.images import Frame, choose_size, image_key
from inter2former.prompts import Box

CLICK_RADIUS = 5  # model pixels, as the reference mask paints them

sides = st.integers(1, 40) | st.integers(1, 700) | st.sampled_from([255, 256, 257, 1023, 1025])
frames = st.builds(
    Frame, sides, sides, st.sampled_from([256, 512, 768]), st.sampled_from(["fit", "released"])
)  # fmt: skip


def field(size: int, seed: int) -> torch.Tensor:
    """Smooth logits with a few zero crossings, float32 [size, size]."""
    coarse = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return smooth[0, 0].contiguous()


@st.composite
def points(draw: st.DrawFn, frame: Frame) -> tuple[float, float]:
    """Anywhere in the image, its last row and column and the seams between model pixels more often."""

    def along(n: int) -> float:
        anywhere = st.floats(0, n, exclude_max=True)
        pixel = st.sampled_from([0, n - 1]) | st.integers(0, n - 1)
        seam = st.integers(0, int(n * frame.scale)).map(lambda k: min(k / frame.scale, math.nextafter(n, 0)))
        return float(draw(anywhere | pixel | seam))

    return along(frame.width), along(frame.height)


@given(frames, st.data())
def test_r4_a_click_painted_in_the_model_frame_covers_the_clicked_pixel(frame: Frame, data: st.DataObject) -> None:
    """As long as the disc is wider than an image pixel; beyond (icons), the segmenter sets the pixel itself."""
    assume(frame.scale <= 5)
    x, y = data.draw(points(frame))
    row, column = frame.model_pixel(x, y)
    at_row, at_column = np.ogrid[: frame.size, : frame.size]
    disc = (at_row - row) ** 2 + (at_column - column) ** 2 <= CLICK_RADIUS**2
    logits = torch.from_numpy(np.where(disc, 8.0, -8.0).astype(np.float32))
    assert frame.mask_from_logits(logits)[int(y), int(x)]
    assert not frame.mask_from_logits(-logits)[int(y), int(x)]


@given(frames, st.data())
def test_r5_a_point_and_its_model_pixel_are_the_same_place(frame: Frame, data: st.DataObject) -> None:
    x, y = data.draw(points(frame))
    row, column = frame.model_pixel(x, y)
    rows, columns = frame.valid
    assert 0 <= row < rows <= frame.size
    assert 0 <= column < columns <= frame.size
    # Rounding the shorter side of "fit" to whole model pixels moves a point by at most half of one.
    assert abs(row + 0.5 - y * frame.scale) <= 1.0 + 1e-6
    assert abs(column + 0.5 - x * frame.scale) <= 1.0 + 1e-6


@given(frames, st.data())
def test_r5_a_box_covers_the_model_pixels_of_its_corners(frame: Frame, data: st.DataObject) -> None:
    (x0, y0), (x1, y1) = data.draw(points(frame)), data.draw(points(frame))
    box = Box(min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1)
    left, top, right, bottom = frame.box_to_model(box)
    assert 0 <= left < right <= frame.valid[1]
    assert 0 <= top < bottom <= frame.valid[0]
    assert (top, left) == frame.model_pixel(box.x0, box.y0)


@given(frames, st.integers(0, 2**31), st.floats(-1, 1))
def test_the_shortcut_mask_is_the_sign_of_the_resized_logits(frame: Frame, seed: int, shift: float) -> None:
    logits = field(frame.size, seed) + shift
    expected = (frame.logits_to_image(logits) > 0).numpy()
    np.testing.assert_array_equal(frame.mask_from_logits(logits), expected)


@given(frames, st.integers(0, 2**31))
def test_the_shortcut_mask_holds_for_noise(frame: Frame, seed: int) -> None:
    logits = torch.randn(frame.size, frame.size, generator=torch.Generator().manual_seed(seed))
    expected = (frame.logits_to_image(logits) > 0).numpy()
    np.testing.assert_array_equal(frame.mask_from_logits(logits), expected)


@given(frames, st.integers(0, 2**31), st.data())
@example(Frame(1, 1, 256, "released"), 0, None)
def test_the_mask_inside_a_token_box_is_the_whole_mask(frame: Frame, seed: int, data: st.DataObject | None) -> None:
    n = frame.size // 16
    left, top, right, bottom = 0, 0, n, n
    if data is not None:
        left, right = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
        top, bottom = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    logits = torch.full((frame.size, frame.size), -100.0)
    part = np.s_[16 * top : 16 * bottom, 16 * left : 16 * right]
    logits[part] = field(frame.size, seed)[part] * 60 + 40  # mostly positive up to the box, where it drops to -100
    whole = frame.mask_from_logits(logits)
    box = (left, top, right, bottom)
    np.testing.assert_array_equal(frame.mask_from_logits(logits[part], box), whole)
    np.testing.assert_array_equal((frame.logits_to_image(logits) > 0).numpy(), whole)


@given(frames, st.data())
def test_r5_a_rectangle_keeps_its_place_on_the_way_to_the_model(frame: Frame, data: st.DataObject) -> None:
    x0, x1 = sorted(data.draw(st.tuples(*[st.integers(0, frame.width)] * 2)))
    y0, y1 = sorted(data.draw(st.tuples(*[st.integers(0, frame.height)] * 2)))
    mask = np.zeros((frame.height, frame.width), np.bool_)
    mask[y0:y1, x0:x1] = True
    there = frame.mask_to_model(mask)
    assert there.any() == mask.any()
    assert not there[frame.valid[0] :].any()
    assert not there[:, frame.valid[1] :].any()
    rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    if rows.size:
        for found, edge in [(rows[0], y0), (rows[-1] + 1, y1), (columns[0], x0), (columns[-1] + 1, x1)]:
            assert abs(found - edge * frame.scale) <= 1.5


@given(sides, sides, st.sampled_from(["fit", "released"]), st.integers(0, 2**31))
def test_preparing_is_a_function_of_the_pixels(height: int, width: int, convention: str, seed: int) -> None:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    frame = Frame(height, width, 256, convention)  # type: ignore[arg-type]
    first, second = frame.prepare(rgb), frame.prepare(np.asfortranarray(rgb))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert first.abs().max() < 3
    assert image_key(rgb) == image_key(np.asfortranarray(rgb))


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.sets(st.sampled_from([256, 512, 768, 1024]), min_size=1))
def test_auto_size_is_one_of_the_sizes_and_enough_if_any_is(height: int, width: int, sizes: set[int]) -> None:
    size = choose_size(height, width, tuple(sizes))
    longer = max(height, width)
    assert size in sizes
    assert size >= longer or size == max(sizes)
    assert not any(longer <= other < size for other in sizes)
