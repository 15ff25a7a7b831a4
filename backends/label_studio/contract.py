"""Label Studio's JSON and what it means, as pure functions: a request becomes ordered prompts and a place for the
answer, a mask becomes a region. No Flask, no fetching, no network, no memory between calls.

Verified against label-studio 1.23.2. Points that are easy to get wrong:

- Coordinates are percent of the image as the browser shows it, upright after EXIF.
- The context is the whole list of prompts of one object, every time. It may shrink, and prompts may move.
- `is_positive` is missing after the page was reloaded; missing never means negative.
- One region may come as two entries with one id, when labels of two controls are selected.
- The answer goes to the mask control of the Image tag that was clicked on, which need not be the first of the config.

What is missing or odd in a single entry of the context skips that entry; what is wrong with the request as a whole
raises RequestError. Unknown keys are ignored.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal
from xml.etree import ElementTree

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from backends.common.http import RequestError
from inter2former import brush_rle
from inter2former.errors import PromptError
from inter2former.images import MAX_PIXELS
from inter2former.masks import mask_to_polygons, polygons_to_mask
from inter2former.prompts import Box, Click

MAX_CLICKS = 256  # each may cost one decoder pass; a person needs a few dozen
MAX_OBJECTS = 32  # rectangles of one request, each of which is answered with a region
MAX_STROKES = 32  # each is a mask of the whole image
MAX_CONFIG_CHARS = 250_000
MAX_TASKS = 10_000
# Percent that a point may lie outside of the image and still count as being on its border: the page lets the pointer
# slip over the edge while dragging. What is further away was not meant for this image.
BORDER_PERCENT = 5.0

Mask = npt.NDArray[np.bool_]
# In order of preference: pixels before outlines before boxes, and a control that has its own labels before one that
# does not.
MASK_CONTROLS = (
    "brushlabels", "brush", "bitmasklabels", "bitmask", "polygonlabels", "polygon", "rectanglelabels", "rectangle",
)  # fmt: skip
# What newer pages are told of: tag and the word for its kind of answer.
TARGETS = (
    ("BrushLabels", "mask"), ("BitmaskLabels", "mask"), ("PolygonLabels", "polygon"), ("RectangleLabels", "bbox"),
)  # fmt: skip
TOLERANCE = 1.5  # pixels that an answered outline may leave the mask's; see mask_to_polygons
_SPECK = 1 / 200  # of an object's area: parts and holes below are left out of its outlines


# ---------------------------------------------------------------------------------------------------------------
# The labeling config
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Control:
    """A tag of the labeling config that makes regions: its kind (lower case), name, image tag and labels."""

    kind: str
    name: str
    to_name: str
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """What matters of a labeling config: controls, and where each Image tag finds its address in a task."""

    controls: tuple[Control, ...] = ()
    images: Mapping[str, str] = dataclasses.field(default_factory=dict)  # tag name -> "$key" or a literal
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)  # tag name -> "$key" of a list of pages
    problem: str = ""

    def mask_control(self, to_name: str) -> Control | None:
        """The control for answers on this Image tag, the best kind of MASK_CONTROLS."""
        for kind in MASK_CONTROLS:
            for control in self.controls:
                if control.kind == kind and control.to_name == to_name:
                    return control
        return None

    def warnings(self) -> tuple[str, ...]:
        """What an administrator should know; empty when the config is fine."""
        if self.problem:
            return (self.problem,)
        found: list[str] = []
        for tag in (*self.images, *self.lists):
            mask = self.mask_control(tag)
            if mask is None:
                found.append(
                    f"Image {tag!r} has no BrushLabels, Brush, BitmaskLabels or PolygonLabels: no masks there."
                )
                continue
            if mask.kind.startswith("rectangle"):
                found.append(f"Image {tag!r} has no control for masks: {mask.name!r} gets boxes around them.")
            for control in self.controls:
                smart = control.kind in ("keypointlabels", "rectanglelabels") and control.to_name == tag
                if smart and mask.labels and set(control.labels) != set(mask.labels):
                    found.append(f"The labels of {control.name!r} and {mask.name!r} differ.")
        if not self.images and not self.lists:
            found.append("There is no Image tag with a value.")
        return tuple(found)


@functools.lru_cache(maxsize=64)
def parse_config(text: str) -> LabelConfig:
    """Never raises: a config that cannot be read has no controls and says why in `problem`."""
    if len(text) > MAX_CONFIG_CHARS:
        return LabelConfig(problem=f"The labeling config has more than {MAX_CONFIG_CHARS} characters.")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities can make a small text huge
        return LabelConfig(problem="The labeling config has a document type or entities, which are not read.")
    controls: list[Control] = []
    images: dict[str, str] = {}
    lists: dict[str, str] = {}
    labels: list[list[str]] = []  # of the controls that are open, the innermost last
    try:
        for event, element in ElementTree.iterparse(io.StringIO(text), events=("start", "end")):
            kind = str(element.tag).lower()
            attribute = {key.lower(): value for key, value in element.attrib.items()}
            name = attribute.get("name", "")
            is_control = bool(name and attribute.get("toname"))
            if event == "end":
                if is_control:
                    controls.append(Control(kind, name, attribute["toname"], tuple(labels.pop())))
            elif is_control:
                labels.append([])
            elif kind == "label" and labels and attribute.get("value"):
                labels[-1].append(attribute.get("alias") or attribute["value"])
            elif kind == "image" and name and attribute.get("valuelist"):
                lists[name] = attribute["valuelist"]
            elif kind == "image" and name and attribute.get("value"):
                images[name] = attribute["value"]
    except (ElementTree.ParseError, ValueError):
        return LabelConfig(problem="The labeling config is not well-formed XML.")
    return LabelConfig(tuple(controls), images, lists)


# ---------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PredictRequest:
    """The checked frame of a /predict body; the task itself is only looked at as far as it is needed.

    event   what newer pages ask for: predict (also when nothing is said), capabilities, prewarm, release
    wait    whether prewarm is answered when it is done, and not at once
    """

    tasks: tuple[Mapping[str, Any], ...]
    project: str
    label_config: str
    context: tuple[Mapping[str, Any], ...]
    event: str = "predict"
    wait: bool = False


@dataclasses.dataclass(frozen=True)
class Setup:
    """A /setup body."""

    project: str
    label_config: str
    hostname: str
    access_token: str = dataclasses.field(repr=False)


def parse_predict(body: Any) -> PredictRequest:
    """RequestError when the body is not an object with a list of tasks."""
    if not isinstance(body, dict):
        raise RequestError("The body is not a JSON object.")
    tasks = body.get("tasks")
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise RequestError("tasks is not a list of objects.")
    if len(tasks) > MAX_TASKS:
        raise RequestError(f"There are {len(tasks)} tasks; at most {MAX_TASKS} are answered at once.")
    params = _object(body.get("params"))
    given = _object(params.get("context", body.get("context")))
    context = given.get("result")
    entries = tuple(entry for entry in context if isinstance(entry, dict)) if isinstance(context, list) else ()
    if entries and len(tasks) != 1:
        raise RequestError(f"Clicks belong to one task; there are {len(tasks)}.")
    return PredictRequest(
        tasks=tuple(tasks),
        project=_text(body.get("project")),
        label_config=_text(body.get("label_config")),
        context=entries,
        event=_text(given.get("event")) or "predict",
        wait=given.get("wait") is True,
    )


def parse_setup(body: Any) -> Setup:
    """RequestError when the body is not an object."""
    if not isinstance(body, dict):
        raise RequestError("The body is not a JSON object.")
    return Setup(
        project=_text(body.get("project")),
        label_config=_text(body.get("schema")),
        hostname=_text(body.get("hostname")),
        access_token=_text(body.get("access_token")),
    )


# ---------------------------------------------------------------------------------------------------------------
# The context of a click
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """A click in percent of the image; `positive` is None when the page forgot it."""

    x: float
    y: float
    positive: bool | None
    region: str


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """The rectangle around a drawn one that may be turned, in percent of the image."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclasses.dataclass(frozen=True)
class Stroke:
    """A painted region: the `value` that `region_mask` reads."""

    value: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Interaction:
    """The prompts of a context, in drawing order, and where the answer goes.

    width, height   of the image as the page shows it; None when the page did not say
    label           None: the regions get no label
    ids             of the regions that were drawn, in drawing order; those that have none are left out
    """

    points: tuple[Point, ...]
    rectangles: tuple[Rectangle, ...]
    strokes: tuple[Stroke, ...]
    to_name: str
    item_index: int | None
    label: str | None
    width: int | None
    height: int | None
    ids: tuple[str, ...] = ()


