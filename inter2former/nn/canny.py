"""Edge features: the Canny operator and the network on top of it (CannyNet, paper 3.5). Runs once an image.

The operator and the network are separate functions, since the operator's orientation of exactly horizontal
gradients is arbitrary in float32 (0 or 360 degrees), and tests inject recorded maps between the two.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.config import ModelConfig

THRESHOLD = 2.0  # of gradient magnitude on an image in 0..1; one threshold, no hysteresis
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
# (dy, dx) of the neighbour for each 45 degree bin
NEIGHBOURS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


class CannyMaps(NamedTuple):
    """magnitude float32 [B, 1, H, W]; orientation in units of 45 degrees, 0..8; is_max: survives suppression."""

    magnitude: Tensor
    orientation: Tensor
    is_max: Tensor


def canny(image: Tensor) -> CannyMaps:
    """Canny's operator up to non-maximum suppression.

    image   float32 [B, 3, H, W], normalised as the network's input (channel order does not matter much: MEAN and
            STD are applied to the stored order)
    """
    mean = image.new_tensor(MEAN).view(1, 3, 1, 1)
    std = image.new_tensor(STD).view(1, 3, 1, 1)
    x = ((image * std + mean) / 255.0).clamp(0.0, 1.0)
    x = x.contiguous(memory_format=torch.channels_last)  # twice as fast, with the same bits
    gauss = torch.exp(-0.5 * torch.arange(-2.0, 3.0, device=image.device) ** 2)
    gauss = (gauss / gauss.sum()).to(image.dtype)
    sobel = x.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])

    def each_channel(x: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
        return F.conv2d(x, kernel.expand(3, 1, -1, -1), padding=padding, groups=3)

    x = each_channel(each_channel(x, gauss.view(1, 5), (0, 2)), gauss.view(5, 1), (2, 0))
    along_x, along_y = each_channel(x, sobel, (1, 1)), each_channel(x, sobel.t(), (1, 1))  # [B, 3, H, W]
    magnitude = _total((along_x.square() + along_y.square()).sqrt())
    degrees = torch.atan2(_total(along_y), _total(along_x)) * (180.0 / torch.pi) + 180.0
    orientation = torch.round(degrees / 45.0)
    return CannyMaps(magnitude, orientation, _is_maximum(magnitude, orientation))


def _total(x: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]: as sum(1), a quarter of its time on channels last."""
    return x[:, 0:1] + x[:, 1:2] + x[:, 2:3]


def _is_maximum(magnitude: Tensor, orientation: Tensor) -> Tensor:
    """True where the magnitude is strictly greater than both neighbours along the gradient."""
    H, W = magnitude.shape[-2:]
    padded = F.pad(magnitude, (1, 1, 1, 1))
    greater = [magnitude > padded[..., 1 + dy : 1 + dy + H, 1 + dx : 1 + dx + W] for dy, dx in NEIGHBOURS]
    along = orientation.long() % 4  # bins p and p + 4 name the same pair of neighbours
    out = torch.zeros_like(magnitude, dtype=torch.bool)
    for p in range(4):
        out |= (along == p) & greater[p] & greater[p + 4]
    return out


class ResidualBlock(nn.Module):
    """x + conv(silu(GN(conv(silu(GN(x)))))), one group: the statistics span the whole map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.norm2 = nn.GroupNorm(1, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class CannyNet(nn.Module):
    """Canny maps -> edge features, coarse to fine: [B, c, T/8, T/8], [.., T/4], [.., T/2], [.., T]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = config.edge_channels
        self.with_image = config.stem == "conv"  # a model without pretrained tokens also looks at the colours here
        self.conv1 = nn.Conv2d(8 if self.with_image else 5, widths[0], 3, 1, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(n)))
            for width, n in zip(widths, config.edge_blocks, strict=True)
        )
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        self.laterals = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        for lateral in self.laterals:  # an untrained head ignores edges
            nn.init.zeros_(lateral.weight)  # type: ignore[arg-type]
            nn.init.zeros_(lateral.bias)  # type: ignore[arg-type]

    def forward(self, maps: CannyMaps, image: Tensor) -> list[Tensor]:
        x = network_input(maps)
        if self.with_image:
            pixels = x.shape[-2] * x.shape[-1]
            x = torch.cat([x * pixels**0.5, image], dim=1)  # unit mean square beside normalised colours
        x = self.conv1(x)
        out = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            out.append(self.laterals[index](x))
            if index < len(self.downs):
                x = self.downs[index](x)
        return out[::-1]


def network_input(maps: CannyMaps) -> Tensor:
    """The five channels [magnitude, orientation, thin, thin above, magnitude above], each over its own L2 norm."""
    magnitude = maps.magnitude
    thin = magnitude * maps.is_max
    channels = torch.cat(
        [
            magnitude,
            maps.orientation.to(magnitude.dtype) * 45.0,
            thin,
            thin * (thin >= THRESHOLD),
            magnitude * (magnitude >= THRESHOLD),
        ],
        dim=1,
    )
    return channels / channels.flatten(2).norm(dim=2).clamp_min(1e-12)[..., None, None]
