"""Masks and the `value` of a region, both ways, for every control: brush, bitmask, polygon and rectangle."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from backends.label_studio.contract.foreign import as_number
from inter2former import brush_rle
from inter2former.errors import PromptError
from inter2former.images import MAX_PIXELS
from inter2former.masks import mask_to_polygons, polygons_to_mask

Mask = npt.NDArray[np.bool_]
TOLERANCE = 1.5  # pixels that an answered outline may leave the mask's; see mask_to_polygons
_SPECK = 1 / 200  # of an object's area: parts and holes below are left out of its outlines


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """The rectangle around a drawn one that may be turned, in percent of the image."""

    x0: float
    y0: float
    x1: float
    y1: float


def region_mask(value: Mapping[str, Any], height: int, width: int) -> Mask:
    """bool [H, W] of a region's `value`: brush RLE, bitmask picture, polygon or rectangle.

    raises  PromptError for anything else, for another size, and for what cannot be read
    """
    if isinstance(value.get("rle"), list):
        return brush_rle.decode(value["rle"], height, width)
    picture = value.get("imageDataURL")
    if isinstance(picture, str) and picture.startswith("data:image/png;base64,"):
        try:
            data = base64.b64decode(picture.partition(",")[2], validate=True)
        except ValueError:
            raise PromptError("The picture of a bitmask region is not base64.") from None
        # Inside is what is opaque: the page paints the label's colour, which may be black.
        rgba = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if _png_size(data) else None
        if rgba is None or rgba.shape != (height, width, 4):
            raise PromptError(f"The picture of a bitmask region is not an RGBA image of {width} x {height} pixels.")
        return np.asarray(rgba[..., 3] >= 128)
    points = value.get("points")
    if isinstance(points, list):
        try:
            outline = np.asarray(points, np.float64) * (width / 100.0, height / 100.0)
        except (TypeError, ValueError):
            raise PromptError("A polygon region is a list of [x, y] percents.") from None
        return polygons_to_mask([outline], height, width)
    x, y = as_number(value.get("x")), as_number(value.get("y"))
    box = box_of(x, y, value, (width, height)) if x is not None and y is not None else None
    if box is None:
        raise PromptError("The region has no mask.")
    mask = np.zeros((height, width), np.bool_)
    mask[
        round(box.y0 * height / 100) : round(box.y1 * height / 100),
        round(box.x0 * width / 100) : round(box.x1 * width / 100),
    ] = True
    return mask


def box_of(x: float, y: float, value: Mapping[str, Any], size: tuple[int, int] | None) -> Rectangle | None:
    """The upright box around a rectangle turned clockwise about (x, y), cut to the image; None without area."""
    width, height = as_number(value.get("width")), as_number(value.get("height"))
    turn = as_number(value.get("rotation", 0))
    if width is None or height is None:
        return None
    # Percent of width and of height are different lengths: the turn is made in pixels.
    w, h = size or (1, 1)
    angle = math.radians(math.fmod(turn or 0.0, 360.0))
    sine, cosine = math.sin(angle), math.cos(angle)
    if not angle:
        sine, cosine = 0.0, 1.0
    corners = [
        (x + (dx * w * cosine - dy * h * sine) / w, y + (dx * w * sine + dy * h * cosine) / h)
        for dx in (0.0, width)
        for dy in (0.0, height)
    ]
    if not all(math.isfinite(part) for corner in corners for part in corner):
        return None
    xs, ys = zip(*corners, strict=True)
    box = Rectangle(clamp(min(xs)), clamp(min(ys)), clamp(max(xs)), clamp(max(ys)))
    return box if box.x0 < box.x1 and box.y0 < box.y1 else None


def _png_size(data: bytes) -> bool:
    """Whether the header promises a picture within the limit: looked at before anything is unpacked."""
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    return 0 < int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big") <= MAX_PIXELS


def region_values(mask: Mask, kind: str, tolerance: float) -> Iterator[dict[str, Any]]:
    if kind.startswith("brush"):
        yield {"format": "rle", "rle": brush_rle.encode(mask)}
    elif kind.startswith("bitmask"):
        yield {"imageDataURL": _png_data_url(mask)}
    elif kind.startswith("rectangle"):
        height, width = mask.shape
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top = int(columns[0]), int(rows[0])
        yield {
            "x": left * 100.0 / width,
            "y": top * 100.0 / height,
            "width": (int(columns[-1]) + 1 - left) * 100.0 / width,
            "height": (int(rows[-1]) + 1 - top) * 100.0 / height,
            "rotation": 0,
        }
    else:
        height, width = mask.shape
        least = _SPECK * int(mask.sum())
        polygons = sorted(mask_to_polygons(mask, tolerance), key=lambda polygon: -_area(polygon[0]))
        for position, (outline, holes) in enumerate(polygons):
            if position and _area(outline) < least:
                break
            percent = with_holes(outline, [hole for hole in holes if _area(hole) >= least]) * (
                100.0 / width,
                100.0 / height,
            )
            yield {"points": [[float(x), float(y)] for x, y in percent], "closed": True}


def _area(outline: npt.NDArray[np.float64]) -> float:
    return float(cv2.contourArea(outline.astype(np.float32)))


def with_holes(outline: npt.NDArray[np.float64], holes: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """float64 [N, 2]: one outline that leaves the holes out, for a platform whose polygons have none.

    Each hole is joined where it comes closest, by a cut of no width: there and back along the same line. Under the
    even-odd rule that encloses what the polygon with its holes does; holes turn the other way, so under the non-zero
    rule too.
    """
    merged, left = outline, list(holes)
    clockwise = _signed_area(outline) > 0
    while left:
        distances = [np.hypot(*(merged[:, None] - hole[None]).transpose(2, 0, 1)) for hole in left]
        nearest_hole = min(range(len(left)), key=lambda index: float(distances[index].min()))
        hole = left.pop(nearest_hole)
        table = distances[nearest_hole]
        at, to = (int(index) for index in np.unravel_index(int(table.argmin()), table.shape))
        ring = np.roll(hole, -to, axis=0)
        if (_signed_area(hole) > 0) == clockwise:
            ring = np.roll(ring[::-1], 1, axis=0)
        merged = np.concatenate([merged[: at + 1], ring, ring[:1], merged[at:]])
    return merged


def _signed_area(outline: npt.NDArray[np.float64]) -> float:
    x, y = outline.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def _png_data_url(mask: Mask) -> str:
    """RGBA as the page wants it: black, opaque inside."""
    rgba = np.zeros((*mask.shape, 4), np.uint8)
    rgba[mask, 3] = 255
    out = io.BytesIO()
    Image.fromarray(rgba).save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def clamp(percent: float) -> float:
    return min(max(percent, 0.0), 100.0) + 0.0  # + 0.0 turns -0.0 into 0.0