@dataclasses.dataclass
class _Region:
    """The entries of one region id, put together."""

    region: str
    to_name: str
    item_index: int | None
    label: str | None = None
    size: tuple[int, int] | None = None
    shape: Point | Rectangle | Stroke | None = None


def read_context(entries: Sequence[Mapping[str, Any]]) -> Interaction | None:
    """What was drawn, or None when nothing in the context is a prompt.

    The last region says which Image tag, page and label count: regions of other tags, pages and labels are dropped.

    raises  PromptError for more prompts than a person makes
    """
    regions = [region for region in _regions(entries) if region.shape is not None]
    if not regions:
        return None
    last = regions[-1]
    label = last.label
    ours = [
        region
        for region in regions
        if (region.to_name, region.item_index) == (last.to_name, last.item_index)
        and (region.label is None or label is None or region.label == label)
    ]
    size = last.size or next((region.size for region in ours if region.size), None)
    points = tuple(region.shape for region in ours if isinstance(region.shape, Point))
    rectangles = tuple(dict.fromkeys(region.shape for region in ours if isinstance(region.shape, Rectangle)))
    strokes = tuple(region.shape for region in ours if isinstance(region.shape, Stroke))
    for name, count, limit in (
        ("clicks", len(points), MAX_CLICKS),
        ("rectangles", len(rectangles), MAX_OBJECTS),
        ("brush regions", len(strokes), MAX_STROKES),
    ):
        if count > limit:
            raise PromptError(f"The context has {count} {name}; at most {limit} are answered.")
    return Interaction(
        points=points,
        rectangles=rectangles,
        strokes=strokes,
        to_name=last.to_name,
        item_index=last.item_index,
        label=label if label is not None else next((region.label for region in ours if region.label), None),
        width=size[0] if size else None,
        height=size[1] if size else None,
        ids=tuple(region.region for region in ours if region.region),
    )


