"""A block of the image encoder in the native module: no copies by windows, and what follows a product is part of it.

The twin is Block of nn/encoder.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inter2former.nn.encoder import Block
from inter2former.nn.layers import rope_tables
from inter2former.runtime import compute
from inter2former.runtime.native import Precision

_ROWS = 768  # tokens a thread between two times that clicks may go first: some tens of milliseconds of a large model


class NativeBlock(nn.Module):
    """As Block, with the weights that it has now; `forward` changes x.

    native     the compiled module
    precision  of the operands of products; sums are float32
    isa        name of an instruction set, for tests
    """

    def __init__(self, block: Block, native: Any, precision: Precision = "float32", isa: str = "auto") -> None:
        super().__init__()
        weights = {name: value.detach().contiguous().numpy() for name, value in block.state_dict().items()}
        self._rows = native.EncoderBlock(weights, isa, precision)
        self._threads = native.threads
        attention = block.attn
        self._side, self._shifted = attention.window, attention.shifted
        with torch.inference_mode():
            self._padding = attention.qkv(attention.padding).flatten().numpy()
        width = len(self._padding) // 3 // attention.heads
        cosines, sines = rope_tables(self._side, self._side, width, torch.device("cpu"))
        self._windows = native.WindowAttention(
            self._side, attention.heads, cosines.numpy(), sines.numpy(), isa, precision
        )

    def forward(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """x [B, sum(h*w over grids), C] -> float32, after the block; x itself where that is float32 and contiguous."""
        x = x.float().contiguous()
        for image in x:
            self._change(image, grids)
        return x

    def _change(self, x: Tensor, grids: list[tuple[int, int]]) -> None:
        """x [N, C] in place."""
        compute.stand_aside()
        qkv = torch.from_numpy(self._rows.project(x.numpy()))
        parts = qkv.split([h * w for h, w in grids])
        attended = torch.cat([self._attend(part, grid) for part, grid in zip(parts, grids, strict=True)])
        rows = _ROWS * self._threads()
        for part, seen in zip(x.split(rows), attended.split(rows), strict=True):
            compute.stand_aside()
            self._rows.finish(part.numpy(), seen.numpy())

    def _attend(self, qkv: Tensor, grid: tuple[int, int]) -> Tensor:
        """qkv [h*w, 3C] -> [h*w, C]."""
        compute.stand_aside()
        side = self._side
        lead = side - side // 2 if self._shifted and max(grid) > side else 0
        return torch.from_numpy(self._windows.forward(qkv.numpy(), self._padding, grid, lead))
