"""What the outline network looks at and its answer put back, in one native call: their twins, threads, and what the
border refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inter2former import _native
from inter2former.nn.outline import Outline
from inter2former.refinement import SURE, Spread, View, drawn, look, view
from inter2former.runtime.outline import NativeOutline
from tests.native.support import PATHS
from tests.native.test_outline_network import network

OUTLINE = network()


def twin(outline: Outline, given: View) -> np.ndarray:
    with torch.inference_mode():
        change = outline(torch.from_numpy(look(given))[None])[0].numpy()
    return drawn(given, change).logits


def a_view(seed: int, high: int, wide: int, rows: int, columns: int, *, before: bool) -> View:
    rng = np.random.default_rng(seed)
    box = (int(rng.integers(0, 4)), int(rng.integers(0, 4)))
    found = Spread(rng.normal(0, 9, (16 * high, 16 * wide)).astype(np.float32), (*box, box[0] + wide, box[1] + high))
    shown = Spread(rng.normal(0, 9, (64, 80)).astype(np.float32), (2, 1, 7, 5)) if before else None
    picture = rng.integers(0, 256, (rows, columns, 3), np.uint8)
    places = rng.integers(0, 16 * max(high, wide) + 100, (int(rng.integers(0, 6)), 2)).tolist()
    clicks = [(row, column, bool(rng.random() < 0.5)) for row, column in places]
    return view(found, shown, picture, clicks, float(rng.choice([100, 160, 256])))


@pytest.mark.parametrize("isa", PATHS)
@settings(deadline=None, max_examples=25)
@given(
    high=st.integers(1, 20),
    wide=st.integers(1, 20),
    rows=st.integers(1, 400),
    columns=st.integers(1, 400),
    before=st.booleans(),
    seed=st.integers(0, 999),
)
def test_r31_it_is_its_twin(isa: str, high: int, wide: int, rows: int, columns: int, before: bool, seed: int) -> None:
    given = a_view(seed, high, wide, rows, columns, before=before)
    logits, finite = NativeOutline(OUTLINE, _native, isa).drawn(given)
    want = twin(OUTLINE, given)
    assert finite
    assert logits.shape == want.shape
    # OpenCV leaves out what a pixel has of its neighbours where that is below a thousandth.
    change = want - given.logits.clip(-SURE, SURE)
    assert np.linalg.norm(logits - want) <= 5e-4 * (np.linalg.norm(change) + 1)


def test_threads_change_no_bit() -> None:
    native = NativeOutline(OUTLINE, _native)
    given = a_view(3, 20, 14, 300, 200, before=True)
    alone = native.drawn(given)[0]
    _native.set_threads(3)
    for _ in range(3):
        assert np.array_equal(native.drawn(given)[0], alone)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_changes_that_are_not_finite_are_said(value: float) -> None:
    outline = network()
    with torch.no_grad():
        outline.last.bias.fill_(value)  # type: ignore[union-attr]
    given = a_view(0, 3, 3, 48, 48, before=False)
    assert not NativeOutline(outline, _native).drawn(given)[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"logits": np.zeros((0, 16), np.float32)},
        {"logits": np.zeros((16, 16))},
        {"before": np.zeros((16, 48), np.float32)},
        {"picture": np.zeros((48, 48, 4), np.uint8)},
        {"picture": np.zeros((48, 48, 3), np.uint8)[:, ::-1]},
        {"picture": np.zeros((48, 48, 3), np.float32)},
        {"shape": (48, 40)},
        {"shape": (0, 48)},
        {"shape": (-16, 48)},
        {"shown": (0, 48)},
        {"shown": (49, 48)},
        {"clicks": np.zeros((2, 2), np.float32)},
        {"clicks": np.full((1, 3), np.nan, np.float32)},
        {"clicks": np.full((1, 3), np.inf, np.float32)},
    ],
)
def test_r33_views_that_do_not_fit_raise(wrong: dict[str, Any]) -> None:
    given = a_view(0, 3, 3, 96, 96, before=True)
    fitting = {"shape": (48, 48), "shown": (48, 48)}
    native = NativeOutline(OUTLINE, _native)
    native.drawn(given._replace(**fitting))
    with pytest.raises((TypeError, ValueError)):
        native.drawn(given._replace(**{**fitting, **wrong}))
