"""Dynamic local upsampling (DLU, paper 3.5): find the object on the tokens, then draw its outline only there.

Letters: B batch, d embedding width, n tokens a side, T pixels a side.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.config import ModelConfig
from inter2former.nn.layers import ChannelNorm

FILL = -100.0  # logit outside the box
TokenBox = tuple[int, int, int, int]  # left, top, right, bottom; half-open


class UpStage(nn.Module):
    """Norm, bicubic x2, add edges, 3 x 3 convolution."""

    def __init__(self, width_in: int, width_out: int, norm: str) -> None:
        super().__init__()
        self.norm: nn.Module = nn.GroupNorm(1, width_in) if norm == "group" else ChannelNorm(width_in)
        self.conv = nn.Conv2d(width_in, width_out, 3, 1, 1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = F.interpolate(self.norm(x), scale_factor=2, mode="bicubic", align_corners=False)
        out: Tensor = self.conv(x + edges)
        return out


class Upsampling(nn.Module):
    """Tokens and edge features -> logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = (*config.up_channels, 1)
        pairs = list(itertools.pairwise(widths))
        self.threshold = config.low_threshold
        self.stages = nn.ModuleList(UpStage(a, b, config.up_norm) for a, b in pairs)
        self.low = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)

    def low_logits(self, tokens: Tensor) -> Tensor:
        """The localisation branch: [B, d, n, n] -> [B, n, n]."""
        x = tokens
        for index, conv in enumerate(self.low):
            x = conv(x if index == 0 else F.silu(x))
        return x.squeeze(1)

    def box(self, low: Tensor) -> TokenBox:
        """Tight box of tokens above the threshold, low [n, n]; the whole grid when there is none."""
        height, width = low.shape
        found = low > self.threshold
        rows, columns = found.any(1).nonzero().flatten(), found.any(0).nonzero().flatten()
        if len(rows) == 0:
            return 0, 0, width, height
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def up(self, tokens: Tensor, edges: list[Tensor]) -> Tensor:
        """tokens [B, d, h, w] of the crop and the edges of the same crop, coarse to fine -> [B, 16h, 16w]."""
        x = tokens
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else F.silu(x), edges[index])
        return x.squeeze(1)

    def decode(self, tokens: Tensor, edges: list[Tensor]) -> tuple[Tensor, TokenBox, Tensor]:
        """One image, tokens [1, d, n, n] -> (logits [T, T], box, low logits [n, n])."""
        low = self.low_logits(tokens)[0]
        left, top, right, bottom = box = self.box(low)
        crops = [
            e[:, :, (s := 2 << j) * top : s * bottom, s * left : s * right].to(tokens.dtype)
            for j, e in enumerate(edges)
        ]
        inside = self.up(tokens[:, :, top:bottom, left:right], crops)[0]
        logits = inside.new_full((16 * low.shape[0], 16 * low.shape[1]), FILL)
        logits[16 * top : 16 * bottom, 16 * left : 16 * right] = inside
        return logits, box, low

    def forward(self, tokens: Tensor, edges: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Training: the whole map, and the localisation branch on detached tokens -> ([B, T, T], [B, n, n])."""
        return self.up(tokens, edges), self.low_logits(tokens.detach())
