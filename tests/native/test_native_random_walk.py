"""The native random walk against its twin (R31), and what it refuses (R33)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inter2former import _native, random_walk
from inter2former.runtime import native


def smooth(shape: tuple[int, int], scale: float, rng: np.random.Generator) -> random_walk.Float32:
    noise = rng.normal(size=shape).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 5)) * np.float32(scale)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_r31_the_walk_equals_its_twin(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([256, 512, 768]), "size")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), "seed"))
    height, width = (data.draw(st.integers(1, size), name) for name in ("height", "width"))
    image = torch.from_numpy(np.stack([smooth((height, width), 10, rng) for _ in range(3)]))
    free = random_walk.links(image, size)
    n = size // 16
    left, top = data.draw(st.integers(0, n - 1), "left"), data.draw(st.integers(0, n - 1), "top")
    box = (left, top, data.draw(st.integers(left + 1, n), "right"), data.draw(st.integers(top + 1, n), "bottom"))
    scale = data.draw(st.sampled_from([0.0, 20.0, 1000.0]), "scale")
    inside = smooth((16 * (box[3] - top), 16 * (box[2] - left)), scale, rng)
    reference = rng.integers(1, 4, (size, size), np.uint8)
    for _ in range(data.draw(st.integers(0, 5), "clicks")):
        y, x = rng.integers(0, size - 9, 2)
        reference[y : y + 9, x : x + 9] = rng.choice([0, 4])
    first = data.draw(st.sampled_from([1e-3, 0.005, 0.3, 9.0]), "trust")
    want = random_walk.walk(free, inside, box, reference, first)
    got = native.walk(free, inside, box, reference, first)
    assert got.dtype == want.dtype
    assert np.abs(got - want).max() < 2e-2  # logits of chances near 0 and 1 are a hundred times as far apart as they
    assert ((got > 0) != (want > 0)).mean() < 1e-3


GOOD: dict[str, Any] = {
    "links": np.ones((4, random_walk.CELLS**2), np.float32),
    "inside": np.zeros((32, 16), np.float32),
    "box": (1, 1, 2, 3),
    "state": np.ones((256, 256), np.uint8),
    "trust": 0.1,
    "softness": 3.0,
    "sure": 12.0,
    "nearly": 0.01,
    "iterations": 3,
}


@pytest.mark.parametrize(
    "bad",
    [
        {"links": np.ones((3, random_walk.CELLS**2), np.float32)},
        {"links": np.ones((4, 16), np.float32)},
        {"inside": np.zeros((16, 32), np.float32)},
        {"box": (1, 1, 1, 3)},
        {"box": (-1, 1, 0, 3)},
        {"box": (15, 1, 17, 3)},
        {"state": np.ones((256, 320), np.uint8)},
        {"state": np.ones((240, 240), np.uint8)},
        {"state": np.ones((0, 0), np.uint8)},
        {"trust": 0.0},
        {"trust": float("nan")},
        {"softness": 0.5},
        {"sure": -1.0},
        {"nearly": 0.5},
        {"iterations": -1},
    ],
)
def test_r33_what_does_not_fit_is_refused(bad: dict[str, Any]) -> None:
    assert _native.random_walk(**GOOD).shape == (32, 16)
    with pytest.raises(ValueError, match=r"must|range"):
        _native.random_walk(**{**GOOD, **bad})


@pytest.mark.parametrize(
    "bad",
    [{"links": np.ones((4, random_walk.CELLS**2))}, {"inside": [[0.0]]}, {"state": np.ones((256, 256), np.int32)}],
)
def test_r33_wrong_types_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        _native.random_walk(**{**GOOD, **bad})