def _regions(entries: Sequence[Mapping[str, Any]], *, shapes: bool = False) -> list[_Region]:
    """One for each id, in drawing order; an entry without id stands for itself. `shapes`: finished masks count too."""
    found: dict[object, _Region] = {}
    for position, entry in enumerate(entries):
        name = entry.get("id")
        region_id = name if isinstance(name, str) and name else ""
        key: object = region_id or position
        index = entry.get("item_index")
        region = found.setdefault(
            key,
            _Region(
                region=region_id,
                to_name=_text(entry.get("to_name")),
                item_index=index if isinstance(index, int) and not isinstance(index, bool) else None,
            ),
        )
        region.label = region.label if region.label is not None else _label(entry)
        region.size = region.size or _size(entry)
        region.shape = region.shape or _shape(entry, region_id, region.size)
        if (
            shapes
            and region.shape is None
            and ("points" in (value := _object(entry.get("value"))) or "imageDataURL" in value)
        ):
            region.shape = Stroke(value)
    return list(found.values())


def _shape(entry: Mapping[str, Any], region: str, size: tuple[int, int] | None) -> Point | Rectangle | Stroke | None:
    """The geometry of an entry, judged by its value: with two controls selected the type may be the other one's."""
    value = _object(entry.get("value"))
    kind = _text(entry.get("type")).lower().removesuffix("labels")
    if "rle" in value or value.get("format") == "rle" or kind == "brush":
        rle = value.get("rle")
        return Stroke(value) if isinstance(rle, list) and rle else None
    if kind not in ("keypoint", "rectangle", ""):
        return None
    x, y = _number(value.get("x")), _number(value.get("y"))
    if x is None or y is None:
        return None
    if "height" in value:
        return _rectangle(x, y, value, size)
    if kind == "rectangle" or not (_near(x) and _near(y)):
        return None
    return Point(_clamp(x), _clamp(y), _polarity(entry), region)


def _polarity(entry: Mapping[str, Any]) -> bool | None:
    """`is_positive` of the entry, or `value.positive` of newer pages; None when neither is there."""
    for positive in (entry.get("is_positive"), _object(entry.get("value")).get("positive")):
        if isinstance(positive, bool):
            return positive
    return None


