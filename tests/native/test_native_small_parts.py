"""Islands and holes in the native module against their twin (R31), and what it refuses (R33)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inter2former import _native, small_parts
from inter2former.runtime import native


def flip_with_both(
    logits: small_parts.Float32, spoken: small_parts.Mask, share: float, inside: bool
) -> small_parts.Float32 | None:
    """The native answer, after it was found to equal the twin's; what was given has not changed."""
    before = logits.copy()
    want = small_parts.flip(logits, spoken, share, inside=inside)
    got = native.flip_small_parts(logits, spoken, share, inside=inside)
    assert np.array_equal(logits, before)
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
    return got


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    grain=st.sampled_from([0.0, 0.6, 1.0, 2.0, 4.0]),
    level=st.sampled_from([-1.0, -0.3, 0.0, 0.3, 1.0]),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0, 2.0]),
    said=st.sampled_from([0.0, 0.002, 0.05]),
    inside=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(shape=(1, 1), grain=0.0, level=1.0, share=2.0, said=0.0, inside=True, seed=0)
def test_r31_small_parts_equal_those_of_the_twin(
    shape: tuple[int, int], grain: float, level: float, share: float, said: float, inside: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape).astype(np.float32)
    if grain:
        logits = np.asarray(cv2.GaussianBlur(logits, (0, 0), grain)).reshape(shape)
        logits /= max(float(logits.std()), 1e-6)
    logits += np.float32(level)
    logits[rng.random(shape) < 0.02] = 0  # of neither sign: outside
    spoken = rng.random((shape[0], shape[1] + 5)) < said
    flip_with_both(logits, spoken[:, 3:-2], share, inside)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_one_side_alone_has_no_small_parts(level: float, inside: bool) -> None:
    logits = np.full((40, 60), level, np.float32)
    assert flip_with_both(logits, np.zeros((40, 60), bool), 1.0, inside) is None


def test_parts_that_wind_are_one() -> None:
    """A spiral, whose runs meet late; a chain of corners is an island, but as a hole it is many."""
    spiral = np.full((41, 41), -1.0, np.float32)
    for ring in range(0, 20, 2):
        spiral[ring, ring : 41 - ring] = spiral[40 - ring, ring : 41 - ring] = 1.0
        spiral[ring : 41 - ring, ring] = spiral[ring : 41 - ring, 40 - ring] = 1.0
        spiral[ring + 1, ring] = -1.0
        spiral[ring + 2, ring + 1] = 1.0
    quiet = np.zeros(spiral.shape, bool)
    assert flip_with_both(spiral, quiet, 1.0, True) is None
    stairs = -np.ones((40, 40), np.float32)
    stairs[np.arange(5, 35), np.arange(5, 35)] = 1.0
    assert flip_with_both(stairs, quiet[:40, :40], 1.0, True) is None
    filled = flip_with_both(-stairs, quiet[:40, :40], 0.01, False)
    assert filled is not None
    assert (filled > 0).all()


def test_r31_many_parts_at_once() -> None:
    """A board of 131072 islands, or of as many holes."""
    logits = np.where(np.indices((512, 512)).sum(0) % 2, np.float32(3.0), np.float32(-2.0))
    spoken = np.zeros(logits.shape, bool)
    assert flip_with_both(logits, spoken, 1.0, True) is None  # one, by its corners
    filled = flip_with_both(logits, spoken, 1.0, False)
    assert filled is not None
    assert (filled[1:-1, 1:-1] > 0).all()


GOOD: dict[str, Any] = {
    "logits": np.zeros((4, 6), np.float32),
    "spoken": np.zeros((4, 6), bool),
    "share": 0.1,
    "inside": True,
    "least": 0.01,
}


@pytest.mark.parametrize(
    "bad",
    [
        {"logits": np.zeros((4, 6, 1), np.float32)},
        {"logits": np.zeros((4, 12), np.float32)[:, ::2]},
        {"logits": np.zeros((6, 4), np.float32)},
        {"spoken": np.zeros((4, 12), bool)[:, ::2]},
        {"share": -0.1},
        {"share": float("nan")},
        {"least": 0.0},
        {"least": float("nan")},
    ],
)
def test_r33_what_does_not_fit_is_refused(bad: dict[str, Any]) -> None:
    assert _native.flip_small_parts(**GOOD) is None
    with pytest.raises(ValueError, match=r"must|range"):
        _native.flip_small_parts(**{**GOOD, **bad})


@pytest.mark.parametrize("bad", [{"logits": np.zeros((4, 6))}, {"spoken": np.zeros((4, 6), np.uint8)}])
def test_r33_wrong_types_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        _native.flip_small_parts(**{**GOOD, **bad})
