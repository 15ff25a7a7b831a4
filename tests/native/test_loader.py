"""The loader: native and twin give one answer; an absent or foreign module costs time only, and one log line (R35)."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from inter2former import _native, reference_mask
from inter2former.nn import attention
from inter2former.runtime import native
from tests.native.support import make, tokens


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    native.forget()
    yield
    native.forget()


def same_answers() -> None:
    module = make(32, 16, 4)
    x, edge = tokens(50, 32)
    with torch.inference_mode():
        got, want = native.experts(module)(x, edge), module(x, edge)
        transposed = native.experts(module)(x.t().contiguous().t(), edge)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(transposed, want, rtol=0, atol=1e-5)
    state = np.random.default_rng(0).integers(0, 5, (32, 48), dtype=np.uint8)
    box = (16, 0, 48, 32)
    for rule in ("exact", "released"):
        assert np.array_equal(native.edge_tokens(state, box, rule), attention.edge_tokens(state, box, rule))
    prediction = state > 2
    assert np.array_equal(
        native.apply_prediction(state, prediction), reference_mask.apply_prediction(state, prediction)
    )


def test_the_module_is_used(caplog: pytest.LogCaptureFixture) -> None:
    status = native.status()
    assert status.available
    assert status.instruction_set == _native.instruction_sets()[0][0] or status.refused
    assert status.instruction_set not in status.refused
    assert status.error == ""
    same_answers()
    assert not caplog.records
    native.set_threads(2)
    assert native.status().threads == 2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        pytest.param(None, "inter2former._native", id="absent"),
        pytest.param(types.SimpleNamespace(INTERFACE=0), "interface 0", id="another version"),
    ],
)
def test_r35_pytorch_serves_without_the_module(
    module: object, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "inter2former._native", module)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        status = native.status()
        native.set_threads(2)
        with native.among(2):
            same_answers()
    assert not status.available
    assert status.instruction_set == ""
    assert reason in status.error
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_packed_weights_are_those_of_the_moment() -> None:
    module = make(16, 8, 2)
    x, edge = tokens(20, 16)
    forward = native.experts(module)
    before = forward(x, edge)
    with torch.no_grad():
        module.shared_w3.bias += 1
    assert torch.equal(forward(x, edge), before)
    assert not torch.equal(native.experts(module)(x, edge), before)


def test_a_forced_instruction_set_is_checked() -> None:
    with pytest.raises(ValueError, match="Unknown instruction set"):
        native.experts(make(16, 8, 2), "neon9")
