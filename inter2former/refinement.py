"""Outlines of what was found at a small size, drawn again at a larger T.

A network knows objects at the sizes that it was trained at; above them it takes them apart, but still sees where an
outline runs, and finer than below. So the mask is found at the coarse size, spread over the larger frame, and close to
its outline the network's logits at T decide. Frames and logits alone, no network here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from inter2former import reference_mask
from inter2former.images import OUTSIDE, Frame

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
TokenBox = tuple[int, int, int, int]  # left, top, right, bottom; half-open

# Pixels of the coarse size. 1.5 to 3 do as well: 57 composites of 1280 pixels have 85.2 % mIoU@5 at T = 512 alone,
# 87.0 to 88.1 with outlines from T = 1024; within two pixels of the true ones lie 13 and 26 %.
REACH = 2
# Of the frame's side around the box: 87.7 % there (87.9 with all of the frame, 86.8 with nothing around), and a click
# costs what its object does.
MARGIN = 16
_TOKEN = 16


class Spread(NamedTuple):
    """What was found, in the larger frame.

    logits  float32 [16 h, 16 w], inside the box; OUTSIDE elsewhere
    near    bool, the same shape: close to the outline
    box     tokens of the larger frame
    """

    logits: Float32
    near: Mask
    box: TokenBox

    def reference(self, size: int) -> npt.NDArray[np.uint8]:
        """The reference mask that tells of it, uint8 [T, T]."""
        mask = np.zeros((size, size), np.bool_)
        left, top, right, bottom = (_TOKEN * side for side in self.box)
        np.greater(self.logits, 0, out=mask[top:bottom, left:right])
        return reference_mask.from_mask(mask)

    def window(self, size: int) -> TokenBox:
        """Tokens that are looked at: the box, and what surrounds it."""
        left, top, right, bottom = self.box
        end = size // _TOKEN
        margin = end // MARGIN
        return max(left - margin, 0), max(top - margin, 0), min(right + margin, end), min(bottom + margin, end)

    def drawn(self, inside: Float32, box: TokenBox) -> Float32:
        """float32, as `logits`, with what the network says at T near the outline: float32 [16 h, 16 w] inside a box."""
        left, top, right, bottom = self.box
        fine = np.full(self.logits.shape, OUTSIDE, np.float32)
        both = (max(left, box[0]), max(top, box[1]), min(right, box[2]), min(bottom, box[3]))
        if both[0] < both[2] and both[1] < both[3]:
            fine[_pixels(both, self.box)] = inside[_pixels(both, box)]
        return np.where(self.near, fine, self.logits)


def spread(inside: Float32, box: TokenBox, coarse: Frame, frame: Frame) -> Spread | None:
    """What was found in the coarse frame, float32 [16 h, 16 w] inside a box of tokens; None where nothing was."""
    found = (inside > 0).view(np.uint8)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    if len(rows) == 0:
        return None
    square = np.ones((2 * REACH + 1,) * 2, np.uint8)
    # Over the box's border too: there the outline may be the box. A picture's border is no outline, but harmless.
    wide = cv2.copyMakeBorder(found, *(REACH + 1,) * 4, cv2.BORDER_CONSTANT)
    near = cv2.dilate(wide, square) - cv2.erode(wide, square)

    # The larger frame's pixel y shows what the coarse one's (y + 1/2) step - 1/2 does.
    step_y, step_x = (few / many for few, many in zip(coarse.valid, frame.valid, strict=True))
    top, left = _TOKEN * box[1], _TOKEN * box[0]
    end = frame.size // _TOKEN
    spread_box = (
        max(int((left + columns[0] - REACH - 1) / step_x) // _TOKEN, 0),
        max(int((top + rows[0] - REACH - 1) / step_y) // _TOKEN, 0),
        min(-int(-(left + columns[-1] + REACH + 2) / step_x // _TOKEN), end),
        min(-int(-(top + rows[-1] + REACH + 2) / step_y // _TOKEN), end),
    )
    width, height = (_TOKEN * (spread_box[2 + axis] - spread_box[axis]) for axis in (0, 1))

    x = (_TOKEN * spread_box[0] + 0.5) * step_x - 0.5 - left
    y = (_TOKEN * spread_box[1] + 0.5) * step_y - 0.5 - top

    def warped(values: npt.NDArray[Any], margin: int, how: int, outside: float) -> npt.NDArray[Any]:
        places = np.asarray([[step_x, 0, x + margin], [0, step_y, y + margin]])
        return cv2.warpAffine(values, places, (width, height), flags=how | cv2.WARP_INVERSE_MAP, borderValue=outside)

    logits = np.asarray(warped(inside, 0, cv2.INTER_LINEAR, OUTSIDE), np.float32)
    return Spread(logits, warped(near, REACH + 1, cv2.INTER_NEAREST, 0).astype(np.bool_), spread_box)


def _pixels(part: TokenBox, box: TokenBox) -> tuple[slice, slice]:
    """Where a part of the frame lies inside a box of it."""
    left, top, right, bottom = (_TOKEN * (side - box[n % 2]) for n, side in enumerate(part))
    return slice(top, bottom), slice(left, right)


__all__ = ["MARGIN", "REACH", "Spread", "spread"]
