"""How good a mask probably is: the IoU with what the annotator means, predicted from what is known without the truth.

Evidence is a handful of numbers about a decoder pass and the clicks before it; a tiny network turns them into an IoU.
Its weights are part of the checkpoint's configuration (`score_weights`), fitted by `python -m train calibrate`. A
checkpoint without them promises what its probabilities promise. No network of the model and no images here.

The strongest evidence is the history: masks that the last click hardly changed are good, and simulated or real, an
annotator clicks into the largest error, so the depth of the click in the mask before it tells how bad that one was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

SIDE = 128  # samples along the longer side that evidence looks at; more change nothing, and this costs under a ms
EVIDENCE = (
    "inside",  # mean probability inside the mask, as a logit
    "outside",  # share of the expected area that the mask covers, as a logit
    "unsure",  # pixels of probability 0.2 .. 0.8, relative to the area
    "area",  # log of the share of the image
    "agreement",  # IoU with the mask before the last click; 0 when there was none
    "error_depth",  # log of the distance from the last click to what it should join or leave, relative to sqrt(area)
    "clicks",  # log(1 + number)
    "positive",  # 1 when the last click was positive
    "centred",  # depth of the first click in the mask, relative to the deepest point
    "fragments",  # share of the area that is not the largest connected part
)
_LOGIT_08 = math.log(0.8 / 0.2)  # of probability 0.8
_SURE = 7.0  # logits of shares end here


def evidence(
    logits: Float32, clicks: Sequence[tuple[int, int, bool]], previous: Mask | None
) -> tuple[float, ...] | None:
    """The numbers named in EVIDENCE, or None for an empty mask.

    logits    [h, w], the part of the model frame that shows the image, thinned out to SIDE or a little less
    clicks    (row, column, positive) in the same samples, in order
    previous  [h, w]: the mask that the last click corrected, None when there was none
    """
    mask = logits > 0
    area = int(mask.sum())
    if area == 0:
        return None
    probability = 1.0 / (1.0 + np.exp(-np.clip(logits, -30.0, 30.0)))
    inside = float(probability[mask].sum(dtype=np.float64))
    outside = float(probability.sum(dtype=np.float64)) - inside
    unsure = float((np.abs(logits) < _LOGIT_08).sum()) / area
    agreement = 0.0
    if previous is not None:
        agreement = int((mask & previous).sum()) / int((mask | previous).sum())
    return (
        _logit(inside / area),
        _logit(inside / (inside + outside)),
        min(unsure, 2.0),
        math.log(area / mask.size),
        agreement,
        _error_depth(clicks, previous, math.sqrt(area)),
        math.log(1 + len(clicks)),
        float(clicks[-1][2]) if clicks else 1.0,
        _centred(mask, clicks),
        _fragments(mask, area),
    )


def _logit(share: float) -> float:
    share = min(max(share, 1e-9), 1 - 1e-9)
    return min(max(math.log(share / (1 - share)), -_SURE), _SURE)


def _error_depth(clicks: Sequence[tuple[int, int, bool]], previous: Mask | None, size: float) -> float:
    """Depth of the last click in the previous mask, when it is negative, or in its outside."""
    depth = 0.0
    if clicks and previous is not None:
        row, column, positive = clicks[-1]
        depth = float(min(row + 1, column + 1, previous.shape[0] - row, previous.shape[1] - column))
        rows, columns = np.nonzero(previous if positive else ~previous)
        if len(rows):
            depth = min(depth, math.sqrt(float(((rows - row) ** 2 + (columns - column) ** 2).min())))
    return math.log(min(depth / size, 2.0) + 0.02)


def _centred(mask: Mask, clicks: Sequence[tuple[int, int, bool]]) -> float:
    if not clicks:
        return 0.5
    padded = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_3)[1:-1, 1:-1]
    return float(depth[clicks[0][:2]]) / float(depth.max())


def _fragments(mask: Mask, area: int) -> float:
    _, _, parts, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    return 1.0 - float(parts[1:, cv2.CC_STAT_AREA].max()) / area


def predict(numbers: Sequence[float], weights: Sequence[float]) -> float:
    """IoU in 0..1: sigmoid(v . tanh(W x + b) + c); weights = W row by row, b, v, c."""
    units = hidden_units(len(weights))
    flat = np.asarray(weights, np.float64)
    W, b, v, c = np.split(flat, np.cumsum([units * len(EVIDENCE), units, units]))
    z = v @ np.tanh(W.reshape(units, -1) @ np.asarray(numbers, np.float64) + b) + c[0]
    return float(1.0 / (1.0 + math.exp(-min(max(float(z), -30.0), 30.0))))


def hidden_units(n_weights: int) -> int:
    """Width of the network with so many weights; 0 when there is none of that size."""
    units, rest = divmod(n_weights - 1, len(EVIDENCE) + 2)
    return units if rest == 0 and units > 0 else 0


def promise(logits: Float32) -> float:
    """Without weights: the IoU that the probabilities promise, logits [h, w] of wherever the mask may be.

    With p the probability and m the mask: E[m and truth] / (m + E[truth outside m]) = sum(pm) / sum(m + p(1-m)).
    """
    area, inside, expected = 0, 0.0, 0.0
    for first in range(0, len(logits), 64):  # some rows at a time: the work takes several times their bytes
        rows = logits[first : first + 64]
        mask = rows > 0
        probability = 1.0 / (1.0 + np.exp(-rows.clip(-30.0, 30.0)))
        area += int(mask.sum())
        inside += float(probability[mask].sum(dtype=np.float64))
        expected += float(probability.sum(dtype=np.float64))
    return min(inside / (area + expected - inside), 1.0) if area else 0.0