def _rectangle(x: float, y: float, value: Mapping[str, Any], size: tuple[int, int] | None) -> Rectangle | None:
    """The upright box around a rectangle turned clockwise about (x, y), cut to the image; None without area."""
    width, height = _number(value.get("width")), _number(value.get("height"))
    turn = _number(value.get("rotation", 0))
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
    box = Rectangle(_clamp(min(xs)), _clamp(min(ys)), _clamp(max(xs)), _clamp(max(ys)))
    return box if box.x0 < box.x1 and box.y0 < box.y1 else None


def _label(entry: Mapping[str, Any]) -> str | None:
    """The first label of `value[type]`, of `value.labels`, or of any list of labels in the value."""
    value = _object(entry.get("value"))
    keys = [_text(entry.get("type")), "labels", *(key for key in value if str(key).endswith("labels"))]
    for key in keys:
        labels = value.get(key)
        if isinstance(labels, list) and labels and isinstance(labels[0], str):
            return labels[0]
    return None


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) of the image, when both are sensible."""
    width, height = entry.get("original_width"), entry.get("original_height")
    for side in (width, height):
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= MAX_PIXELS:
            return None
    assert isinstance(width, int)
    assert isinstance(height, int)
    return (width, height) if width * height <= MAX_PIXELS else None


def polarities(task: Mapping[str, Any]) -> dict[str, bool]:
    """The polarity of every click by region id, as far as the task's drafts and annotations still have it."""
    known: dict[str, bool] = {}
    for key in ("annotations", "drafts"):  # drafts are the younger ones: they count
        for saved in _objects(task.get(key)):
            for entry in _objects(saved.get("result")):
                region, positive = entry.get("id"), _polarity(entry)
                if isinstance(region, str) and positive is not None:
                    known[region] = positive
    return known


# ---------------------------------------------------------------------------------------------------------------
# What the task already has
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Existing:
    """A mask that is on the page already: accepted from us, or made by a person."""

    region: str
    value: Mapping[str, Any]


def existing_masks(task: Mapping[str, Any], control: Control, interaction: Interaction) -> list[Existing]:
    """The masks of the clicked label, image and page in what the annotator sees, as far as the request shows it.

    That is the newest draft, else the only annotation: of several annotations it is not known which one is open.
    """
    drafts, annotations = _objects(task.get("drafts")), _objects(task.get("annotations"))
    if drafts:
        seen = max(drafts, key=lambda draft: (_text(draft.get("updated_at")), _text(draft.get("created_at"))))
    elif len(annotations) == 1:
        seen = annotations[0]
    else:
        return []
    label = control_label(control, interaction.label)
    found = []
    for entry in _objects(seen.get("result")):
        region, index = _text(entry.get("id")), entry.get("item_index")
        if (
            region
            and _text(entry.get("type")) == control.kind  # the entry of the clicking control has the same id
            and (_text(entry.get("from_name")), _text(entry.get("to_name"))) == (control.name, interaction.to_name)
            and index == interaction.item_index
            and (label is None or control_label(control, _label(entry)) == label)
        ):
            found.append(Existing(region, _object(entry.get("value"))))
    return found


def nearest(
    existing: Sequence[Existing], point: Point, height: int, width: int, within: float
) -> tuple[Existing, Mask] | None:
    """The mask [H, W] closest to a point, at most `within` pixels away; the youngest of equals. None: none is."""
    column, row = int(_pixel(point.x, width)), int(_pixel(point.y, height))
    reach = math.ceil(within)
    top, left = max(row - reach, 0), max(column - reach, 0)
    best: tuple[float, Existing, Mask] | None = None
    for one in reversed(existing):
        try:
            mask = region_mask(one.value, height, width)
        except PromptError:
            continue
        rows, columns = np.nonzero(mask[top : row + reach + 1, left : column + reach + 1])
        if rows.size:
            distance = float(np.hypot(rows + top - row, columns + left - column).min())
            if distance <= within and (best is None or distance < best[0]):
                best = (distance, one, mask)
    return None if best is None else best[1:]


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
    x, y = _number(value.get("x")), _number(value.get("y"))
    box = _rectangle(x, y, value, (width, height)) if x is not None and y is not None else None
    if box is None:
        raise PromptError("The region has no mask.")
    mask = np.zeros((height, width), np.bool_)
    mask[
        round(box.y0 * height / 100) : round(box.y1 * height / 100),
        round(box.x0 * width / 100) : round(box.x1 * width / 100),
    ] = True
    return mask


