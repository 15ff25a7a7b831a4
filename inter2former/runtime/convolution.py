"""3 x 3 convolutions of wide maps in the native module: twice the speed of oneDNN's plain sums in float32.

What stands here computes what its twin computes (ConvUnit of nn/encoder.py, a stage of CannyNet of nn/canny.py) up to
float32 rounding: norms, SiLU and sums are parts of the convolution before or behind them, so that a map is read and
written once a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.nn.canny import ResidualBlock
from inter2former.nn.encoder import ConvUnit
from inter2former.runtime import compute


class NativeConvolution:
    """A 3 x 3 convolution with padding 1 and stride 1 and its weights of now; maps are [H, W, C].

    native  the compiled module
    isa     name of an instruction set, for tests
    """

    def __init__(self, conv: nn.Conv2d, native: Any, isa: str = "auto") -> None:
        weight = conv.weight.detach().to("cpu", torch.float32).contiguous()
        bias = torch.zeros(len(weight)) if conv.bias is None else conv.bias.detach().to("cpu", torch.float32)
        self._native = native.Convolution(weight.numpy(), bias.numpy(), isa)

    def __call__(
        self, x: Tensor, affine: tuple[Tensor, Tensor] | None = None, *, add: Tensor | None = None, silu: bool = False
    ) -> tuple[Tensor, float, float]:
        """x float32 [H, W, C] -> result [H, W, D], its sum and the sum of its squares.

        affine  (scale, shift), [C] each: convolve silu(scale * x + shift) instead of x
        add     [H, W, D], added to the result
        silu    applied at last
        """
        compute.stand_aside()
        scale, shift = (None, None) if affine is None else (part.numpy() for part in affine)
        out, total, squares = self._native.forward(
            x.contiguous().numpy(), scale, shift, None if add is None else add.contiguous().numpy(), silu
        )
        return torch.from_numpy(out), total, squares


class GroupAffine:
    """A group norm of one group as a scale and a shift of each channel."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self._weight, self._bias, self._eps = norm.weight.detach().double(), norm.bias.detach().double(), norm.eps

    def __call__(self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Means of all numbers and of their squares, float64 [...] -> (scale, shift), float32 [..., C]."""
        scale = self._weight * ((square - mean.square()).clamp_min(0) + self._eps).rsqrt()[..., None]
        return scale.float(), (self._bias - mean[..., None] * scale).float()


def means(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., H, N], contiguous -> means of all numbers and of their squares, float64 [...].

    A row is one sum in float32, rows are added in float64: exact enough for millions of numbers.
    """
    count = rows.shape[-2] * rows.shape[-1]
    square = torch.linalg.vector_norm(rows, dim=-1).double().square().sum(-1) / count
    return rows.sum(-1).double().sum(-1) / count, square


class NativeUnit(nn.Module):
    """As ConvUnit with its norms folded."""

    def __init__(self, unit: ConvUnit, native: Any) -> None:
        super().__init__()
        self.down = unit.down
        self._conv1, self._conv2 = NativeConvolution(unit.conv1, native), NativeConvolution(unit.conv2, native)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, c, H, W] -> float32 [B, C, H / 2, W / 2], channels last."""
        return _each(self._pair, F.silu(self.down(x)))

    def _pair(self, x: Tensor) -> Tensor:
        return self._conv2(self._conv1(x, silu=True)[0], add=x, silu=True)[0]


class NativeStage(nn.Module):
    """As residual blocks one after the other."""

    def __init__(self, blocks: Sequence[ResidualBlock], native: Any) -> None:
        super().__init__()
        self._steps = [
            (GroupAffine(norm), NativeConvolution(conv, native))
            for block in blocks
            for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2))
        ]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> float32, the same shape, channels last."""
        return _each(self._blocks, x)

    def _blocks(self, x: Tensor) -> Tensor:
        mean, square = means(x.flatten(1))
        here = x
        for index, (norm, conv) in enumerate(self._steps):
            second = index % 2 == 1  # of a block: what the block began with is added
            here, total, squares = conv(here, norm(mean, square), add=x if second else None)
            mean, square = torch.tensor([total, squares], dtype=torch.float64).div_(here.numel()).unbind()
            x = here if second else x
        return x


def _each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The function of float32 [H, W, C] on every map of [B, C, H, W]."""
    maps = x.float().permute(0, 2, 3, 1).contiguous()
    found = [function(one) for one in maps]
    return (torch.stack(found) if len(found) > 1 else found[0][None]).permute(0, 3, 1, 2)
