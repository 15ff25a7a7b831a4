"""Native byte operations on the reference mask against their twins, bit for bit (R31, R33)."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inter2former import _native
from inter2former.config import EdgeRule
from inter2former.nn import attention
from inter2former.reference_mask import apply_prediction
from tests.native.support import PATHS

RULES: list[EdgeRule] = ["exact", "released"]


def patches_of_states(height: int, width: int, seed: int, share: float = 0.02) -> npt.NDArray[np.uint8]:
    """A constant state with random rectangles and single pixels of other states."""
    rng = np.random.default_rng(seed)
    state = np.full((height, width), rng.integers(0, 5), np.uint8)
    for _ in range(rng.integers(0, 5)):
        y, x = rng.integers(0, height), rng.integers(0, width)
        state[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = rng.integers(0, 5)
    noise = rng.random((height, width)) < share * rng.integers(0, 2)
    state[noise] = rng.integers(0, 5, int(noise.sum()))
    return state


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_r31_edge_tokens_equal_the_twin(isa: str, rule: EdgeRule, data: st.DataObject) -> None:
    patch = data.draw(st.sampled_from([1, 4, 16]), "patch")
    height = patch * data.draw(st.integers(1, 6), "rows")
    width = patch * data.draw(st.integers(1, 9), "columns")
    left = data.draw(st.integers(0, width - 1), "left")
    top = data.draw(st.integers(0, height - 1), "top")
    box = (left, top, data.draw(st.integers(left + 1, width), "right"), data.draw(st.integers(top + 1, height), "b"))
    state = patches_of_states(height, width, data.draw(st.integers(0, 2**16), "seed"))
    got = _native.edge_tokens(state, box, rule == "released", patch, isa)
    want = attention.edge_tokens(state, box, rule, patch)
    assert got.dtype == want.dtype
    assert np.array_equal(got, want)


@pytest.mark.parametrize("isa", PATHS)
def test_r31_edge_tokens_of_every_distance(isa: str) -> None:
    """One pixel of another state, at every distance from the token's border."""
    for x in range(48):
        state = np.ones((16, 48), np.uint8)
        state[8, x] = 3
        want = attention.edge_tokens(state, (0, 0, 48, 16))
        assert np.array_equal(_native.edge_tokens(state, (0, 0, 48, 16), isa=isa), want)


@pytest.mark.parametrize("isa", PATHS)
def test_r31_edge_tokens_of_rows_that_are_not_adjacent(isa: str) -> None:
    wide = patches_of_states(32, 100, 3)
    view = wide[:, 7:55]
    box = (16, 0, 48, 32)
    assert np.array_equal(_native.edge_tokens(view, box, isa=isa), attention.edge_tokens(view, box))


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("width", [1, 15, 16, 31, 32, 63, 64, 65, 129, 200])
def test_r31_transition_equals_the_twin(isa: str, width: int) -> None:
    rng = np.random.default_rng(width)
    state = rng.integers(0, 5, (7, width), dtype=np.uint8)
    prediction = rng.random((7, width)) < 0.5
    before = state.copy()
    assert np.array_equal(_native.apply_prediction(state, prediction, isa), apply_prediction(state, prediction))
    assert np.array_equal(state, before)


_STATE = np.full((32, 48), 2, np.uint8)
_ALL = (0, 0, 48, 32)


@pytest.mark.parametrize(
    ("reference", "box", "patch", "error"),
    [
        pytest.param(_STATE.astype(np.int32), _ALL, 16, TypeError, id="int32"),
        pytest.param(_STATE[0], _ALL, 16, ValueError, id="one dimension"),
        pytest.param(_STATE.T, (0, 0, 32, 48), 16, ValueError, id="column order"),
        pytest.param(_STATE[:20], (0, 0, 48, 20), 16, ValueError, id="not whole tokens"),
        pytest.param(_STATE, _ALL, 0, ValueError, id="patch of nothing"),
        pytest.param(_STATE, _ALL, -16, ValueError, id="negative patch"),
        pytest.param(_STATE, (0, 0, 49, 32), 16, ValueError, id="box too wide"),
        pytest.param(_STATE, (-1, 0, 48, 32), 16, ValueError, id="box starts outside"),
        pytest.param(_STATE, (5, 5, 5, 9), 16, ValueError, id="box without area"),
        pytest.param(_STATE, (9, 5, 5, 9), 16, ValueError, id="box turned round"),
        pytest.param(_STATE, (0, 0, 48), 16, TypeError, id="three numbers"),
        pytest.param(_STATE, (0, 0, 2**70, 32), 16, TypeError, id="number too large"),
        pytest.param(np.zeros((0, 48), np.uint8), (0, 0, 48, 0), 16, ValueError, id="no rows"),
    ],
)
def test_r33_bad_arguments_of_edge_tokens_raise(reference: Any, box: Any, patch: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"(reference|box|patch|arguments)"):
        _native.edge_tokens(reference, box, False, patch)


@pytest.mark.parametrize(
    ("state", "prediction", "error"),
    [
        pytest.param(_STATE, np.zeros((32, 48), np.uint8), TypeError, id="prediction is uint8"),
        pytest.param(_STATE, np.zeros((32, 47), bool), ValueError, id="prediction too narrow"),
        pytest.param(_STATE.astype(np.int8), np.zeros((32, 48), bool), TypeError, id="state is int8"),
        pytest.param(_STATE[:, ::2], np.zeros((32, 24), bool), ValueError, id="state strided"),
        pytest.param(_STATE + np.uint8(3), np.zeros((32, 48), bool), ValueError, id="a state of 5"),
    ],
)
def test_r33_bad_arguments_of_the_transition_raise(state: Any, prediction: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"(state|prediction)"):
        _native.apply_prediction(cast("npt.NDArray[np.uint8]", state), prediction)
