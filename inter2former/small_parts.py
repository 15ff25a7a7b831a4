"""Small parts of a mask, islands and holes, that change their side.

No network and no clicks here: only logits and the pixels about which somebody said something. `flip` is the twin of
csrc/small_parts.cpp.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

LEAST = 0.01  # size of the logit of a pixel that was moved to the other side: as undecided as it can be


def flip(logits: Float32, spoken: Mask, share: float, *, inside: bool) -> Float32 | None:
    """Logits after small parts of one side went to the other.

    logits   float32 [h, w], finite
    spoken   bool [h, w]: a part with such a pixel stays
    share    a part is small below this share of the largest island, or of all that is inside
    inside   islands: parts (of eight neighbours) of what is above 0. Else holes: parts (of four) of the rest, but for
             those that reach the border
    returns  float32 [h, w], or None where every part stays
    """
    side = (logits > 0) == inside
    if inside:
        _, part, about, _ = cv2.connectedComponentsWithStats(side.view(np.uint8), connectivity=8)
    else:
        # With a border: what reaches the edge is one part with it, and no hole.
        padded = cv2.copyMakeBorder(side.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
        _, part, about, _ = cv2.connectedComponentsWithStats(padded, connectivity=4)
        around, part = part[0, 0], part[1:-1, 1:-1]
    areas = about[:, cv2.CC_STAT_AREA]
    whole = areas[1:].max(initial=0) if inside else side.size - np.count_nonzero(side)
    small = areas < share * whole
    small[part[spoken & side]] = False
    small[0] = False
    if not inside:
        small[around] = False
    moved = small[part]
    if not moved.any():
        return None
    flipped = logits.copy()
    least = np.maximum(np.abs(logits[moved]), np.float32(LEAST))
    flipped[moved] = -least if inside else least
    return flipped


__all__ = ["LEAST", "flip"]
