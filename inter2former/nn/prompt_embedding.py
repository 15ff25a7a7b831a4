"""Dynamic prompt embedding (DPE, paper 3.2): the reference mask as tokens, computed only where it says something.

Box: tight box of pixels that are not possible background, rounded outwards to tokens and one token wider. Inside it
four stride-2 convolutions run on the crop, with zero padding at the crop's border; outside stands one constant vector.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.config import ModelConfig
from inter2former.reference_mask import POSSIBLE_BACKGROUND

if TYPE_CHECKING:
    from collections.abc import Sequence

PixelBox = tuple[int, int, int, int]  # left, top, right, bottom; half-open


def prompt_box(reference: npt.NDArray[np.uint8], patch: int = 16) -> PixelBox:
    """The DPE box in pixels, a multiple of `patch`; the whole map when every pixel is possible background."""
    height, width = reference.shape
    told = reference != POSSIBLE_BACKGROUND
    rows, columns = np.flatnonzero(told.any(1)), np.flatnonzero(told.any(0))
    if len(rows) == 0:
        return 0, 0, width, height
    return (
        max(int(columns[0]) // patch * patch - patch, 0),
        max(int(rows[0]) // patch * patch - patch, 0),
        min((int(columns[-1]) // patch + 2) * patch, width),
        min((int(rows[-1]) // patch + 2) * patch, height),
    )


def prompt_box_mask(reference: Tensor, patch: int = 16) -> Tensor:
    """The same boxes for a batch, without leaving the device: bool [B, H/patch, W/patch], True inside."""
    told = reference != POSSIBLE_BACKGROUND
    tokens = told.unflatten(2, (-1, patch)).any(3).unflatten(1, (-1, patch)).any(2)  # [B, h, w]

    def spread(line: Tensor) -> Tensor:  # [B, n] -> True from the first to the last True, one wider each side
        reach = line.cumsum(1).bool() & line.flip(1).cumsum(1).flip(1).bool()
        return F.max_pool1d(reach.float().unsqueeze(1), 3, 1, 1).squeeze(1).bool()

    inside = spread(tokens.any(2)).unsqueeze(2) & spread(tokens.any(1)).unsqueeze(1)
    return inside | ~tokens.flatten(1).any(1)[:, None, None]


class PromptEmbedding(nn.Module):
    """Reference mask -> one vector a token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = (5, *config.prompt_channels, config.embed_dim)
        self.labels = nn.Embedding(5, 5)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        self._background: Tensor | None = None

    def crop(self, labels: Tensor) -> Tensor:
        """labels int [B, H, W] of the crop alone -> [B, d, H/16, W/16]."""
        x = self.labels(labels.int()).permute(0, 3, 1, 2)
        for conv in self.convs:
            x = F.relu(conv(x))
        return x

    def fix_background(self) -> None:
        """Keep the background vector from now on: for weights that no longer change."""
        self._background = self.background()

    def background(self) -> Tensor:
        """The vector of a token far from everything: the stack's centre on possible background, [d]."""
        if self._background is not None:
            return self._background
        patch = torch.full((1, 48, 48), POSSIBLE_BACKGROUND, device=self.labels.weight.device)
        return self.crop(patch)[0, :, 1, 1]

    def forward(self, reference: Tensor, inside: Tensor) -> Tensor:
        """Batched and differentiable: reference uint8 [B, T, T], inside bool [B, n, n] -> [B, d, n, n].

        Masking after each layer equals cropping: the box is a multiple of every stride, and what lies outside
        reads as the zero padding that the crop would see.
        """
        x = self.labels(reference.int()).permute(0, 3, 1, 2)
        for conv in self.convs:
            x = F.relu(conv(_keep(x, inside)))
        return torch.where(inside.unsqueeze(1), x, self.background().to(x.dtype)[None, :, None, None])


def _keep(x: Tensor, inside: Tensor) -> Tensor:
    """Zero the positions of x [B, C, H, W] whose token lies outside."""
    scale = x.shape[-1] // inside.shape[-1]
    mask = inside.to(x.dtype).unsqueeze(1)
    return x * F.interpolate(mask, scale_factor=scale, mode="nearest") if scale > 1 else x * mask


def scatter(crop: Tensor, background: Tensor, box: PixelBox, size_hw: tuple[int, int], patch: int = 16) -> Tensor:
    """Put the crop's tokens [1, d, ., .] into a map of the constant vector: [1, d, h, w]."""
    left, top, right, bottom = (side // patch for side in box)
    out = background[None, :, None, None].repeat(1, 1, *size_hw)
    out[:, :, top:bottom, left:right] = crop
    return out


def tokens_in(box: PixelBox | Sequence[int], patch: int = 16) -> PixelBox:
    """A pixel box in tokens."""
    left, top, right, bottom = (int(side) // patch for side in box)
    return left, top, right, bottom
