"""The convolution of wide maps on every path: the plain one, the same bits whatever the threads, the border refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from inter2former import _native
from inter2former.nn.canny import ResidualBlock
from inter2former.nn.encoder import ConvUnit
from inter2former.runtime import packing
from inter2former.runtime.convolution import NativeConvolution, NativeStage, NativeUnit
from tests.native.support import PATHS

SIZES = [(1, 1, 1, 1), (4, 4, 3, 5), (5, 7, 9, 13), (16, 33, 4, 8), (24, 24, 21, 30), (40, 64, 6, 2), (128, 96, 16, 17)]


def layer(inputs: int, outputs: int, seed: int = 0) -> torch.nn.Conv2d:
    torch.manual_seed(seed)
    return torch.nn.Conv2d(inputs, outputs, 3, 1, 1).requires_grad_(False)


def exact(conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """[H, W, C] -> [H, W, D] in float64."""
    return copy.deepcopy(conv).double()(x.double().permute(2, 0, 1)[None])[0].permute(1, 2, 0)


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_plain_convolution(isa: str, size: tuple[int, int, int, int]) -> None:
    inputs, outputs, height, width = size
    conv = layer(inputs, outputs)
    x = torch.randn(height, width, inputs)
    native = NativeConvolution(conv, _native, isa)
    found, total, squares = native(x)
    want = exact(conv, x)
    # Winograd's points lose a few bits: relative to the map at most 4e-6, where the plain sum is at some 5e-7.
    assert (found - want).norm() <= 4e-6 * want.norm()
    assert (found - want).abs().max() <= 3e-5 * want.abs().max()
    np.testing.assert_allclose(total, found.double().sum(), atol=1e-6 * found.numel())
    np.testing.assert_allclose(squares, found.double().square().sum(), rtol=1e-6)

    scale, shift, add = torch.rand(inputs) + 0.5, torch.randn(inputs), torch.randn(height, width, outputs)
    found, _, _ = native(x, (scale, shift), add=add, silu=True)
    want = F.silu(exact(conv, F.silu(x.double() * scale + shift)) + add)
    assert (found - want).norm() <= 4e-6 * want.norm()


@pytest.mark.parametrize("isa", PATHS)
def test_threads_change_no_bit(isa: str) -> None:
    conv, x = layer(24, 40), torch.randn(50, 61, 24)
    native = NativeConvolution(conv, _native, isa)
    alone, total, squares = native(x)
    _native.set_threads(3)
    for _ in range(3):
        found, again, squares_again = native(x)
        assert np.array_equal(alone.numpy(), found.numpy())
        assert (again, squares_again) == (total, squares)


def test_a_unit_is_its_twin() -> None:
    torch.manual_seed(1)
    unit = ConvUnit(3, 24).eval().requires_grad_(False)
    for name in ("norm", "norm1", "norm2"):
        norm = getattr(unit, name)
        norm.running_mean.normal_(0.0, 0.2)
        norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 36, 52)
    want = unit(x)
    packing._fold_norms(unit)
    torch.testing.assert_close(NativeUnit(unit, _native)(x), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_stage_is_its_twin(blocks: int) -> None:
    torch.manual_seed(2)
    stage = torch.nn.Sequential(*(ResidualBlock(32) for _ in range(blocks))).requires_grad_(False)
    for block in stage:
        for norm in (block.norm1, block.norm2):  # type: ignore[union-attr]
            norm.weight.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
            norm.bias.normal_()  # type: ignore[union-attr, operator]
    for x in (torch.randn(2, 32, 30, 41) + 2, torch.randn(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(NativeStage(list(stage), _native)(x), stage(x), atol=5e-5, rtol=1e-5)  # type: ignore[arg-type]


def test_bad_arguments_are_refused() -> None:
    weight, bias = np.zeros((4, 3, 3, 3), np.float32), np.zeros(4, np.float32)
    x = np.zeros((5, 6, 3), np.float32)
    for bad in (np.zeros((4, 3, 3, 2), np.float32), np.zeros((0, 3, 3, 3), np.float32), weight.transpose(1, 0, 2, 3)):
        with pytest.raises(ValueError, match=r"weight|bias"):
            _native.Convolution(bad, bias)
    with pytest.raises(ValueError, match="bias"):
        _native.Convolution(weight, bias[:3])
    with pytest.raises(ValueError, match="Unknown instruction set"):
        _native.Convolution(weight, bias, "sse")
    native = _native.Convolution(weight, bias)
    assert native.forward(x)[0].shape == (5, 6, 4)
    assert native.forward(x[:0])[0].shape == (0, 6, 4)
    with pytest.raises(TypeError, match="float32"):
        native.forward(x.astype(np.float64))
    with pytest.raises(ValueError, match="x must"):
        native.forward(x[:, ::2])
    with pytest.raises(ValueError, match="x must"):
        native.forward(np.zeros((5, 6, 4), np.float32))
    with pytest.raises(ValueError, match="go together"):
        native.forward(x, scale=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="shift"):
        native.forward(x, np.zeros(3, np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="add"):
        native.forward(x, add=np.zeros((5, 6, 3), np.float32))
