"""What a person says to the model: clicks, boxes and their order. Validation lives here; pixels of the model do not.

Frames: all coordinates here are in the image, x to the right, y down, (x, y) = (0, 0) is the left top pixel's
corner; the pixel under a click is (floor(x), floor(y)).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from inter2former.errors import PromptError


def _finite(what: str, **values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or (not isinstance(value, int | float) and not hasattr(value, "__float__")):
            raise PromptError(f"{what}: {name} is {value!r}, not a number.")
        if not math.isfinite(value):
            raise PromptError(f"{what}: {name} is {value!r}, not a finite number.")


@dataclasses.dataclass(frozen=True)
class Click:
    """One point, positive (on the object) or negative (off it), in image pixels."""

    x: float
    y: float
    positive: bool = True

    def __post_init__(self) -> None:
        _finite("Click", x=self.x, y=self.y)
        object.__setattr__(self, "x", float(self.x))
        object.__setattr__(self, "y", float(self.y))
        object.__setattr__(self, "positive", bool(self.positive))

    def pixel(self, height: int, width: int) -> tuple[int, int]:
        """(row, column) under the click; PromptError outside [0, width) x [0, height)."""
        if not (0 <= self.x < width and 0 <= self.y < height):
            raise PromptError(
                f"Click ({self.x:g}, {self.y:g}) is outside the image of {width} x {height} pixels.",
                "x is counted to the right from 0, y down from 0.",
            )
        return int(self.y), int(self.x)


@dataclasses.dataclass(frozen=True)
class Box:
    """An axis-aligned box [x0, x1) x [y0, y1) in image pixels; corners may be given in any order."""

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        _finite("Box", x0=self.x0, y0=self.y0, x1=self.x1, y1=self.y1)
        x0, x1 = sorted((float(self.x0), float(self.x1)))
        y0, y1 = sorted((float(self.y0), float(self.y1)))
        for name, value in (("x0", x0), ("y0", y0), ("x1", x1), ("y1", y1)):
            object.__setattr__(self, name, value)

    def clipped(self, height: int, width: int) -> Box:
        """The part inside the image; PromptError when nothing is left."""
        x0, x1 = max(self.x0, 0.0), min(self.x1, float(width))
        y0, y1 = max(self.y0, 0.0), min(self.y1, float(height))
        if x0 >= x1 or y0 >= y1:
            raise PromptError(
                f"Box ({self.x0:g}, {self.y0:g}, {self.x1:g}, {self.y1:g}) has no area inside the image "
                f"of {width} x {height} pixels."
            )
        return Box(x0, y0, x1, y1)


def check_clicks(clicks: Sequence[Click]) -> tuple[Click, ...]:
    """The clicks as a tuple; PromptError when the argument is not a sequence of Click."""
    if isinstance(clicks, Click):
        raise PromptError("clicks is one Click; give a list of them.", "segment(image, [Click(x, y)])")
    try:
        found = tuple(clicks)
    except TypeError as error:
        raise PromptError(f"clicks is a {type(clicks).__name__}; give a list of Click.") from error
    for index, click in enumerate(found):
        if not isinstance(click, Click):
            raise PromptError(f"clicks[{index}] is a {type(click).__name__}; give Click(x, y, positive).")
    return found
