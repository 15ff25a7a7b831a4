"""What goes over the wire between CVAT and an interactor function, as pure functions: a JSON body becomes prompts and
a digest, a mask becomes an answer. No nuclio, no HTTP, no model and no decoding of images here.

One click of CVAT is one request without memory:

    {"image": base64 of the frame's file, "pos_points": [[x, y], ...], "neg_points": [[x, y], ...],
     "obj_bbox": [] | null | [[x1, y1], [x2, y2]], ...}

Coordinates are pixels of the image that was sent (a crop, where the annotator chose a region), x right, y down.
"""

from __future__ import annotations

import binascii
import dataclasses
import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from backends.common.http import RequestError
from inter2former.errors import ImageError, Inter2FormerError, PromptError
from inter2former.prompts import Box, Click

MAX_BODY_BYTES = 32 * 2**20  # the limit that CVAT's own functions set: about 24 MiB of image after base64
MAX_POINTS = 256  # each may cost one decoder pass; a person needs a few dozen
OUTSIDE_PX = 1.0  # CVAT sends x = width for a click on the far border: up to this far outside is the last pixel
_BAND = 32  # rows of a mask looked at together

ResponseForm = Literal["mask", "shapes"]
GZIP_ABOVE_BYTES: dict[ResponseForm, int] = {"mask": 100_000, "shapes": 20_000}  # worth a millisecond or more
_IMAGE = re.compile(rb'"image"\s*:\s*"')
_STAND_IN = secrets.token_hex(16)  # for the text of an image while the rest is parsed; no caller can guess it
Mask = npt.NDArray[np.bool_]


class TooLargeError(Inter2FormerError, ValueError):
    """The request is larger than MAX_BODY_BYTES."""

    code = "too_large"

    @classmethod
    def of(cls, size: int | None) -> TooLargeError:
        shown = "too many" if size is None else size
        return cls(f"The request has {shown} bytes; at most {MAX_BODY_BYTES} are allowed.", "Crop or shrink the image.")


@dataclasses.dataclass(frozen=True)
class Request:
    """One click of CVAT. Two requests with equal fields ask for the same mask."""

    image_base64: bytes = dataclasses.field(repr=False)
    positive: tuple[tuple[float, float], ...]
    negative: tuple[tuple[float, float], ...]
    corners: tuple[float, float, float, float] | None  # as drawn: x1, y1, x2, y2 in any order
    n_boxes: int = 0
    null_box: bool = dataclasses.field(default=False, compare=False)  # only pages that know no shapes spell "no box" so

    @property
    def image_digest(self) -> str:
        """Names the image without decoding it. SHA-256 because processors have instructions for it: 8 MB take 5 ms."""
        return hashlib.sha256(self.image_base64).hexdigest()


def parse(body: object) -> Request:
    """The request in an event's body: a mapping, or JSON as str, bytes, bytearray or memoryview.

    Unknown keys are ignored. Raises RequestError, TooLargeError, ImageError (no image text) or PromptError naming the
    point or box that is wrong.
    """
    fields = _fields(body)
    text = _image_text(fields.get("image"))
    if not text:
        raise ImageError("image is empty.")
    positive, negative = _points(fields, "pos_points"), _points(fields, "neg_points")
    if len(positive) + len(negative) > MAX_POINTS:
        raise PromptError(f"{len(positive) + len(negative)} points were sent; at most {MAX_POINTS} are allowed.")
    corners, n_boxes = _corners(fields.get("obj_bbox"))
    null_box = "obj_bbox" in fields and fields["obj_bbox"] is None
    return Request(text, positive, negative, corners, n_boxes, null_box)


def body_of(request: Request) -> bytes:
    """The request as CVAT's server would send it: for passing on what came in another form."""
    x1, y1, x2, y2 = request.corners or (0.0,) * 4
    return dump(
        {
            "image": request.image_base64.decode("ascii"),
            "pos_points": request.positive,
            "neg_points": request.negative,
            "obj_bbox": None if request.null_box else [[x1, y1], [x2, y2]] * request.n_boxes,
        }
    )


def image_bytes(request: Request) -> bytes:
    """The image file inside the request; ImageError when the text is not base64."""
    try:
        return binascii.a2b_base64(request.image_base64, strict_mode=True)
    except binascii.Error:
        pass
    try:  # line breaks as in mail are harmless; anything else is not
        return binascii.a2b_base64(b"".join(request.image_base64.split()), strict_mode=True)
    except binascii.Error as error:
        raise ImageError(f"image is not base64 text: {error}.") from None


