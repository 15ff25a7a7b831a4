"""Masks on their way in and out: COCO run lengths, polygons with holes, PNG, the boundary band and the overlay picture.

All of it works in the frame of the image, on bool [H, W]. What comes in may be hostile: sizes, counts and vertices
are checked before memory is taken, and every lie is a PromptError. Label Studio's own run-length code is in
brush_rle.py; the resize to the model's frame is in images.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from inter2former.errors import ImageError, PromptError
from inter2former.images import MAX_PIXELS, UInt8, open_upright
from inter2former.prompts import Box, Click

Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]  # [N, 2]: x, y in image pixels, (0, 0) the left top corner of the left top pixel
Polygon = tuple[Points, list[Points]]  # an outline and the holes in it

MAX_VERTICES = 1_000_000
MAX_POLYGONS = 20_000
MAX_CROSSINGS = 5_000_000  # of one polygon's edges with rows of pixels: more than any outline an annotator draws
POLYGON_ERROR = 0.15  # of an object's area; see mask_to_polygons


def _check_mask(mask: npt.NDArray[Any]) -> None:
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2 or mask.size == 0:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise PromptError(f"The mask is {found}.", "Give a bool array [H, W].")


def _check_size(height: Any, width: Any, max_pixels: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise PromptError(f"The mask's {name} is {value!r}, not a whole number of at least 1.")
    if int(height) * int(width) > max_pixels:
        raise PromptError(f"The mask of {width} x {height} pixels is over the limit of {max_pixels}.")


# ---------------------------------------------------------------------------------------------------------------
# COCO run lengths
# ---------------------------------------------------------------------------------------------------------------


def rle_encode(mask: Mask) -> dict[str, list[int]]:
    """{"size": [H, W], "counts": [...]}: COCO's uncompressed form, down the columns, the first run outside."""
    _check_mask(mask)
    flat = cv2.transpose(mask.view(np.uint8)).reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(edges, prepend=0, append=flat.size).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def rle_decode(rle: Any, *, max_pixels: int = MAX_PIXELS) -> Mask:
    """bool [H, W] from COCO's form, `counts` as a list or as COCO's compressed text.

    raises  PromptError when it is not such an object, is over `max_pixels`, or its runs do not fill its size exactly
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise PromptError("A COCO mask is an object with 'size' and 'counts'.")
    size = rle["size"]
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise PromptError("A COCO mask's 'size' is [height, width].")
    height, width = size
    _check_size(height, width, max_pixels)
    n_pixels = int(height) * int(width)
    counts = _counts(rle["counts"], n_pixels)
    if (total := int(counts.sum())) != n_pixels:
        raise PromptError(f"The runs of the COCO mask cover {total} pixels; {width} x {height} are {n_pixels}.")
    inside = np.zeros(len(counts), np.uint8)
    inside[1::2] = 1
    return cv2.transpose(np.repeat(inside, counts).reshape(int(width), int(height))).view(np.bool_)


def _counts(counts: Any, n_pixels: int) -> npt.NDArray[np.int64]:
    """The runs as int64, each in 0..n_pixels, so that their sum cannot overflow."""
    if isinstance(counts, str | bytes):
        counts = _uncompressed(counts, n_pixels)
    if not isinstance(counts, list | tuple | np.ndarray) or len(counts) == 0:
        raise PromptError("A COCO mask's 'counts' is a list of run lengths or compressed text.")
    if len(counts) > n_pixels + 1:
        raise PromptError(f"The COCO mask has {len(counts)} runs for {n_pixels} pixels.")
    try:
        runs = np.asarray(counts)
    except (ValueError, OverflowError) as error:  # ragged lists
        raise PromptError("A COCO mask's 'counts' holds whole numbers only.") from error
    if runs.ndim != 1 or runs.dtype.kind not in "iu":
        raise PromptError("A COCO mask's 'counts' holds whole numbers only.")
    if runs.min() < 0 or runs.max() > n_pixels:
        raise PromptError(f"The COCO mask has a run of {runs.min() if runs.min() < 0 else runs.max()} pixels.")
    return runs.astype(np.int64)


def _uncompressed(text: str | bytes, n_pixels: int) -> list[int]:
    """COCO's compressed counts: five bits a character from '0' on, low bits first, bit 5 set when more follow, the
    sign in the last one's bit 4; from the fourth run on the difference to the run before the last."""
    try:
        codes = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise PromptError(
            "The compressed counts of the COCO mask hold a character that is not one of theirs."
        ) from error
    counts: list[int] = []
    value = shift = 0
    for code in codes:
        code -= 48
        if not 0 <= code < 64:
            raise PromptError("The compressed counts of the COCO mask hold a character that is not one of theirs.")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            if shift > 60:
                raise PromptError("The compressed counts of the COCO mask hold an endless number.")
            continue
        if code & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if not 0 <= value <= n_pixels:
            raise PromptError(f"The COCO mask has a run of {value} pixels.")
        counts.append(value)
        value = shift = 0
    if shift:
        raise PromptError("The compressed counts of the COCO mask are cut short.")
    return counts


