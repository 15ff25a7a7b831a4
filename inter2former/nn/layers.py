"""Small parts that several boxes of the model share: rotary embedding and norms over channels. Nothing with a size."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@functools.lru_cache(maxsize=32)
def rope_tables(height: int, width: int, dim: int, device: torch.device, span: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the two-dimensional rotary embedding, float32 [height * width, dim / 2] each.

    One angle a channel pair: the first half of the pairs turns with the row, the second with the column; a step is
    half a position and the frequencies are 10000 ** (-2i / (dim / 2)), as in the released implementation. With a
    `span`, positions are stretched so that the longer side always counts that many: the same object then has the same
    positions at every input size.
    """
    step = 0.5 * (span / max(height, width) if span else 1.0)
    with torch.inference_mode(False), torch.no_grad():  # the tables are shared with training
        frequencies = 10000.0 ** (-2.0 * torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 2))
        rows = (step * torch.arange(height, dtype=torch.float32, device=device))[:, None] * frequencies
        columns = (step * torch.arange(width, dtype=torch.float32, device=device))[:, None] * frequencies
        grid = torch.cat(
            [rows[:, None, :].expand(-1, width, -1), columns[None, :, :].expand(height, -1, -1)], dim=-1
        )  # [height, width, dim / 2]
        angles = grid.reshape(height * width, dim // 2)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channel pairs (a, b) -> (a cos + b sin, b cos - a sin).

    x         [..., dim]
    cos, sin  [..., dim / 2], broadcast against x's leading dimensions
    """
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2).to(x.dtype)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, H, W]: independent of the map's extent."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )
