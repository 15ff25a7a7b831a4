"""From the frame in which a mask was found to a larger one, and what the outline network looks at there.

Masks are found at the coarse size. What is wrong with them then lies close to their outline, and the photo knows
better: around what was found a crop is cut from the picture at T, so scaled that its longer side has SIDE pixels, and
the outline network (nn/outline.py) says what is to be added to the logits. So a click costs the same for a large
object as for a small one, and a small one is looked at more closely. Frames, pictures and logits, no network here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from inter2former.images import MEAN, OUTSIDE, STD, Frame
from inter2former.nn.outline import CHANNELS, HALVINGS, LOGITS, SCALE

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
TokenBox = tuple[int, int, int, int]  # left, top, right, bottom; half-open
ModelClick = tuple[int, int, bool]  # row, column, positive; pixels of the frame

SIDE = 256  # pixels of the longer side of a crop; with 192 mIoU@5 is 0.25 lower, with 384 the same (146 objects)
CLOSEST = 2.0  # crop pixels a pixel of the frame, at most
# What is thinner than so many crop pixels, as cracks are, is looked at more closely: such a crop has so many pixels.
THIN, THIN_SIDE = 8.0, 512
MARGIN = 1 / 8  # of the longer side, around what was found
SURE = 12.0  # logits end here
BLOB = 5.0  # crop pixels: sigma of a click
_FAR = 4  # of these a click reaches
_TOKEN = 16


class Spread(NamedTuple):
    """What was found, in another frame: logits float32 [16 h, 16 w] inside a box of its tokens; OUTSIDE elsewhere."""

    logits: Float32
    box: TokenBox


def spread(inside: Float32, box: TokenBox, coarse: Frame, frame: Frame) -> Spread | None:
    """What was found in the coarse frame, float32 [16 h, 16 w] inside a box of tokens, with room for another outline
    around it; None where nothing was found."""
    found = inside > 0
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    if len(rows) == 0:
        return None
    margin = math.ceil(MARGIN * max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1
    # The larger frame's pixel y shows what the coarse one's (y + 1/2) step - 1/2 does.
    step_y, step_x = (few / many for few, many in zip(coarse.valid, frame.valid, strict=True))
    top, left = _TOKEN * box[1], _TOKEN * box[0]
    end = frame.size // _TOKEN
    spread_box = (
        max(int((left + columns[0] - margin) / step_x) // _TOKEN, 0),
        max(int((top + rows[0] - margin) / step_y) // _TOKEN, 0),
        min(-int(-(left + columns[-1] + 1 + margin) / step_x // _TOKEN), end),
        min(-int(-(top + rows[-1] + 1 + margin) / step_y // _TOKEN), end),
    )
    width, height = (_TOKEN * (spread_box[2 + axis] - spread_box[axis]) for axis in (0, 1))
    x = (_TOKEN * spread_box[0] + 0.5) * step_x - 0.5 - left
    y = (_TOKEN * spread_box[1] + 0.5) * step_y - 0.5 - top
    places = np.asarray([[step_x, 0, x], [0, step_y, y]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return Spread(cv2.warpAffine(inside, places, (width, height), flags=how, borderValue=OUTSIDE), spread_box)  # type: ignore[arg-type]


def look(found: Spread, picture: UInt8, clicks: Sequence[ModelClick], side: float = SIDE) -> Float32:
    """What the outline network is to see, float32 [CHANNELS, h, w].

    picture  uint8 [rows, columns, 3]: the part of the frame that shows the image
    side     pixels of the longer side, h or w
    """
    height, width = found.logits.shape
    longer = max(height, width)
    if longer > side and _breadth(found.logits > 0) * side < THIN * longer:
        side = min(THIN_SIDE * side / SIDE, longer)
    scale = min(side / longer, CLOSEST * side / SIDE)
    step = 2**HALVINGS
    h, w = (max(round(side * scale / step), 1) * step for side in (height, width))
    left, top = _TOKEN * found.box[0], _TOKEN * found.box[1]

    x = np.zeros((CHANNELS, h, w), np.float32)
    shown = picture[top : top + height, left : left + width]
    # Of a token at the picture's border only a part is shown.
    rows, columns = max(round(shown.shape[0] * h / height), 1), max(round(shown.shape[1] * w / width), 1)
    if shown.size:
        colours = _resized(shown, rows, columns, cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
        x[:3, :rows, :columns] = ((colours - mean) / std).transpose(2, 0, 1)
    logits = _resized(found.logits.clip(-SURE, SURE), h, w, cv2.INTER_LINEAR)
    x[LOGITS] = logits / np.float32(SCALE)
    x[LOGITS + 1] = 1 / (1 + np.exp(-logits))
    for row, column, positive in clicks:
        y, c = (row - top + 0.5) * h / height - 0.5, (column - left + 0.5) * w / width - 0.5
        near = [slice(max(math.floor(at - _FAR * BLOB), 0), max(math.ceil(at + _FAR * BLOB), 0)) for at in (y, c)]
        blob = x[LOGITS + 2 if positive else LOGITS + 3, near[0], near[1]]
        if blob.size:
            away = np.square(np.arange(near[0].start, near[0].start + blob.shape[0]) - y)[:, None]
            away = away + np.square(np.arange(near[1].start, near[1].start + blob.shape[1]) - c)
            np.maximum(blob, np.exp(away.astype(np.float32) / np.float32(-2 * BLOB**2)), out=blob)
    return x


def drawn(found: Spread, change: Float32) -> Spread:
    """With what the outline network adds, float32 [h, w] in the pixels of its crop."""
    height, width = found.logits.shape
    change = _resized(change, height, width, cv2.INTER_LINEAR)
    return Spread(found.logits.clip(-SURE, SURE) + change, found.box)


def _breadth(mask: npt.NDArray[np.bool_]) -> float:
    """Of what is inside, in pixels: that of a stripe with so much area along its outline."""
    outline = sum(int(np.count_nonzero(a != b)) for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])))
    return 2 * int(np.count_nonzero(mask)) / max(outline, 1)


def _resized(values: npt.NDArray[Any], height: int, width: int, how: int) -> npt.NDArray[Any]:
    same = values.shape[:2] == (height, width)
    return values if same else cv2.resize(values, (width, height), interpolation=how)


__all__ = ["SIDE", "Spread", "drawn", "look", "spread"]