# ---------------------------------------------------------------------------------------------------------------
# Polygons
# ---------------------------------------------------------------------------------------------------------------


def mask_to_polygons(mask: Mask, tolerance: float = 1.5) -> list[Polygon]:
    """The outlines of a mask along the edges of its pixels, one (outline, holes) for each connected part.

    Points are float64 [N, 2] in image pixels, N >= 3, without repetition of the first. Pixels that touch at a corner
    are connected. `tolerance` (pixels) simplifies by Douglas and Peucker, but never so much that more than 15 % of a
    part's area could change: `polygons_to_mask` of the result has IoU >= 0.85 with the mask, in practice 0.95 and
    more; with tolerance 0 it is the mask. At 1.5 a slanted edge, a staircase of up to a pixel, becomes one line; at
    1.0 a disc of radius 1000 keeps ten times the points.
    """
    _check_mask(mask)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise PromptError(f"The polygon tolerance is {tolerance!r}, not a number of pixels from 0 on.")
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return []
    top, left = int(rows[0]), int(columns[0])
    part = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].view(np.uint8)
    # OpenCV's contours go through pixel centres. At twice the size each pixel has four, and the next corner of
    # the original grid is found by rounding: (c + 1) // 2.
    twice = cv2.resize(part, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, hierarchy = cv2.findContours(twice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    del twice
    corners = [((contour.reshape(-1, 1, 2) + 1) // 2).astype(np.int32) for contour in contours]
    children: dict[int, list[int]] = {i: [] for i, parent in enumerate(hierarchy[0, :, 3]) if parent < 0}
    for i, parent in enumerate(hierarchy[0, :, 3].tolist()):
        if parent >= 0:
            children[parent].append(i)
    offset = np.array([left, top], np.float64)
    polygons: list[Polygon] = []
    for outer, holes in children.items():
        members = [corners[i] for i in (outer, *holes)]
        area = cv2.contourArea(members[0]) - sum(cv2.contourArea(hole) for hole in members[1:])
        length = sum(cv2.arcLength(member, True) for member in members)
        # The pixels that change lie within `epsilon` of the outline: no more than epsilon * length of them.
        epsilon = min(tolerance, POLYGON_ERROR * area / length)
        outline, *inner = (_simplified(member, epsilon) + offset for member in members)
        polygons.append((outline, inner))
    return polygons


def _simplified(contour: npt.NDArray[np.int32], epsilon: float) -> Points:
    """[N, 1, 2] to [M, 2]; what would collapse to a line or a point stays as it is."""
    less = cv2.approxPolyDP(contour, epsilon, True)
    kept = less if len(less) >= 3 else cv2.approxPolyDP(contour, 0, True)
    return kept.reshape(-1, 2).astype(np.float64)


def polygons_to_mask(polygons: Sequence[Any], height: int, width: int, *, max_pixels: int = MAX_PIXELS) -> Mask:
    """bool [H, W]: pixels whose centre is inside any polygon, an (outline, holes) pair or an outline [N, 2] alone.

    Outline and holes of one polygon together follow the even-odd rule; what lies outside the image is cut off.

    raises  PromptError: fewer than 3 points, not numbers, not finite, or more work than an honest mask needs
    """
    _check_size(height, width, max_pixels)
    if len(polygons) > MAX_POLYGONS:
        raise PromptError(f"There are {len(polygons)} polygons, over the limit of {MAX_POLYGONS}.")
    mask = np.zeros((height, width), np.bool_)
    n_vertices = work = 0
    for polygon in polygons:
        pair = isinstance(polygon, tuple) and len(polygon) == 2 and isinstance(polygon[1], list)
        rings = [_points(ring) for ring in ([polygon[0], *polygon[1]] if pair else [polygon])]
        n_vertices += sum(len(ring) for ring in rings)
        if n_vertices > MAX_VERTICES:
            raise PromptError(f"The polygons have over {MAX_VERTICES} points.")
        low, high = np.min([ring.min(0) for ring in rings], 0), np.max([ring.max(0) for ring in rings], 0)
        left, top = (int(value) for value in np.clip(np.floor(low), 0, (width, height)))
        right, bottom = (int(value) for value in np.clip(np.ceil(high), 0, (width, height)))
        if left >= right or top >= bottom:
            continue
        work += (right - left) * (bottom - top)
        if work > 50 * height * width:
            raise PromptError("The polygons cover the image more than 50 times.")
        _fill(mask[top:bottom, left:right], [ring - (left, top) for ring in rings])
    return mask


def _points(ring: Any) -> Points:
    if isinstance(ring, list | tuple | np.ndarray) and len(ring) > MAX_VERTICES:
        raise PromptError(f"A polygon has {len(ring)} points, over the limit of {MAX_VERTICES}.")
    try:
        points = np.asarray(ring, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise PromptError("A polygon is a list of [x, y] numbers.") from error
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise PromptError(f"A polygon is a list of at least three [x, y], not an array of shape {list(points.shape)}.")
    if not np.isfinite(points).all():
        raise PromptError("A polygon has a point that is not finite.")
    if np.abs(points).max() > 1e9:
        raise PromptError("A polygon has a point that is more than 10**9 pixels away.")
    return points


def _fill(out: Mask, rings: list[Points]) -> None:
    """Or the even-odd interior of the rings into `out`: each edge flips what is to the right of it, row by row."""
    height, width = out.shape
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    upwards = start[:, 1] > end[:, 1]
    start[upwards], end[upwards] = end[upwards], start[upwards]
    # Rows whose centre y + 0.5 lies in [start, end).
    first = np.clip(np.ceil(start[:, 1] - 0.5), 0, height).astype(np.int64)
    n_rows = np.clip(np.ceil(end[:, 1] - 0.5), 0, height).astype(np.int64) - first
    total = int(n_rows.sum())
    if total > MAX_CROSSINGS:
        raise PromptError(f"The polygon crosses rows of pixels {total} times, over the limit of {MAX_CROSSINGS}.")
    crosses = n_rows > 0
    start, end, first, n_rows = start[crosses], end[crosses], first[crosses], n_rows[crosses]
    slope = (end[:, 0] - start[:, 0]) / (end[:, 1] - start[:, 1])
    nth = np.arange(total) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows)
    row = np.repeat(first, n_rows) + nth
    x = np.repeat(start[:, 0], n_rows) + np.repeat(slope, n_rows) * (row + 0.5 - np.repeat(start[:, 1], n_rows))
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)  # the first pixel whose centre is not left of x
    flips = np.zeros((height, width + 1), np.uint8)
    np.bitwise_xor.at(flips.reshape(-1), row * (width + 1) + column, np.uint8(1))
    out |= np.bitwise_xor.accumulate(flips[:, :width], axis=1).view(np.bool_)


# ---------------------------------------------------------------------------------------------------------------
# PNG
# ---------------------------------------------------------------------------------------------------------------


def mask_to_png(mask: Mask) -> bytes:
    """A grey PNG, 255 inside and 0 outside."""
    _check_mask(mask)
    return bytes(cv2.imencode(".png", mask.view(np.uint8) * np.uint8(255))[1])


def rgb_to_png(rgb: UInt8) -> bytes:
    """A picture (uint8 [H, W, 3] RGB) as PNG: overlays for people to look at."""
    return bytes(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1])


def png_to_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Mask:
    """bool [H, W] from any PNG: inside is what is neither black nor fully transparent.

    raises  PromptError when it is not a PNG, is broken, or over the limit
    """
    try:
        image = open_upright(data, max_pixels=max_pixels, formats=("PNG",))
    except ImageError as error:
        raise PromptError(f"The mask cannot be read. {error.message}", error.hint) from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        return np.asarray(pixels != 0)
    inside = pixels[..., :3].any(2)
    return np.asarray(inside & (pixels[..., 3] != 0) if pixels.shape[2] == 4 else inside)


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------


def boundary(mask: Mask, width: int = 1) -> Mask:
    """The pixels of the mask within `width` pixels (in any of eight directions) of its outside.

    Everything beyond the image counts as outside.
    """
    _check_mask(mask)
    if width < 1:
        raise PromptError(f"The boundary width is {width}, not at least 1 pixel.")
    padded = np.pad(mask.view(np.uint8), 1)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
    return np.asarray(mask & (inner == 0))


_TINT = (30, 144, 255)
_POSITIVE, _NEGATIVE = (46, 190, 80), (225, 50, 50)
_DARK, _LIGHT = (20, 20, 20), (255, 255, 255)


def overlay(rgb: UInt8, mask: Mask, clicks: Sequence[Click] = (), box: Box | None = None) -> UInt8:
    """A picture of the answer, uint8 [H, W, 3]: the mask tinted and outlined, clicks as green plus and red minus
    signs, the box as a frame. Signs and lines grow with the image, so that they can be seen when it is scaled down.
    """
    _check_mask(mask)
    if rgb.dtype != np.uint8 or rgb.shape != (*mask.shape, 3):
        raise PromptError(f"The picture is {rgb.dtype} {list(rgb.shape)}, the mask {list(mask.shape)}.")
    line = max(1, round(max(mask.shape) / 600))
    tint = np.empty_like(rgb)
    tint[:] = _TINT
    out = np.where(mask[..., None], cv2.addWeighted(rgb, 0.55, tint, 0.45, 0), rgb)
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(out, contours, -1, _LIGHT, 3 * line, cv2.LINE_AA)
    cv2.drawContours(out, contours, -1, _TINT, line, cv2.LINE_AA)
    if box is not None:
        start, end = _sixteenths(box.x0, box.y0), _sixteenths(box.x1, box.y1)
        cv2.rectangle(out, start, end, _DARK, 3 * line, cv2.LINE_AA, 4)
        cv2.rectangle(out, start, end, _LIGHT, line, cv2.LINE_AA, 4)
    for click in clicks:
        _draw_click(out, click, 6 * line)
    return out


def _sixteenths(x: float, y: float) -> tuple[int, int]:
    """An image point for OpenCV's drawing with four bits of fraction, whose (0, 0) is a pixel's centre."""
    return round(16 * (x - 0.5)), round(16 * (y - 0.5))


def _draw_click(out: UInt8, click: Click, radius: int) -> None:
    """A coloured disc with a dark rim and a white sign."""
    x, y = _sixteenths(click.x, click.y)
    arm, stroke = round(16 * radius * 0.55), max(1, radius // 4)
    rim = max(1, radius // 4)
    cv2.circle(out, (x, y), 16 * (radius + rim), _DARK, -1, cv2.LINE_AA, 4)
    cv2.circle(out, (x, y), 16 * radius, _POSITIVE if click.positive else _NEGATIVE, -1, cv2.LINE_AA, 4)
    cv2.line(out, (x - arm, y), (x + arm, y), _LIGHT, stroke, cv2.LINE_AA, 4)
    if click.positive:
        cv2.line(out, (x, y - arm), (x, y + arm), _LIGHT, stroke, cv2.LINE_AA, 4)
