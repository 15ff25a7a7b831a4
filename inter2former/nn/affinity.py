"""How freely one walks between neighbouring cells of the random walk, learnt: once an image, from its features.

Colours say where something ends, but also where a shadow or a stripe does. What the encoder has seen tells them apart.
The walk itself, its grid and what it does with these numbers are random_walk.py's; `python -m train affinity` fits the
weights here, with those of the rest as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.config import ModelConfig
from inter2former.random_walk import CELLS, DIRECTIONS, neighbours

WIDTH = 48  # channels, of the starter


class Affinity(nn.Module):
    """A few convolutions over tokens, edge features of stride 8 and colours; then neighbours are compared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, compared = config.affinity_width, config.affinity_width // 2
        self.tokens = nn.Conv2d(config.embed_dim, width, 1)
        self.edges = nn.Conv2d(config.edge_channels[3], width, 1)
        self.colours = nn.Conv2d(3, width, 1)
        self.around = nn.Conv2d(width, width, 3, padding=1)
        self.compared = nn.Conv2d(width, compared, 1)
        self.outline = nn.Conv2d(width, len(DIRECTIONS), 1)  # of each cell alone
        self.difference = nn.Parameter(torch.full((len(DIRECTIONS), compared), 0.3))
        self.free = nn.Parameter(torch.full((len(DIRECTIONS),), 3.0))

    def forward(self, tokens: Tensor, edges: Tensor, image: Tensor) -> Tensor:
        """Logarithms of the links from each cell along random_walk.DIRECTIONS, at most 0.

        tokens   [B, d, T/16, T/16] of the encoder
        edges    [B, c, T/8, T/8], the coarsest edge features
        image    [B, 3, T, T], T a multiple of CELLS
        returns  float32 [B, 4, CELLS, CELLS]; 0 where there is no neighbour
        """
        x = _in_cells(self.tokens(tokens)) + _in_cells(self.edges(edges))
        x = F.silu(x + self.colours(F.avg_pool2d(image, image.shape[-1] // CELLS)))
        x = F.silu(self.around(x)) + x
        compared, outline = self.compared(x), self.outline(x)
        links = []
        for n, (here, there) in enumerate(neighbours(CELLS, CELLS)):
            unlike = (compared[..., *here] - compared[..., *there]).abs()
            cost = (unlike * F.softplus(self.difference[n])[:, None, None]).sum(1)
            kept = self.free[n] + outline[:, n, *here] + outline[:, n, *there] - cost
            rows, columns = here
            beside = (columns.start, CELLS - columns.stop, rows.start or 0, CELLS - rows.stop)
            links.append(F.pad(F.logsigmoid(kept.float()), beside))
        return torch.stack(links, 1)


def _in_cells(x: Tensor) -> Tensor:
    """[B, c, n, n] -> [B, c, CELLS, CELLS]."""
    if x.shape[-1] == CELLS:
        return x
    return F.interpolate(x, (CELLS, CELLS), mode="bilinear", align_corners=False, antialias=x.shape[-1] > CELLS)
