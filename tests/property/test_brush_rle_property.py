"""The brush run-length code for any mask (R6) and any bytes (R29)."""

from __future__ import annotations

import contextlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from inter2former import brush_rle
from inter2former.errors import PromptError

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40))


@given(MASKS)
def test_r6_decode_undoes_encode(mask: np.ndarray) -> None:
    assert (brush_rle.decode(brush_rle.encode(mask), *mask.shape) == mask).all()


@given(st.integers(1, 60_000), st.integers(0, 60_000), st.integers(0, 60_000))
def test_r6_long_runs(before: int, inside: int, after: int) -> None:
    mask = np.repeat([[False, True, False]], [before, inside, after], axis=1)
    assert (brush_rle.decode(brush_rle.encode(mask), *mask.shape) == mask).all()


@given(MASKS, st.data())
def test_r29_damaged_bytes_give_a_mask_or_an_error_that_says_so(mask: np.ndarray, data: st.DataObject) -> None:
    rle = brush_rle.encode(mask)
    for _ in range(data.draw(st.integers(1, 3))):
        rle[data.draw(st.integers(4, len(rle) - 1))] = data.draw(st.integers(0, 255))
    rle = rle[: data.draw(st.integers(0, len(rle)))]
    with contextlib.suppress(PromptError):
        assert brush_rle.decode(rle, *mask.shape).shape == mask.shape


@given(st.binary(max_size=200), st.integers(1, 50), st.integers(1, 50))
def test_r29_any_bytes_after_a_true_header(tail: bytes, height: int, width: int) -> None:
    head = (4 * height * width).to_bytes(4, "big")
    with contextlib.suppress(PromptError):
        assert brush_rle.decode(head + tail, height, width).shape == (height, width)
