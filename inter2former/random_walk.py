"""A random walk over the photo, between the network's logits and the mask (Grady 2005 and 2006).

The chance that somebody who walks from a place is caught by the object's side first: by its clicks, or, at each step
with a small chance, by what the network says there. Across outlines one walks rarely; where they are, colours say, or
what was learnt from colours and features (nn/affinity.py). Of the network no more than logits is needed; where it is
small, and above all at its first click, the walk knows what it does not. Solved on a grid of CELLS x CELLS cells,
whatever T is: outlines finer than a cell stay the network's, and objects that are thinner.

No network here. `walk` is the twin of csrc/random_walk.cpp, step by step.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from inter2former.reference_mask import DEFINITE_BACKGROUND, DEFINITE_FOREGROUND

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
TokenBox = tuple[int, int, int, int]

CELLS = 64  # a side; 128 brings nothing (75 objects) and costs four times as much
# From a cell to its neighbours to the right, below, below right and below left: rows and columns, and in the flat grid.
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
STEPS = tuple(dy * CELLS + dx for dy, dx in DIRECTIONS)
CONTRAST = 3.0  # of a link: exp(-CONTRAST * squared difference of colours / their mean); 1.5 to 10 do as well
FLOOR = 1e-3  # no outline is closed
DIAGONAL = 0.7  # of the links across corners, which are longer
SOFTNESS = 3.0  # logits are divided by it: the network is too sure of itself; 3 to 6 do as well
SURE = 12.0  # logits end here
GROWTH = 2.0  # of the trust in the network at each further click
MOST_TRUST = 9.0
WORTH = 8  # clicks that a box or a given mask tells as much as; without any click nobody walks, it makes both worse
# Too thin for cells, as cracks are: of more than so many cells' area, nearly all of it close to its outline.
THIN_CELLS = 3
THIN_REACH = 3 / 8  # of a cell: so close
THIN_CORE = 0.2  # of the area may be deeper inside
ITERATIONS = 100  # of conjugate gradients; where one walks freely, 40 are not enough
NEARLY = 1e-2  # chances keep this distance from 0 and 1


def neighbours(rows: int, columns: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """For each of DIRECTIONS the cells of a grid that have such a neighbour, and these neighbours."""
    return [
        (
            np.s_[: rows - dy, max(-dx, 0) : columns - max(dx, 0)],
            np.s_[dy:rows, max(dx, 0) : columns + min(dx, 0)],
        )
        for dy, dx in DIRECTIONS
    ]


def links(image: Tensor, size: int) -> Float32:
    """How freely one walks between neighbouring cells.

    image    float32 [3, h, w], the part of the model frame that shows the photo; any unit
    size     T; a multiple of CELLS, h and w at most T
    returns  float32 [4, CELLS^2]: from each cell along STEPS, 0 where there is no photo on either side
    """
    colour = F.avg_pool2d(image, size // CELLS, ceil_mode=True).numpy()  # of what a cell shows, also at the border
    _, rows, columns = colour.shape
    out = np.zeros((4, CELLS, CELLS), np.float32)
    known = np.zeros((4, CELLS, CELLS), np.bool_)
    for n, (here, there) in enumerate(neighbours(rows, columns)):
        out[n][here] = np.square(colour[:, *here] - colour[:, *there]).sum(0)
        known[n][here] = True
    straight = out[:2][known[:2]]
    usual = float(straight.mean()) if straight.size else 0.0
    freely = from_logarithms(torch.from_numpy(out * np.float32(-CONTRAST / max(usual, 1e-6))))
    return (freely.numpy() * known).reshape(4, -1)


def from_logarithms(logarithms: Tensor) -> Tensor:
    """float32 [..., 4, CELLS, CELLS], at most 0 -> links, the same shape; differentiable."""
    lengths = logarithms.new_tensor([1.0, 1.0, DIAGONAL, DIAGONAL])
    return (logarithms.exp() + FLOOR) * lengths[:, None, None]


def within(links: Float32, valid: tuple[int, int], size: int) -> Float32:
    """Links of a frame whose first `valid` rows and columns (pixels) show the photo: none into the rest.

    links  float32 [4, CELLS^2]        size  T
    """
    rows, columns = (-(-side * CELLS // size) for side in valid)
    kept = np.zeros((4, CELLS, CELLS), np.float32)
    for n, (here, _) in enumerate(neighbours(rows, columns)):
        kept[n][here] = links[n].reshape(CELLS, CELLS)[here]
    return kept.reshape(4, -1)


def trust(first: float, clicks: int) -> float:
    """Chance, relative to a free link, that the network's word ends a walk: `first` at the first click, then more."""
    return float(min(first * GROWTH ** (max(clicks, 1) - 1), MOST_TRUST))


