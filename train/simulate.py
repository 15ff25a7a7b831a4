"""The simulated annotator: how a reference mask comes about during training.

Starts (nothing, a box, a wrong mask), first clicks and corrective clicks of one object at crop resolution.
The states themselves and their transitions are the core's (inter2former.reference_mask); no network here.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from inter2former import random_walk, reference_mask
from inter2former.config import ModelConfig

Array = np.ndarray
Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class ClickConfig:
    """How the annotator behaves; each value with its reason."""

    decay: float = 0.75  # p(n rounds) ~ decay ** n: most steps see few clicks (the released implementation: 0.6)
    max_rounds: int = 10  # beyond it little changes
    spread: float = 1.7  # corrective clicks fall anywhere deeper than max / spread, as the released implementation
    random_first: float = 0.25  # users do not click the centre
    jitter: int = 4  # pixels a first click is off its aim, inside the object
    box: float = 0.1  # starts from a box prompt ...
    box_only: float = 0.5  # ... of which this share sees no click at first
    mask: float = 0.1  # starts from a wrong mask, as after an import or on a neighbouring frame
    slip: float = 0.01  # clicks of the wrong sign: one slip must not destroy the mask


def draw_rounds(config: ClickConfig, rng: Rng) -> int:
    """Number of corrective rounds after the first prompt, truncated geometric."""
    weights = config.decay ** np.arange(config.max_rounds + 1)
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def depth(region: Array) -> tuple[Array, tuple[int, int]]:
    """Distance to the outside of a region (bool [H, W]; the image border is outside) in its bounding box, and the
    box's corner (row, column). Pixels; zero outside the region."""
    x, y, w, h = cv2.boundingRect(region.astype(np.uint8))
    inner = cv2.copyMakeBorder(region[y : y + h, x : x + w].astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    return cv2.distanceTransform(inner, cv2.DIST_L2, 3)[1:-1, 1:-1], (y, x)


def pick(region: Array, rng: Rng, spread: float = 1.0) -> tuple[int, int] | None:
    """A pixel (row, column) among those of depth >= deepest / spread; None for an empty region."""
    if not region.any():
        return None
    distance, (y, x) = depth(region)
    candidates = np.argwhere(distance >= distance.max() / spread)
    row, column = candidates[rng.integers(len(candidates))]
    return int(row) + y, int(column) + x


class Annotator:
    """One object of one crop: holds its reference mask and clicks it into shape."""

    def __init__(
        self, target: Array, valid_hw: tuple[int, int], model: ModelConfig, config: ClickConfig, rng: Rng
    ) -> None:
        """target bool [T, T], false outside the valid rows and columns."""
        self.target, self.config, self.radius, self.rng = target, config, model.click_radius, rng
        self.inside = np.zeros(target.shape, bool)
        self.inside[: valid_hw[0], : valid_hw[1]] = True
        self.clicked = np.zeros(target.shape, bool)
        self.state = reference_mask.initial(target.shape[0], model.initial_reference)
        self.worth = 0  # clicks that the start tells as much as
        roll = rng.random()
        if roll < config.box:
            self.worth = random_walk.WORTH
            self.state = reference_mask.limit_to_box(self.state, self._loose_box(valid_hw))
            if rng.random() >= config.box_only:
                self._first_clicks()
        elif roll < config.box + config.mask:
            wrong = disturb(target, rng) & self.inside
            self.worth = random_walk.WORTH
            self.state = reference_mask.from_mask(wrong)
            self._correct(wrong)
        else:
            self._first_clicks()

    def round(self, prediction: Array) -> None:
        """Fold a prediction (bool [T, T]) in and click where it is most wrong."""
        self.state = reference_mask.apply_prediction(self.state, prediction)
        self._correct(prediction)

    def _first_clicks(self) -> None:
        if self.rng.random() < self.config.random_first:
            inside = np.argwhere(self.target)
            for row, column in inside[self.rng.integers(len(inside), size=int(self.rng.choice([1, 1, 2, 3])))]:
                self._click(int(row), int(column), True)
            return
        row, column = pick(self.target, self.rng) or (0, 0)
        reach = self.config.jitter
        near_row, near_column = (
            row + int(self.rng.integers(-reach, reach + 1)),
            column + int(self.rng.integers(-reach, reach + 1)),
        )
        near_row, near_column = (int(np.clip(v, 0, len(self.target) - 1)) for v in (near_row, near_column))
        if self.target[near_row, near_column]:
            row, column = near_row, near_column
        self._click(row, column, True)

    def _correct(self, prediction: Array) -> None:
        free = self.inside & ~self.clicked
        missed, extra = self.target & ~prediction & free, ~self.target & prediction & free
        deepest = [depth(region)[0].max() if region.any() else 0.0 for region in (missed, extra)]
        if max(deepest) == 0:
            return
        positive = bool(deepest[0] > deepest[1])
        place = pick(missed if positive else extra, self.rng, self.config.spread)
        if place is not None:
            self._click(*place, positive != (self.rng.random() < self.config.slip))

    def _click(self, row: int, column: int, positive: bool) -> None:
        self.clicked[row, column] = True
        self.state = reference_mask.paint_clicks(self.state, [(row, column, positive)], self.radius)

    def _loose_box(self, valid_hw: tuple[int, int]) -> tuple[int, int, int, int]:
        """The object's box as people draw it: a few pixels too tight, more often too loose."""
        x, y, w, h = cv2.boundingRect(self.target.astype(np.uint8))
        room = 0.1 * max(w, h) + 2
        left, top, right, bottom = np.round(
            np.array([x, y, x + w, y + h]) + self.rng.uniform(-0.3, 1, 4) * room * [-1, -1, 1, 1]
        ).astype(int)
        left, top = max(0, min(left, x + w // 2)), max(0, min(top, y + h // 2))
        return left, top, min(valid_hw[1], max(right, left + 2)), min(valid_hw[0], max(bottom, top + 2))


def disturb(target: Array, rng: Rng) -> Array:
    """A mask as it comes from elsewhere, bool [T, T]: grown, shrunk, shifted, coarse, a part missing or added."""
    mask: Array = target.astype(np.uint8)
    size = max(1.0, float(np.sqrt(mask.sum())))
    roll = int(rng.integers(5))
    reach = int(np.clip(round(size * rng.uniform(0.02, 0.15)), 1, 24))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    if roll == 0:
        mask = cv2.dilate(mask, kernel)
    elif roll == 1:
        mask = cv2.erode(mask, kernel)
    elif roll == 2:
        dx, dy = rng.integers(-reach, reach + 1, 2)
        shift = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
        mask = cv2.warpAffine(mask, shift, mask.shape[::-1])
    elif roll == 3:
        n = int(rng.integers(8, 33))
        mask = cv2.resize(cv2.resize(mask * 255, (n, n), interpolation=cv2.INTER_AREA), mask.shape[::-1]) // 128
    x, y, w, h = cv2.boundingRect(target.astype(np.uint8))
    if roll == 4 or rng.random() < 0.4:
        cx, cy = x + rng.uniform(0, 1) * w, y + rng.uniform(0, 1) * h
        axes = (max(2, int(w * rng.uniform(0.1, 0.5))), max(2, int(h * rng.uniform(0.1, 0.5))))
        cv2.ellipse(mask, ((cx, cy), (2 * axes[0], 2 * axes[1]), rng.uniform(0, 180)), int(rng.integers(2)), -1)
    return mask > 0
