"""The reference mask M_ref (paper 3.3): what is known of every pixel, and how clicks and predictions change it.

State, uint8 [T, T] in the model frame:

    0 definite background    1 possible background    2 unknown    3 possible foreground    4 definite foreground

Clicks write 0 or 4 and win over everything; a prediction only moves 1, 2, 3, and a pixel that contradicts its
state passes through 2 first, so that a flip needs two predictions. Pure functions: no argument is modified.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from inter2former.errors import PromptError

State = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

DEFINITE_BACKGROUND, POSSIBLE_BACKGROUND, UNKNOWN, POSSIBLE_FOREGROUND, DEFINITE_FOREGROUND = range(5)

# _NEXT[8 * prediction + state] -> state
_NEXT = np.zeros(256, np.uint8)
_NEXT[0:5] = 0, 1, 1, 2, 4
_NEXT[8:13] = 0, 2, 3, 3, 4

# Width of the unknown band around the outline of a given mask, in pixels each side: people's masks are a few
# pixels off, and only unknown or near-boundary tokens are looked at with full attention.
MASK_BAND = 8


def initial(size: int, value: int = UNKNOWN) -> State:
    """The state before any prompt: `value` everywhere, uint8 [size, size]."""
    return np.full((size, size), value, dtype=np.uint8)


def paint_clicks(state: State, clicks: Sequence[tuple[int, int, bool]], radius: int) -> State:
    """Write one group of clicks.

    clicks   (row, column, positive) in model pixels, in the order given; all inside the state
    radius   a pixel belongs to a disc iff its squared distance is at most radius**2
    returns  a new state; where discs of both signs overlap, the sign whose first click comes later wins
    raises   PromptError when a click lies outside
    """
    height, width = state.shape
    painted = state.copy()
    first: dict[bool, int] = {}
    for index, (row, column, positive) in enumerate(clicks):
        if not (0 <= row < height and 0 <= column < width):
            raise PromptError(f"Click at row {row}, column {column} is outside the model frame of {width} x {height}.")
        first.setdefault(positive, index)
    for sign in sorted(first, key=lambda positive: first[positive]):
        for row, column, positive in clicks:
            if positive == sign:
                _paint_disc(painted, row, column, radius, DEFINITE_FOREGROUND if sign else DEFINITE_BACKGROUND)
    return painted


def _paint_disc(state: State, row: int, column: int, radius: int, label: int) -> None:
    height, width = state.shape
    top, bottom = max(row - radius, 0), min(row + radius + 1, height)
    left, right = max(column - radius, 0), min(column + radius + 1, width)
    rows = np.arange(top, bottom)[:, None] - row
    columns = np.arange(left, right)[None, :] - column
    state[top:bottom, left:right][rows * rows + columns * columns <= radius * radius] = label


def apply_prediction(state: State, prediction: Mask) -> State:
    """Fold one prediction (bool [T, T]) into the state; see the table in the release and in the file's head."""
    if prediction.shape != state.shape or prediction.dtype != np.bool_:
        raise PromptError(f"Prediction is {prediction.dtype} {prediction.shape}, want bool {state.shape}.")
    after = cv2.LUT(state | (prediction.view(np.uint8) << np.uint8(3)), _NEXT)  # seven times as fast as indexing
    return after.reshape(state.shape).astype(np.uint8, copy=False)


def from_mask(mask: Mask, band: int = MASK_BAND) -> State:
    """State that starts from a given mask (bool [T, T]): possible labels, unknown in a band around the outline."""
    pixels = mask.astype(np.uint8)
    kernel = np.ones((2 * band + 1, 2 * band + 1), np.uint8)
    uncertain = cv2.dilate(pixels, kernel) != cv2.erode(pixels, kernel)
    state = np.where(mask, np.uint8(POSSIBLE_FOREGROUND), np.uint8(POSSIBLE_BACKGROUND))
    state[uncertain] = UNKNOWN
    return state


def limit_to_box(state: State, box: tuple[int, int, int, int]) -> State:
    """Mark everything outside the box (left, top, right, bottom; half-open, model pixels) as possible background."""
    left, top, right, bottom = box
    if not (0 <= left < right <= state.shape[1] and 0 <= top < bottom <= state.shape[0]):
        raise PromptError(f"Box {box} has no area inside the model frame of {state.shape[1]} x {state.shape[0]}.")
    limited = np.full_like(state, POSSIBLE_BACKGROUND)
    limited[top:bottom, left:right] = state[top:bottom, left:right]
    return limited