def is_thin(inside: Float32, size: int) -> bool:
    """Whether what the network found is too thin to be asked about in cells; nobody walks then.

    inside   float32 [h, w]: logits of a part of the frame
    size     T
    """
    found = (inside > 0).view(np.uint8)
    cell = size // CELLS
    area = np.count_nonzero(found)
    if area <= THIN_CELLS * cell**2:
        return False
    square = np.ones((2 * int(THIN_REACH * cell) + 1,) * 2, np.uint8)
    core = cv2.erode(found, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return bool(np.count_nonzero(core) < THIN_CORE * area)


def walk(links: Float32, inside: Float32, box: TokenBox, reference: UInt8, trust: float) -> Float32:
    """Logits that colours and clicks have been asked about.

    links      of the image, see `links`
    inside     float32 [16 h, 16 w]: the network's logits inside `box` (tokens); outside it is sure of background
    reference  uint8 [T, T]: the reference mask that it was given; only its definite states count, the clicks
    trust      see `trust`
    returns    float32, the shape of `inside`
    """
    size = len(reference)
    side = size // CELLS
    left, top, right, bottom = (16 * place for place in box)
    sure = np.clip(inside, -SURE, SURE)
    full = np.full((size, size), -SURE, np.float32)
    full[top:bottom, left:right] = sure
    said = 1 / (1 + np.exp(_means(full, side) / np.float32(-SOFTNESS)))
    object_, background = (
        _means((reference == state).astype(np.float32), side) for state in (DEFINITE_FOREGROUND, DEFINITE_BACKGROUND)
    )
    chance = _solve(links, np.float32(trust), said.ravel(), object_.ravel(), background.ravel()).reshape(CELLS, CELLS)
    chance = np.clip(chance, np.float32(NEARLY), np.float32(1 - NEARLY))
    moved = cv2.resize(np.log(chance / (1 - chance)), (size, size), interpolation=cv2.INTER_LINEAR)
    walked: Float32 = sure * np.float32(1 - 1 / SOFTNESS) + moved[top:bottom, left:right]
    return walked


def _means(values: Float32, side: int) -> Float32:
    means: Float32 = values.reshape(CELLS, side, CELLS, side).mean((1, 3), dtype=np.float32)
    return means


def _solve(links: Float32, trust: np.float32, said: Float32, object_: Float32, background: Float32) -> Float32:
    """Conjugate gradients, preconditioned by the diagonal, from what the network said. All arguments flat."""

    def around(x: Float32) -> Float32:
        total = np.zeros_like(x)
        for link, step in zip(links, STEPS, strict=True):
            total[:-step] += link[:-step] * x[step:]
            total[step:] += link[:-step] * x[:-step]
        return total

    leave = around(np.ones_like(said)) + trust + object_ + background
    x = said.copy()
    residual = trust * said + object_ - (leave * x - around(x))
    scaled = residual / leave
    direction = scaled.copy()
    energy = float(residual @ scaled)
    for _ in range(ITERATIONS):
        if energy < 1e-12:
            break
        product = leave * direction - around(direction)
        length = np.float32(energy / float(direction @ product))
        x += length * direction
        residual -= length * product
        scaled = residual / leave
        before, energy = energy, float(residual @ scaled)
        direction = scaled + np.float32(energy / before) * direction
    return x
