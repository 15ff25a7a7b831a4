"""The image encoder (paper 3.1): windows on two scales, fused into one map of tokens. Runs once an image.

Letters: B batch, h x w tokens of the main scale, C encoder width, d embedding width, W window side.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.config import ModelConfig
from inter2former.nn.layers import rope_tables, rotate

POSITION_GRID = 14  # the release keeps the 14 x 14 position table of its 224-pixel pre-training


class Attention(nn.Module):
    """Multi-head attention inside windows; positions outside the grid hold a learnt padding token."""

    def __init__(self, dim: int, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.padding = nn.Parameter(torch.zeros(1, dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """x [B, sum(h*w over grids), C] after the norm; the grids never attend to each other. Same shape back."""
        qkv = self.qkv(x)
        padding = self.qkv(self.padding.to(x.dtype))  # [1, 3C]: padded places are projected once, not per place
        sizes = [h * w for h, w in grids]
        parts = [
            self._windows(part.unflatten(1, grid), padding)
            for part, grid in zip(qkv.split(sizes, dim=1), grids, strict=True)
        ]
        return self.proj(torch.cat(parts, dim=1))

    def _windows(self, qkv: Tensor, padding: Tensor) -> Tensor:
        """qkv [B, h, w, 3C] -> attention output [B, h*w, C]."""
        B, h, w, width = qkv.shape
        W = self.window
        lead = W - W // 2 if self.shifted and (h > W or w > W) else 0
        H, V = _ceil(h + lead, W), _ceil(w + lead, W)
        if (h, w) != (H, V):
            padded = padding.to(qkv.dtype).expand(B, H, V, width).clone()
            padded[:, lead : lead + h, lead : lead + w] = qkv
            qkv = padded
        head = width // 3 // self.heads
        qkv = qkv.view(B, H // W, W, V // W, W, 3, self.heads, head)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(
            3, -1, self.heads, W * W, head
        )  # [3, B*windows, heads, W*W, head]
        # Scores depend on the difference of two positions alone, so one window's table serves all of them.
        cos, sin = rope_tables(W, W, head, qkv.device)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        out = out.view(B, H // W, V // W, self.heads, W, W, head).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(B, H, V, self.heads * head)
        return out[:, lead : lead + h, lead : lead + w].reshape(B, h * w, -1)


def _ceil(value: int, step: int) -> int:
    return -(-value // step) * step


class Block(nn.Module):
    """Pre-norm transformer block on the tokens of both scales."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.encoder_heads, config.window, shifted=index % 2 == 1)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config.mlp_ratio * dim)
        self.gelu = nn.GELU()  # a module of its own, since a runtime may do it inside of fc1
        self.fc2 = nn.Linear(config.mlp_ratio * dim, dim)

    def forward(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        x = x + self.attn(self.norm1(x), grids)
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


class PatchStem(nn.Module):
    """One 16 x 16 patch layer and an interpolated table of positions, as in the release."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.encoder_dim, 16, 16)
        self.positions = nn.Parameter(torch.zeros(1, config.encoder_dim, POSITION_GRID, POSITION_GRID))

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.proj(image)
        return x + F.interpolate(self.positions, x.shape[-2:], mode="bilinear", align_corners=False), []


class ConvUnit(nn.Module):
    """3 x 3 stride-2 convolution, then one residual pair; batch norms fold into the convolutions at inference."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width_in, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.down(x)))
        return F.silu(x + self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))))


class ConvStem(nn.Module):
    """Strides 2, 4, 8 with residual pairs, then a stride-2 projection to tokens. A small model trained from scratch
    learns outlines here that a patch layer cannot; the three maps go on to the upsampling head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = (3, *config.stem_channels)
        self.units = nn.ModuleList(ConvUnit(a, b) for a, b in itertools.pairwise(widths))
        self.proj = nn.Conv2d(widths[-1], config.encoder_dim, 3, 2, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = []
        x = image
        for unit in self.units:
            x = unit(x)
            maps.append(x)
        return self.proj(x), maps


class Encoder(nn.Module):
    """Image [B, 3, T, T] -> tokens [B, d, T/16, T/16] and the stem's maps (fine to coarse; empty for a patch stem)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, d = config.encoder_dim, config.embed_dim
        self.anchor_size = config.anchor_size
        self.fusion_blocks = config.fusion_blocks
        self.stem = PatchStem(config) if config.stem == "patch" else ConvStem(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.encoder_depth))
        self.fusion_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in config.fusion_blocks)
        self.laterals = nn.ModuleList(nn.Linear(2 * dim, d, bias=False) for _ in config.fusion_blocks)
        self.lateral_norms = nn.ModuleList(nn.LayerNorm(d) for _ in config.fusion_blocks)
        self.out_conv = nn.Conv2d(d, d, 3, 1, 1, groups=d, bias=False)
        self.out_norm = nn.LayerNorm(d)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        main, maps = self.stem(image)
        anchor_image = F.interpolate(image, (self.anchor_size, self.anchor_size), mode="bilinear", align_corners=False)
        anchor, _ = self.stem(anchor_image)
        grids = [(main.shape[2], main.shape[3]), (anchor.shape[2], anchor.shape[3])]
        x = torch.cat([main.flatten(2), anchor.flatten(2)], dim=2).transpose(1, 2)  # [B, N + A, C]
        fused: Tensor | None = None
        stage = 0
        for index, block in enumerate(self.blocks):
            x = block(x, grids)
            if index in self.fusion_blocks:
                part = self._fuse(x, grids, stage)
                fused = part if fused is None else fused + part
                stage += 1
        assert fused is not None
        h, w = grids[0]
        tokens = self.out_conv(fused.transpose(1, 2).unflatten(2, (h, w)))
        return self.out_norm(tokens.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), maps

    def _fuse(self, x: Tensor, grids: list[tuple[int, int]], stage: int) -> Tensor:
        """Both scales of one depth -> [B, N, d]."""
        (h, w), (a, b) = grids
        main, anchor = x.split([h * w, a * b], dim=1)
        anchor_map = anchor.transpose(1, 2).unflatten(2, (a, b))
        anchor_map = F.interpolate(anchor_map, (h, w), mode="bilinear", align_corners=False)
        norm = self.fusion_norms[stage]
        both = torch.cat([norm(main), norm(anchor_map.flatten(2).transpose(1, 2))], dim=-1)
        out: Tensor = self.lateral_norms[stage](self.laterals[stage](both))
        return out