def _png_size(data: bytes) -> bool:
    """Whether the header promises a picture within the limit: looked at before anything is unpacked."""
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    return 0 < int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big") <= MAX_PIXELS


def objects_of_task(task: Mapping[str, Any], config: LabelConfig, model_version: str) -> list[Interaction]:
    """The objects that a task already points at, each as an interaction of its own: for masks of a whole batch.

    Taken from the newest annotation or draft, else from the newest prediction of another model. Every positive point,
    rectangle, and painted, bitmask or polygon region is an object; negative points belong to all objects of their
    label.
    """
    made = [
        one
        for key in ("annotations", "drafts")
        for one in _objects(task.get(key))
        if one.get("was_cancelled") is not True and _objects(one.get("result"))
    ]
    others = [
        one
        for one in _objects(task.get("predictions"))
        if one.get("model_version") != model_version and _objects(one.get("result"))
    ]
    sources = made or others
    if not sources:
        return []
    newest = max(sources, key=lambda one: (_text(one.get("updated_at")), _text(one.get("created_at"))))
    entries = _objects(newest.get("result"))
    known = polarities(task)
    found: list[Interaction] = []
    regions = [region for region in _regions(entries, shapes=True) if region.shape is not None]
    for region in regions:
        shape = region.shape
        if isinstance(shape, Point):
            positive = known.get(shape.region, True) if shape.positive is None else shape.positive
            if not positive:
                continue
            shape = dataclasses.replace(shape, positive=True)
        negative = tuple(
            dataclasses.replace(other.shape, positive=False)
            for other in regions
            if isinstance(other.shape, Point)
            and (other.label, other.to_name, other.item_index) == (region.label, region.to_name, region.item_index)
            and not (known.get(other.shape.region, True) if other.shape.positive is None else other.shape.positive)
        )
        points = (*((shape,) if isinstance(shape, Point) else ()), *negative)
        size = region.size or (None, None)
        found.append(
            Interaction(
                points=points,
                rectangles=(shape,) if isinstance(shape, Rectangle) else (),
                strokes=(shape,) if isinstance(shape, Stroke) else (),
                to_name=region.to_name,
                item_index=region.item_index,
                label=region.label,
                width=size[0],
                height=size[1],
            )
        )
    return [one for one in found if config.mask_control(one.to_name) is not None][:MAX_OBJECTS]


# ---------------------------------------------------------------------------------------------------------------
# From percent to the prompts of the core
# ---------------------------------------------------------------------------------------------------------------


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
        Click(_pixel(point.x, width), _pixel(point.y, height), polarity(point)) for point in interaction.points
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


def _pixel(percent: float, side: int) -> float:
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


