"""From the frame in which a mask was found to a larger one, and what the outline network looks at there.

Masks are found at the coarse size. What is wrong with them then lies close to their outline, and the photo knows
better: around what was found a crop is cut from the picture at T, so scaled that its longer side has SIDE pixels, and
the outline network (nn/outline.py) says what is to be added to the logits. So a click costs the same for a large
object as for a small one, and a small one is looked at more closely. Frames, pictures and logits, no network here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from inter2former.images import MEAN, OUTSIDE, STD, Frame
from inter2former.nn.outline import BEFORE, CHANNELS, CLICKS, HALVINGS, LATEST, LOGITS, SCALE

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
FAR = 4  # of these a click reaches
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


class View(NamedTuple):
    """What the outline network looks at.

    logits   float32 [H, W]: what was found, of the box
    before   the same of what was shown before the latest click
    box      of the frame's tokens
    picture  uint8 [.., .., 3]: what there is of it in the box
    shape    (h, w) of the crop
    shown    how much of that shows the picture
    clicks   float32 [n, 3]: y, x in pixels of the crop, whether positive
    """

    logits: Float32
    before: Float32 | None
    box: TokenBox
    picture: UInt8
    shape: tuple[int, int]
    shown: tuple[int, int]
    clicks: Float32


def view(
    found: Spread, before: Spread | None, picture: UInt8, clicks: Sequence[ModelClick], side: float = SIDE
) -> View:
    """The crop around what was found.

    before   what was shown before the latest click
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
    part = picture[top : top + height, left : left + width]
    # Of a token at the picture's border only a part is shown.
    shown = max(round(part.shape[0] * h / height), 1), max(round(part.shape[1] * w / width), 1)
    places = [
        ((row - top + 0.5) * h / height - 0.5, (column - left + 0.5) * w / width - 0.5, positive)
        for row, column, positive in clicks
    ]
    made = np.asarray(places, np.float32).reshape(-1, 3)
    known = None
    if before is not None:
        known = before.logits if before.box == found.box else over(before, found.box)
    return View(found.logits, known, found.box, part, (h, w), shown, made)


def look(view: View) -> Float32:
    """What the outline network is to see, float32 [CHANNELS, h, w]. csrc/view.cpp does the same."""
    x = np.zeros((CHANNELS, *view.shape), np.float32)
    if view.picture.size:
        (rows, columns), had = view.shown, view.picture.shape
        how = cv2.INTER_AREA if rows <= had[0] and columns <= had[1] else cv2.INTER_LINEAR
        colours = _resized(view.picture.astype(np.float32), view.shown, how)  # bytes would be rounded on the way
        mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
        x[:3, :rows, :columns] = ((colours - mean) / std).transpose(2, 0, 1)
    _put_logits(x[LOGITS : LOGITS + 2], view.logits)
    if view.before is not None:
        _put_logits(x[BEFORE : BEFORE + 2], view.before)
    for number, (row, column, positive) in enumerate(view.clicks.tolist(), 1):
        _put_click(x[CLICKS if positive else CLICKS + 1], row, column)
        if number == len(view.clicks):
            _put_click(x[LATEST], row, column)
    return x


def _put_logits(maps: Float32, logits: Float32) -> None:
    """Logits and their chance, at the size of the maps, float32 [2, h, w]."""
    logits = _resized(logits.clip(-SURE, SURE), maps.shape[1:], cv2.INTER_LINEAR)
    maps[0] = logits / np.float32(SCALE)
    maps[1] = 1 / (1 + np.exp(-logits))


def _put_click(chart: Float32, y: float, x: float) -> None:
    """A blob, where it is higher than what is there."""
    near = [slice(max(math.floor(at - FAR * BLOB), 0), max(math.ceil(at + FAR * BLOB), 0)) for at in (y, x)]
    blob = chart[near[0], near[1]]
    if blob.size:
        away = np.square(np.arange(near[0].start, near[0].start + blob.shape[0]) - y)[:, None]
        away = away + np.square(np.arange(near[1].start, near[1].start + blob.shape[1]) - x)
        np.maximum(blob, np.exp(away.astype(np.float32) / np.float32(-2 * BLOB**2)), out=blob)


def over(spread: Spread, box: TokenBox) -> Float32:
    """The logits of another box, a copy, float32 [16 h, 16 w]."""
    logits = np.full([_TOKEN * (box[side + 2] - box[side]) for side in (1, 0)], OUTSIDE, np.float32)
    x0, y0, x1, y1 = (pick(a, b) for pick, a, b in zip((max, max, min, min), box, spread.box, strict=True))
    if x0 < x1 and y0 < y1:
        here, there = (
            tuple(slice(_TOKEN * (a - at), _TOKEN * (b - at)) for a, b, at in ((y0, y1, to[1]), (x0, x1, to[0])))
            for to in (box, spread.box)
        )
        logits[here] = spread.logits[there]
    return logits


def drawn(view: View, change: Float32) -> Spread:
    """What was found with what the outline network adds, float32 [h, w] in the pixels of its crop."""
    change = _resized(change, view.logits.shape, cv2.INTER_LINEAR)
    return Spread(view.logits.clip(-SURE, SURE) + change, view.box)


def _breadth(mask: npt.NDArray[np.bool_]) -> float:
    """Of what is inside, in pixels: that of a stripe with so much area along its outline."""
    outline = sum(int(np.count_nonzero(a != b)) for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])))
    return 2 * int(np.count_nonzero(mask)) / max(outline, 1)


def _resized(values: Float32, shape: tuple[int, ...], how: int) -> Float32:
    """float32 [.., .., ...] with another height and width."""
    height, width = shape
    same = values.shape[:2] == (height, width)
    return values if same else np.asarray(cv2.resize(values, (width, height), interpolation=how), np.float32)


__all__ = ["BLOB", "FAR", "SIDE", "SURE", "Spread", "View", "drawn", "look", "over", "spread", "view"]