def prompts(request: Request, height: int, width: int) -> tuple[tuple[Click, ...], Box | None]:
    """Clicks in the one order that a request defines, and the box inside an image of height x width pixels.

    CVAT does not say in which order positive and negative points were clicked. All positive points in their order,
    then all negative points in theirs: equal requests give equal masks in every process, whatever came before.
    A box without area inside the image is no box. PromptError names a point that is too far outside.
    """
    clicks = [
        Click(*_inside(point, f"{name}[{index}]", height, width), positive=positive)
        for name, points, positive in (("pos_points", request.positive, True), ("neg_points", request.negative, False))
        for index, point in enumerate(points)
    ]
    return tuple(clicks), _box(request.corners, height, width)


def wants_mask(clicks: tuple[Click, ...], box: Box | None) -> bool:
    """Is there anything to segment? Negative points alone, or nothing at all, get an empty answer and no inference."""
    return box is not None or any(click.positive for click in clicks)


def run_lengths(mask: Mask) -> list[int]:
    """CVAT's mask points: runs in row order inside the tight box, zeros first, then left, top, right, bottom.

    mask     bool [H, W]
    returns  Python ints; the four numbers of the box are inclusive, the runs sum to its area. [] for an empty mask
    """
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return []
    top, bottom = int(rows[0]), int(rows[-1])
    columns = np.flatnonzero(mask[top : bottom + 1].any(axis=0))  # each pass over a large mask costs milliseconds
    left, right = int(columns[0]), int(columns[-1])
    width = right - left + 1
    edges, last = [], np.bool_(False)  # zeros come first
    for row in range(top, bottom + 1, _BAND):  # copies of a few rows stay in the processor's cache
        flat = mask[row : min(row + _BAND, bottom + 1), left : right + 1].ravel()
        changed = np.empty(flat.size, np.bool_)
        changed[0] = flat[0] != last
        np.not_equal(flat[1:], flat[:-1], out=changed[1:])
        edges.append(np.flatnonzero(changed) + (row - top) * width)
        last = flat[-1]
    runs: list[int] = np.diff(np.concatenate(edges), prepend=0, append=(bottom - top + 1) * width).tolist()
    return [*runs, left, top, right, bottom]


def answer(mask: Mask, form: ResponseForm) -> bytes:
    """The JSON body of an answer, exactly one of the two keys that pages know.

    mask    {"mask": rows of 0 and 1 over the whole image}: every page; megabytes, but of the kind that gzip shrinks
    shapes  {"shapes": [{type, points, attributes}]}: pages from 2026 on; kilobytes; no shape for an empty mask.
            No confidence is sent: the page hides shapes below its slider, and a click would seem to do nothing.
    """
    if form == "mask":
        return _mask_json(mask)
    points = run_lengths(mask)
    return dump({"shapes": [{"type": "mask", "points": points, "attributes": []}] if points else []})


def dump(value: object) -> bytes:
    """Strict compact JSON: a value that is no JSON raises here instead of reaching the page as text."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def annotations_of(entry: object) -> dict[str, str]:
    """The annotations of a function in a dashboard's list. RequestError where CVAT's server stumbles over the entry."""
    try:
        annotations: dict[str, str] = entry["metadata"]["annotations"]  # type: ignore[index]
        _ = entry["metadata"]["name"], entry["spec"]["description"], entry["status"].get("httpPort")  # type: ignore[index]
        json.loads(annotations.get("spec") or "[]")
    except (KeyError, TypeError, AttributeError) as missing:
        raise RequestError(f"without {missing}") from None
    except ValueError:
        raise RequestError("its spec is not JSON") from None
    if not all(isinstance(value, str) for value in annotations.values()):
        raise RequestError("annotations have to be text")
    return annotations


def _mask_json(mask: Mask) -> bytes:
    """{"mask":[[0,1,...],...]} of a bool [H, W]. Two bytes a pixel, a digit and what follows it, are written as one
    number: json.dumps takes more than a second at 12 megapixels."""
    pairs = np.empty((mask.shape[0], mask.shape[1] + 1), "<u2")
    pairs[:, 0] = _pair_of(",[")
    np.add(mask, np.uint16(_pair_of("0,")), out=pairs[:, 1:])
    pairs[:, -1] += np.uint16(_pair_of("0]") - _pair_of("0,"))
    return b"".join((b'{"mask":[', pairs.data.cast("B")[1:], b"]}"))  # without the first row's comma


def _pair_of(text: str) -> int:
    return ord(text[0]) | ord(text[1]) << 8


def _fields(body: object) -> Mapping[str, Any]:
    """The request's keys; the image is bytes when it could be taken out before parsing."""
    if isinstance(body, bytes | bytearray | memoryview | str):
        if len(body) > MAX_BODY_BYTES:
            raise TooLargeError.of(len(body))
        try:
            if isinstance(body, str):
                body = json.loads(body)
            else:
                body = _apart(bytes(body))
        except (ValueError, RecursionError):
            raise RequestError(
                "The request is not JSON.", "CVAT sends an object with image, pos_points and more."
            ) from None
    if not isinstance(body, Mapping):
        raise RequestError(f"The request is {_kind(body)}; a JSON object is expected.")
    return body