# ---------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """bool [height, width]; the mask itself when it has that size."""
    if mask.shape == (height, width):
        return mask
    scaled = cv2.resize(mask.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return scaled.astype(bool)


def control_label(control: Control, label: str | None) -> str | None:
    """The control's own spelling of a label; None when it does not have it, or nothing was said."""
    if label is None:
        return None
    if not control.labels or label in control.labels:
        return label
    plain = label.strip().casefold()
    return next((known for known in control.labels if known.strip().casefold() == plain), None)


def regions(
    mask: Mask,
    score: float,
    control: Control,
    interaction: Interaction,
    *,
    region_id: str | None = None,
    meta: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> list[dict[str, Any]]:
    """A mask (of the size that the page shows) as regions of a control: one, or for polygons one for each outline.

    region_id   of the first region: a region that is on the page already is replaced when it is accepted
    meta        kept by the platform with the region
    tolerance   of outlines, pixels

    An empty mask is no region at all.
    """
    if not mask.any():
        return []
    height, width = mask.shape
    label = control_label(control, interaction.label)
    return [
        {
            "id": region_id if region_id and not position else uuid.uuid4().hex[:10],
            "from_name": control.name,
            "to_name": interaction.to_name,
            "type": control.kind,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": score,
            "value": {**value, **_label_field(control, label)},
            **({} if interaction.item_index is None else {"item_index": interaction.item_index}),
            **({} if meta is None else {"meta": dict(meta)}),
        }
        for position, value in enumerate(_values(mask, control.kind, tolerance))
    ]


def provenance(
    prompt: Prompt, *, model_version: str, model_size: int, score: float, corrects: bool = False
) -> dict[str, Any]:
    """What a region's `meta` says, so that its mask can be made again: model, T and prompts in image pixels."""
    box = prompt.box
    said: dict[str, Any] = {
        "model": model_version,
        "model_size": model_size,
        "score": round(score, 4),
        "clicks": [[click.x, click.y, int(click.positive)] for click in prompt.clicks],
    }
    if box is not None:
        said["box"] = [box.x0, box.y0, box.x1, box.y1]
    if prompt.strokes is not None:
        said["started_from"] = "a region" if corrects else "strokes"
    return {"inter2former": said}


def _values(mask: Mask, kind: str, tolerance: float) -> Iterator[dict[str, Any]]:
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


def _label_field(control: Control, label: str | None) -> dict[str, list[str]]:
    if label is None:
        return {}
    return {control.kind if control.kind.endswith("labels") else "labels": [label]}


def _png_data_url(mask: Mask) -> str:
    """RGBA as the page wants it: black, opaque inside."""
    rgba = np.zeros((*mask.shape, 4), np.uint8)
    rgba[mask, 3] = 255
    out = io.BytesIO()
    Image.fromarray(rgba).save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def capabilities(model_version: str) -> dict[str, Any]:
    """The entry by which newer pages learn what can be asked for."""
    return {
        "id": uuid.uuid4().hex[:10],
        "type": "capabilities",
        "origin": "manual",
        "value": {
            "prompts": ["point", "box", "mask"],
            "targets": [{"tag": tag, "output": output} for tag, output in TARGETS],
            "model_info": {"name": "Inter2Former", "version": model_version},
        },
    }


def acknowledgement(
    event: Literal["prewarm", "release"], config: LabelConfig, value: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry that answers prewarm and release."""
    tag = next(iter((*config.images, *config.lists)), "")
    control = config.mask_control(tag)
    return {
        "id": uuid.uuid4().hex[:10],
        "from_name": control.name if control else "",
        "to_name": tag,
        "type": f"{event}_ack",
        "origin": "manual",
        "value": dict(value),
    }


def prediction(regions: Sequence[Mapping[str, Any]], score: float, model_version: str) -> dict[str, Any]:
    """One entry of `results`."""
    return {"result": list(regions), "score": score, "model_version": model_version}


# ---------------------------------------------------------------------------------------------------------------
# Where the image of a task is
# ---------------------------------------------------------------------------------------------------------------


def image_address(task: Mapping[str, Any], config: LabelConfig, interaction: Interaction | None = None) -> str:
    """The address that the task's data give for an Image tag, as it stands there.

    Without an interaction: of the first Image tag and page.

    raises  RequestError when the config has no such tag, or the task no such key
    """
    if interaction is None:
        tag = next(iter((*config.images, *config.lists)), "")
    else:
        tag = interaction.to_name
    source = config.images.get(tag) or config.lists.get(tag)
    if source is None:
        raise RequestError(f"The labeling config has no Image tag {tag[:80]!r} with a value.")
    found = _from_data(task, source)
    if tag not in config.images:
        index = (interaction.item_index if interaction else None) or 0
        if not isinstance(found, list) or not 0 <= index < len(found):
            raise RequestError(f"The task has no page {index} for the Image tag {tag[:80]!r}.")
        found = found[index]
    if not isinstance(found, str) or not found.strip():
        raise RequestError(f"The task has no image address under {source[:80]!r}.")
    return found.strip()


def _from_data(task: Mapping[str, Any], source: str) -> Any:
    """`$key` of the task's data (`$key.inner` too), or the text itself."""
    if not source.startswith("$"):
        return source
    data: Any = _object(task.get("data"))
    key = source[1:]
    if key in data:
        return data[key]
    for part in key.split("."):
        data = _object(data).get(part)
    return data


# ---------------------------------------------------------------------------------------------------------------
# Small readers of foreign JSON
# ---------------------------------------------------------------------------------------------------------------


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18 else ""


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _near(percent: float) -> bool:
    return -BORDER_PERCENT <= percent <= 100.0 + BORDER_PERCENT


def _clamp(percent: float) -> float:
    return min(max(percent, 0.0), 100.0) + 0.0  # + 0.0 turns -0.0 into 0.0
