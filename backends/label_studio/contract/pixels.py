"""From percent to the prompts of the core: clicks, boxes and painted masks in pixels of the image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np

from backends.label_studio.contract.context import Interaction, Point
from backends.label_studio.contract.values import Mask, region_mask
from inter2former.errors import PromptError
from inter2former.prompts import Box, Click


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One object to segment, in image pixels: arguments of `Segmenter.segment`."""

    clicks: tuple[Click, ...] = ()
    box: Box | None = None
    strokes: Mask | None = None

    @property
    def says_something(self) -> bool:
        """Negative clicks alone do not say what is meant."""
        return self.box is not None or self.strokes is not None or any(click.positive for click in self.clicks)


def shown_size(interaction: Interaction, height: int, width: int) -> tuple[int, int]:
    """(height, width) that the page works with, for an image of this size: what it says, or the image's own.

    raises  PromptError when the page's is so much larger that it cannot be the same image
    """
    shown = (interaction.height or height, interaction.width or width)
    if shown[0] * shown[1] > max(4 * height * width, 2**24):
        raise PromptError(
            f"The context is about an image of {shown[1]} x {shown[0]} pixels; the task's has {width} x {height}."
        )
    return shown


def prompts(interaction: Interaction, height: int, width: int, polarity: Callable[[Point], bool]) -> tuple[Prompt, ...]:
    """The objects of an interaction on an image of this size, in drawing order.

    Clicks and strokes belong to one object; each rectangle is an object of its own. Clicks that come with rectangles
    correct the last one. Strokes become content of the reference mask and a positive click on each painted part.

    raises  PromptError when a stroke is not a mask of the size that the page stated
    """
    clicks = tuple(
        Click(pixel(point.x, width), pixel(point.y, height), polarity(point)) for point in interaction.points
    )
    boxes = [
        Box(r.x0 * width / 100.0, r.y0 * height / 100.0, r.x1 * width / 100.0, r.y1 * height / 100.0)
        for r in interaction.rectangles
    ]
    painted = _painted(interaction, height, width)
    if painted is not None:
        clicks = (*_stroke_clicks(painted), *clicks)
    if not boxes:
        return (Prompt(clicks, None, painted),)
    *others, last = boxes
    return (*(Prompt(box=box) for box in others), Prompt(clicks, last, painted))


def pixel(percent: float, side: int) -> float:
    """The coordinate in pixels; 100 percent is the last pixel, not the one behind it."""
    return min(percent * side / 100.0, side - 0.5)


def _painted(interaction: Interaction, height: int, width: int) -> Mask | None:
    """All strokes as one mask of the image, or None when nothing is painted."""
    stated = shown_size(interaction, height, width)
    painted: Mask | None = None
    for stroke in interaction.strokes:
        mask = region_mask(stroke.value, *stated)
        painted = mask if painted is None else painted | mask
    if painted is None or not painted.any():
        return None
    painted = resize_mask(painted, height, width)
    return painted if painted.any() else None


def _stroke_clicks(painted: Mask) -> tuple[Click, ...]:
    """A positive click in the middle of each connected part, the largest parts first."""
    count, parts, stats, _ = cv2.connectedComponentsWithStats(painted.view(np.uint8), connectivity=8)
    order = sorted(range(1, count), key=lambda part: (-int(stats[part, cv2.CC_STAT_AREA]), part))
    clicks = []
    for part in order[:8]:  # more than a person paints; specks of a finished mask are not prompts
        left, top, w, h = (int(value) for value in stats[part, :4])
        inside = np.pad((parts[top : top + h, left : left + w] == part).astype(np.uint8), 1)
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        clicks.append(Click(left + int(column) + 0.5, top + int(row) + 0.5, True))
    return tuple(clicks)


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """bool [height, width]; the mask itself when it has that size."""
    if mask.shape == (height, width):
        return mask
    scaled = cv2.resize(mask.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return scaled.astype(bool)
