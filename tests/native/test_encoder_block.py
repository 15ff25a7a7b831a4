"""Blocks of the image encoder on every path: the plain ones, the same bits whatever the threads, the border refuses."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inter2former import _native
from inter2former.config import PRESETS
from inter2former.nn.encoder import Block
from inter2former.runtime.encoder_block import NativeBlock
from tests.native.support import PATHS

BF16_PATHS = [name for name, _, reason in _native.instruction_sets("bfloat16") if not reason]
# width, heads, window, index of the block (odd ones are shifted), grids
CASES = [
    (32, 2, 4, 0, [(8, 8), (4, 4)]),
    (32, 2, 4, 1, [(8, 8), (4, 4)]),
    (24, 3, 6, 1, [(7, 13), (2, 3)]),  # padded on every side; heads of eight
    (80, 1, 8, 0, [(5, 17)]),  # panels that are not full
    (192, 6, 16, 1, [(32, 32), (16, 16)]),  # a small model
    (136, 2, 24, 0, [(25, 30)]),  # more keys than are held at a time
]


def make(width: int, heads: int, window: int, index: int, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    config = dataclasses.replace(PRESETS["small"](), encoder_dim=width, encoder_heads=heads, window=window)
    block = Block(config, index).eval().requires_grad_(False)
    for value in block.state_dict().values():
        value.add_(0.05 * torch.randn(value.shape))  # no bias, and no padding token, is zero
    return block


def tokens(width: int, grids: list[tuple[int, int]], images: int = 1) -> Tensor:
    return torch.randn(images, sum(h * w for h, w in grids), width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_plain_block(isa: str, case: Any) -> None:
    width, heads, window, index, grids = case
    block, x = make(width, heads, window, index), tokens(width, grids, 2)
    want = copy.deepcopy(block).double()(x.double(), grids)
    plain = (block(x, grids) - want).norm()
    native = NativeBlock(block, _native, isa=isa)
    given = x.clone()
    found = native(given, grids)
    assert found is given  # in place
    # As exact as PyTorch in float32, which rounds elsewhere.
    assert (found - want).norm() <= 2 * plain + 2e-7 * want.norm()


@pytest.mark.parametrize("isa", BF16_PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_bfloat16_it_stays_near(isa: str, case: Any) -> None:
    width, heads, window, index, grids = case
    block, x = make(width, heads, window, index), tokens(width, grids)
    change = block(x, grids) - x
    found = NativeBlock(block, _native, "bfloat16", isa)(x.clone(), grids) - x
    assert (found - change).norm() <= 0.01 * change.norm()


@pytest.mark.parametrize("isa", PATHS)
def test_threads_and_company_change_no_bit(isa: str) -> None:
    width, heads, window, index, grids = CASES[2]
    block, x = make(width, heads, window, index), tokens(width, grids)
    native = NativeBlock(block, _native, isa=isa)
    alone = native(x.clone(), grids)
    _native.set_threads(3)
    for _ in range(3):
        assert torch.equal(native(x.clone(), grids), alone)
    rows = _native.EncoderBlock(weights(block), isa)
    many = np.tile(x[0].numpy(), (5, 1))
    want = rows.project(many[:1])
    for count in (2, 13, len(many)):
        assert np.array_equal(rows.project(many[:count])[:1], want)


@pytest.mark.parametrize("isa", PATHS)
def test_gelu(isa: str) -> None:
    """One hidden unit, whose value is GELU of what its bias says."""
    values = torch.linspace(-12, 12, 481)
    given = weights(make(4, 1, 2, 0))
    given["fc1.weight"] = np.zeros((1, 4), np.float32)
    given["fc2.weight"] = np.ones((4, 1), np.float32)
    given["fc2.bias"] = np.zeros(4, np.float32)
    given["attn.proj.weight"] *= 0
    given["attn.proj.bias"] *= 0
    worst = 0.0
    for value in values.tolist():
        given["fc1.bias"] = np.full(1, value, np.float32)
        x = np.zeros((1, 4), np.float32)
        _native.EncoderBlock(given, isa).finish(x, np.zeros((1, 4), np.float32))
        want = torch.nn.functional.gelu(torch.tensor(value, dtype=torch.float32).double()).item()
        worst = max(worst, abs(float(x[0, 0]) - want) / max(abs(value), 1.0))
    assert worst <= 2e-7


def weights(block: Block) -> dict[str, Any]:
    return {name: value.clone().numpy() for name, value in block.state_dict().items()}


def test_no_rows_are_no_work() -> None:
    rows = _native.EncoderBlock(weights(make(8, 1, 2, 0)))
    assert rows.project(np.zeros((0, 8), np.float32)).shape == (0, 24)
    rows.finish(np.zeros((0, 8), np.float32), np.zeros((0, 8), np.float32))


def test_the_border_refuses() -> None:
    given = weights(make(8, 2, 4, 0))
    for name in ("fc1.weight", "attn.qkv.bias"):
        with pytest.raises(ValueError, match=f"Weight '{name}' is missing"):
            _native.EncoderBlock({key: value for key, value in given.items() if key != name})
    with pytest.raises(ValueError, match=r"norm1.weight must have shape \[8\], not \[7\]"):
        _native.EncoderBlock(given | {"norm1.weight": np.zeros(7, np.float32)})
    with pytest.raises(ValueError, match=r"must be in 1\.\.16384, not \[0, 8\]"):
        _native.EncoderBlock(given | {"fc1.weight": np.zeros((0, 8), np.float32)})
    rows = _native.EncoderBlock(given)
    x = np.zeros((3, 8), np.float32)
    with pytest.raises(ValueError, match=r"x must have shape \[3, 8\], not \[3, 7\]"):
        rows.project(x[:, :7])
    with pytest.raises(TypeError, match="x must be float32"):
        rows.project(x.astype(np.float64))
    with pytest.raises(ValueError, match="attended must have shape"):
        rows.finish(x, x[:2])
    frozen = x.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="x is read-only"):
        rows.finish(frozen, x)

    angles = np.zeros((16, 2), np.float32)
    make_windows = functools.partial(_native.WindowAttention, 4, 2)
    with pytest.raises(ValueError, match=r"sines must have shape \[16, 2\]"):
        make_windows(angles, angles[:3])
    with pytest.raises(ValueError, match="side and heads"):
        _native.WindowAttention(0, 2, angles, angles)
    windows = make_windows(angles, angles)
    qkv, padding = np.zeros((6, 24), np.float32), np.zeros(24, np.float32)
    assert windows.forward(qkv, padding, (2, 3), 0).shape == (6, 8)
    for shape, lead, problem in (((2, 4), 0, "qkv must have shape"), ((0, 3), 0, "height"), ((2, 3), 4, "lead")):
        with pytest.raises(ValueError, match=problem):
            windows.forward(qkv, padding, shape, lead)
    with pytest.raises(ValueError, match="padding must have shape"):
        windows.forward(qkv, padding[:3], (2, 3), 0)
