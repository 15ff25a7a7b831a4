"""Where outlines run, pixel by pixel: a small convolutional network over the photo around what was found.

The decoder finds the object; most of what is wrong after a few clicks lies within three pixels of the outline. What is
needed there is no idea of the object but a close look at colours. So this looks at a crop of the photo together with
the logits that were found, those shown before the latest click, and the clicks, and says what the logits should be.
How crops are cut is refinement.py's; `python -m train outline` fits the weights here, with those of the rest as they
are.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

# Colours; logits / 4, their chance; positive clicks, negative clicks; what was shown before the latest click, as
# logits / 4 and their chance, zeros when there was nothing; the latest click.
CHANNELS = 10
LOGITS, CLICKS, BEFORE, LATEST = 3, 5, 7, 9
SCALE = 4.0  # of logits
HALVINGS = 4  # sides are multiples of 2 ** HALVINGS
WIDTHS = (24, 48, 64, 64)  # of the starter: channels at strides 2, 4, 8 and 16
DOWN = (0, 2, 2, 2)  # units on the way down, at each stride
UP = (1, 1, 1)  # and up again


class Unit(nn.Module):
    """silu(x + conv(silu(conv(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width), nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))))


class Outline(nn.Module):
    """A U-net that begins and ends at stride 2, with four pixels as channels. Untrained, it changes nothing."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.first_norm = _conv(4 * CHANNELS, widths[0]), nn.BatchNorm2d(widths[0])
        pairs = list(itertools.pairwise(widths))
        self.narrow = nn.ModuleList(_conv(fine, coarse) for fine, coarse in pairs)
        self.narrow_norms = nn.ModuleList(nn.BatchNorm2d(coarse) for _, coarse in pairs)
        self.down = nn.ModuleList(_units(width, n) for width, n in zip(widths, DOWN, strict=True))
        self.widen = nn.ModuleList(_conv(coarse, fine) for fine, coarse in pairs)
        self.widen_norms = nn.ModuleList(nn.BatchNorm2d(fine) for fine, _ in pairs)
        self.up = nn.ModuleList(_units(width, n) for width, n in zip(widths, UP, strict=False))
        self.last = nn.Conv2d(widths[0], 4, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [B, CHANNELS, h, w], h and w multiples of 16 -> what is to be added to the logits, [B, h, w]."""
        levels = [self.down[0](F.silu(self.first_norm(self.first(F.pixel_unshuffle(x, 2)))))]
        for narrow, norm, units in zip(self.narrow, self.narrow_norms, self.down[1:], strict=True):
            levels.append(units(F.silu(norm(narrow(F.avg_pool2d(levels[-1], 2))))))
        y = levels.pop()
        for n in reversed(range(len(levels))):
            wide = F.interpolate(self.widen_norms[n](self.widen[n](y)), scale_factor=2.0)
            y = self.up[n](F.silu(levels[n] + wide))
        return F.pixel_shuffle(self.last(y), 2)[:, 0]


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def _units(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Unit(width) for _ in range(count)))


__all__ = [
    "BEFORE",
    "CHANNELS",
    "CLICKS",
    "DOWN",
    "HALVINGS",
    "LATEST",
    "LOGITS",
    "SCALE",
    "UP",
    "WIDTHS",
    "Outline",
    "Unit",
]
