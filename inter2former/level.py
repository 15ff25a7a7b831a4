"""Where the logits of a pass are cut into inside and outside: at which of some levels the mask is probably best.

Logits say which pixel belongs to the object sooner than another one. How many do is another question, and at the first
clicks, where an object and its part are equally likely, zero is often not the answer. Masks at some levels are
described on the grid of the random walk: by the evidence of score.py, by how strong the outlines are that their border
follows, by their shape. A tiny network, whose weights are part of the checkpoint's configuration (`level_weights`,
fitted by `python -m train calibrate`), says which is best. No network of the model and no images here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from inter2former import score
from inter2former.random_walk import CELLS, neighbours

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

LEVELS = (-1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0)
ZERO = LEVELS.index(0.0)
FEATURES = (
    *score.EVIDENCE,
    "border",  # log of the mean link across the border: how easily one walks there
    "leak",  # log of the links across the border relative to those inside, or outside where that is less
    "fill",  # share of its box that the mask fills
    "aspect",  # log(height / width) of the box
    "cut_off",  # 1 when the mask meets a side of the picture
    "ragged",  # log of the border's length relative to sqrt(area)
    "level",
)


def describe(
    logits: Float32, links: Float32, clicks: Sequence[tuple[int, int, bool]], previous: Mask | None
) -> list[tuple[float, ...] | None]:
    """The numbers named in FEATURES for the mask at each level; None where it is empty.

    logits    float32 [h, w]: every (T / CELLS)-th of the part of the frame that shows the image, at most CELLS a side
    links     float32 [4, CELLS^2] of the image
    clicks    (row, column, positive) in the same samples, in order
    previous  bool [h, w]: the mask that the last click corrected, None when there was none
    """
    rows, columns = logits.shape
    masks = logits > np.asarray(LEVELS, np.float32)[:, None, None]
    across, borders, within, everywhere = _walked(masks, links)
    described: list[tuple[float, ...] | None] = []
    for n, (zero, mask) in enumerate(zip(LEVELS, masks, strict=True)):
        evidence = score.evidence(logits - np.float32(zero), clicks, previous)
        if evidence is None:
            described.append(None)
            continue
        tall, wide = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = int(tall[-1] - tall[0]) + 1, int(wide[-1] - wide[0]) + 1
        area = int(np.count_nonzero(mask))
        cut_off = 0 in (tall[0], wide[0]) or tall[-1] == rows - 1 or wide[-1] == columns - 1
        around = max(float(borders[n]), 1.0)
        described.append(
            (
                *evidence,
                math.log(1e-4 + across[n] / around),
                math.log(1e-4 + across[n] / max(min(within[n], everywhere - within[n]), 1e-3)),
                area / (height * width),
                math.log(height / width),
                float(cut_off),
                math.log(around / math.sqrt(area)),
                zero,
            )
        )
    return described


def _walked(masks: Mask, links: Float32) -> tuple[Float32, Float32, Float32, float]:
    """Of masks [n, h, w]: sums of the links across each border, their number, sums of the links that begin inside;
    and the sum of all."""
    count, rows, columns = masks.shape
    across, borders, within = np.zeros((3, count), np.float32)
    everywhere = 0.0
    for link, (here, there) in zip(links.reshape(4, CELLS, CELLS), neighbours(rows, columns), strict=True):
        free = link[here].ravel()
        inside = masks[:, *here]
        border = (inside != masks[:, *there]).reshape(count, -1)
        across += border.astype(np.float32) @ free
        borders += np.count_nonzero(border, axis=1)
        within += inside.reshape(count, -1).astype(np.float32) @ free
        everywhere += float(free.sum())
    return across, borders, within, everywhere


def choose(described: Sequence[tuple[float, ...] | None], weights: Sequence[float]) -> float:
    """The best level: the highest v . tanh(W x + b), x a level's numbers; weights = W row by row, b, v.

    Zero where every mask is empty.
    """
    known = [n for n, numbers in enumerate(described) if numbers is not None]
    if not known:
        return 0.0
    x = np.asarray([described[n] for n in known], np.float64)
    units = hidden_units(len(weights))
    W, b, v = np.split(np.asarray(weights, np.float64), np.cumsum([units * len(FEATURES), units]))
    worth = np.tanh(x @ W.reshape(units, -1).T + b) @ v
    return LEVELS[known[int(worth.argmax())]]


def hidden_units(n_weights: int) -> int:
    """Width of the network with so many weights; 0 when there is none of that size."""
    units, rest = divmod(n_weights, len(FEATURES) + 2)
    return units if rest == 0 and units > 0 else 0


__all__ = ["FEATURES", "LEVELS", "ZERO", "choose", "describe", "hidden_units"]