def _apart(body: bytes) -> object:
    """What json.loads gives, but the image's text stays the bytes that it is: megabytes that need no parser."""
    if found := _IMAGE.search(body):
        start, end = found.end(), body.find(b'"', found.end())
        text = body[start:end]
        if end > 0 and b"\\" not in text and text.isascii():
            fields = json.loads(b"".join((body[:start], _STAND_IN.encode(), body[end:])))
            if isinstance(fields, dict) and fields.get("image") == _STAND_IN:
                return {**fields, "image": text}
    return json.loads(body)  # an unusual spelling


def _image_text(image: object) -> bytes:
    """Base64 text without the head of a data URL."""
    if not isinstance(image, str | bytes):
        raise ImageError(f"image is {_kind(image)}; base64 text of an image file is expected.")
    if len(image) > MAX_BODY_BYTES:
        raise TooLargeError.of(len(image))
    try:
        text = image if isinstance(image, bytes) else image.encode("ascii")
    except UnicodeEncodeError:
        raise ImageError("image is not base64 text: it holds characters outside of ASCII.") from None
    return text.partition(b",")[2] if text[:5].lower() == b"data:" else text


def _points(fields: Mapping[str, Any], name: str) -> tuple[tuple[float, float], ...]:
    points = fields.get(name)
    if points is None:
        return ()
    if not isinstance(points, list | tuple):
        raise PromptError(f"{name} is {_kind(points)}; a list of [x, y] is expected.")
    return tuple(_pair(point, f"{name}[{index}]") for index, point in enumerate(points))


def _pair(point: object, name: str) -> tuple[float, float]:
    if not isinstance(point, list | tuple):
        raise PromptError(f"{name} is {_kind(point)}; [x, y] is expected.")
    if len(point) != 2:
        raise PromptError(f"{name} has {len(point)} number(s); [x, y] is expected.")
    return _number(point[0], f"{name}[0]"), _number(point[1], f"{name}[1]")


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PromptError(f"{name} is {_kind(value)}; a number is expected.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise PromptError(f"{name} is not a finite number.")
    return number


def _corners(value: object) -> tuple[tuple[float, float, float, float] | None, int]:
    """The first box of every form that CVAT has sent, and how many there were."""
    if value is None:
        return None, 0
    if not isinstance(value, list | tuple):
        raise PromptError(f"obj_bbox is {_kind(value)}; [[x1, y1], [x2, y2]] is expected.")
    if not value:
        return None, 0
    if all(isinstance(box, list | tuple) and len(box) == 4 for box in value):  # boxes, each flat
        numbers = [_number(value, f"obj_bbox[{i}][{j}]") for i, box in enumerate(value) for j, value in enumerate(box)]
    elif all(isinstance(corner, list | tuple) for corner in value):
        numbers = [number for index, corner in enumerate(value) for number in _pair(corner, f"obj_bbox[{index}]")]
    else:  # flat, x1, y1, x2, y2
        numbers = [_number(number, f"obj_bbox[{index}]") for index, number in enumerate(value)]
    if len(numbers) < 4:
        raise PromptError("obj_bbox needs two corners: [[x1, y1], [x2, y2]].")
    return (numbers[0], numbers[1], numbers[2], numbers[3]), len(numbers) // 4


def _inside(point: tuple[float, float], name: str, height: int, width: int) -> tuple[float, float]:
    x, y = point
    if not (-OUTSIDE_PX <= x <= width + OUTSIDE_PX and -OUTSIDE_PX <= y <= height + OUTSIDE_PX):
        raise PromptError(f"{name} ({x:g}, {y:g}) is outside of the image of {width} x {height} pixels.")
    # The far border belongs to the last pixel, whose centre is half a pixel before it.
    return (width - 0.5 if x >= width else max(x, 0.0)), (height - 0.5 if y >= height else max(y, 0.0))


def _box(corners: tuple[float, float, float, float] | None, height: int, width: int) -> Box | None:
    if corners is None:
        return None
    box = Box(*corners)  # sorts
    left, right = max(box.x0, 0.0), min(box.x1, float(width))
    top, bottom = max(box.y0, 0.0), min(box.y1, float(height))
    return Box(left, top, right, bottom) if left < right and top < bottom else None


def _kind(value: object) -> str:
    """A JSON value's kind for messages; never the value, which may be a whole image."""
    if value is None:
        return "missing or null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
