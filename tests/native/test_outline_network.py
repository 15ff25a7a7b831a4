"""The outline network on every path: its twin, the same bits whatever the threads, and what the border refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inter2former import _native
from inter2former.nn.outline import CHANNELS, DOWN, UP, Outline
from inter2former.runtime.outline import NativeOutline, _layers
from tests.native.support import PATHS

WIDTHS = (4, 8, 12, 9)


def network(widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> Outline:
    """Every parameter random, none at its initial zero or one."""
    torch.manual_seed(seed)
    outline = Outline(widths)
    for name, tensor in outline.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            low, high = (0.5, 1.5) if name.endswith(("weight", "var")) else (-0.3, 0.3)
            tensor.uniform_(low, high)
        elif name.startswith("last"):
            tensor.normal_(0, 0.2)
    return outline.eval().requires_grad_(False)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(CHANNELS, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("isa", PATHS)
@settings(deadline=None, max_examples=12)
@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    widths=st.tuples(*(st.integers(1, 20),) * 4),
    seed=st.integers(0, 99),
)
def test_r31_it_is_its_twin(isa: str, height: int, width: int, widths: tuple[int, ...], seed: int) -> None:
    outline, x = network(widths, seed), picture(16 * height, 16 * width, seed)
    want = outline.double()(x.double()[None])[0]
    found = torch.from_numpy(NativeOutline(outline.float(), _native, isa)(x.numpy()))
    assert found.shape == (16 * height, 16 * width)
    # Winograd's points lose a few bits, see test_convolution.py; here two dozen follow one another.
    assert (found - want).norm() <= 2e-5 * (want.norm() + 1)


@pytest.mark.parametrize("isa", PATHS)
def test_threads_change_no_bit(isa: str) -> None:
    native, x = NativeOutline(network(), _native, isa), picture(64, 48).numpy()
    alone = native(x)
    _native.set_threads(3)
    for _ in range(3):
        assert np.array_equal(native(x), alone)


def test_r33_what_is_no_network_raises() -> None:
    layers = _layers(network())
    for broken in ([], layers[:-1], layers[1:], [*layers, layers[-1]], [layers[1], layers[0], *layers[2:]]):
        with pytest.raises(ValueError, match=r"outline network"):
            _native.Outline(broken, DOWN, UP)
    for down, up in ((DOWN, DOWN), ((), ()), ((-1, *DOWN[1:]), UP)):
        with pytest.raises(ValueError, match=r"outline network"):
            _native.Outline(layers, down, up)
    weight, bias = layers[0]
    for wrong in ((weight[0], bias), (weight, bias[:-1]), (weight.astype(np.float64), bias), (weight[..., :2], bias)):
        with pytest.raises((TypeError, ValueError)):
            _native.Outline([wrong, *layers[1:]], DOWN, UP)


@pytest.mark.parametrize("shape", [(CHANNELS, 8, 16), (CHANNELS, 16, 17), (CHANNELS, 0, 16), (3, 16, 16), (16, 16)])
def test_r33_pictures_that_do_not_fit_raise(shape: tuple[int, ...]) -> None:
    native: Any = NativeOutline(network(), _native)
    with pytest.raises(ValueError, match=r"x|channels"):
        native(np.zeros(shape, np.float32))
    with pytest.raises((TypeError, ValueError)):
        native(np.zeros((CHANNELS, 16, 16)))
