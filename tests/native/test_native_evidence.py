"""What the native module says of masks against the twins score.py and level.py (R31), and what it refuses (R33)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inter2former import _native, level, score
from inter2former.runtime import native

Clicks = list[tuple[int, int, bool]]


def blobs(shape: tuple[int, int], grain: float, rng: np.random.Generator) -> score.Float32:
    noise = rng.normal(size=shape).astype(np.float32)
    if grain:
        noise = np.asarray(cv2.GaussianBlur(noise, (0, 0), grain)).reshape(shape)
    return np.asarray(noise / max(float(noise.std()), 1e-6), np.float32)


def some_clicks(count: int, shape: tuple[int, int], rng: np.random.Generator) -> Clicks:
    return [(int(rng.integers(shape[0])), int(rng.integers(shape[1])), bool(rng.integers(2))) for _ in range(count)]


def assert_alike(got: tuple[float, ...] | None, want: tuple[float, ...] | None) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    grain=st.sampled_from([0.0, 1.0, 3.0]),
    size=st.sampled_from([0.5, 2.0, 40.0]),
    count=st.integers(0, 5),
    corrected=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(shape=(1, 1), grain=0.0, size=2.0, count=1, corrected=True, seed=0)
def test_r31_masks_are_described_as_by_the_twins(
    shape: tuple[int, int], grain: float, size: float, count: int, corrected: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = blobs(shape, grain, rng) * np.float32(size) - np.float32(rng.uniform(-1, 1))
    logits[rng.random(shape) < 0.02] = -100
    clicks = some_clicks(count, shape, rng)
    previous = blobs(shape, grain, rng) > 0.3 if corrected else None
    links = rng.random((4, level.CELLS**2), np.float32)
    assert_alike(native.evidence(logits, clicks, previous), score.evidence(logits, clicks, previous))
    got, want = (f(logits, links, clicks, previous) for f in (native.describe, level.describe))
    for here, there in zip(got, want, strict=True):
        assert_alike(here, there)


def test_r31_large_maps_and_parts_of_arrays() -> None:
    rng = np.random.default_rng(0)
    whole = blobs((140, 150), 4.0, rng)
    logits, previous = whole[3:131, 5:133], whole[4:132, 2:130] > 0.2
    clicks = some_clicks(3, logits.shape, rng)
    assert_alike(native.evidence(logits, clicks, previous), score.evidence(logits, clicks, previous))


GOOD: dict[str, Any] = {
    "logits": np.ones((20, 30), np.float32),
    "clicks": np.asarray([[3, 4, 1]], np.int64),
    "previous": np.zeros((20, 30), np.bool_),
    "levels": (-0.5, 0.0, 0.5),
    "links": np.ones((4, level.CELLS**2), np.float32),
}


@pytest.mark.parametrize(
    "bad",
    [
        {"logits": np.ones((0, 30), np.float32)},
        {"logits": np.ones((20, 65), np.float32)},
        {"logits": np.ones((1025, 2), np.float32), "links": None},
        {"logits": np.ones((20, 60), np.float32)[:, ::2]},
        {"clicks": np.asarray([[20, 4, 1]], np.int64)},
        {"clicks": np.asarray([[3, -1, 1]], np.int64)},
        {"clicks": np.zeros((1, 2), np.int64)},
        {"previous": np.zeros((30, 20), np.bool_)},
        {"levels": ()},
        {"levels": (0.0, 0.0)},
        {"levels": (0.0, float("nan"))},
        {"levels": tuple(range(9))},
        {"links": np.ones((4, 16), np.float32)},
    ],
)
def test_r33_what_does_not_fit_is_refused(bad: dict[str, Any]) -> None:
    numbers, found = _native.describe(**GOOD)
    assert numbers.shape == (3, len(level.FEATURES) - 1)
    assert found.all()
    with pytest.raises(ValueError, match="must"):
        _native.describe(**{**GOOD, **bad})


@pytest.mark.parametrize(
    "bad",
    [{"logits": np.ones((20, 30))}, {"clicks": [(1, 2, True)]}, {"previous": np.zeros((20, 30))}, {"links": [1.0]}],
)
def test_r33_wrong_types_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        _native.describe(**{**GOOD, **bad})
