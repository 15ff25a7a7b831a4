"""The context of a click: the regions that are pending on the page become ordered prompts in percent of the image,
and a place for the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from backends.label_studio.contract.foreign import as_index, as_number, as_object, as_text
from backends.label_studio.contract.values import Rectangle, box_of, clamp
from inter2former.errors import PromptError
from inter2former.images import MAX_PIXELS

MAX_CLICKS = 256  # each may cost one decoder pass; a person needs a few dozen
MAX_OBJECTS = 32  # rectangles of one request, each of which is answered with a region
MAX_STROKES = 32  # each is a mask of the whole image
# Percent that a point may lie outside of the image and still count as being on its border: the page lets the pointer
# slip over the edge while dragging. What is further away was not meant for this image.
BORDER_PERCENT = 5.0


@dataclasses.dataclass(frozen=True)
class Point:
    """A click in percent of the image; `positive` is None when the page forgot it."""

    x: float
    y: float
    positive: bool | None
    region: str


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


def read_context(entries: Sequence[Mapping[str, Any]], size: tuple[int, int] | None = None) -> Interaction | None:
    """What was drawn, or None when nothing in the context is a prompt.

    The last region says which Image tag, page and label count: regions of other tags, pages and labels are dropped.

    size   (width, height) of the image, for turned rectangles that come without; the result does not repeat it

    raises  PromptError for more prompts than a person makes
    """
    regions = [region for region in regions_of(entries, size=size) if region.shape is not None]
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


def regions_of(
    entries: Sequence[Mapping[str, Any]], *, size: tuple[int, int] | None = None, shapes: bool = False
) -> list[_Region]:
    """One for each id, in drawing order; an entry without id stands for itself.

    size     (width, height) of the image where an entry does not say it
    shapes   finished masks count too
    """
    size = size or next(filter(None, map(_size, entries)), None)
    found: dict[object, _Region] = {}
    for position, entry in enumerate(entries):
        name = entry.get("id")
        region_id = name if isinstance(name, str) and name else ""
        key: object = region_id or position
        region = found.setdefault(
            key,
            _Region(
                region=region_id,
                to_name=as_text(entry.get("to_name")),
                item_index=as_index(entry.get("item_index")),
            ),
        )
        region.label = region.label if region.label is not None else label_of(entry)
        region.size = region.size or _size(entry)
        region.shape = region.shape or _shape(entry, region_id, region.size or size)
        if isinstance(region.shape, Point) and region.shape.positive is None:  # the entry of the other control has it
            region.shape = dataclasses.replace(region.shape, positive=polarity_of(entry))
        if (
            shapes
            and region.shape is None
            and ("points" in (value := as_object(entry.get("value"))) or "imageDataURL" in value)
        ):
            region.shape = Stroke(value)
    return list(found.values())


def _shape(entry: Mapping[str, Any], region: str, size: tuple[int, int] | None) -> Point | Rectangle | Stroke | None:
    """The geometry of an entry, judged by its value: with two controls selected the type may be the other one's."""
    value = as_object(entry.get("value"))
    kind = as_text(entry.get("type")).lower().removesuffix("labels")
    if "rle" in value or value.get("format") == "rle" or kind == "brush":
        rle = value.get("rle")
        return Stroke(value) if isinstance(rle, list) and rle else None
    if kind not in ("keypoint", "rectangle", ""):
        return None
    x, y = as_number(value.get("x")), as_number(value.get("y"))
    if x is None or y is None:
        return None
    if "height" in value:
        return box_of(x, y, value, size)
    if kind == "rectangle" or not (_near(x) and _near(y)):
        return None
    return Point(clamp(x), clamp(y), polarity_of(entry), region)


def polarity_of(entry: Mapping[str, Any]) -> bool | None:
    """`is_positive` of the entry, or `value.positive` of newer pages; None when neither is there."""
    for positive in (entry.get("is_positive"), as_object(entry.get("value")).get("positive")):
        if isinstance(positive, bool):
            return positive
    return None


def label_of(entry: Mapping[str, Any]) -> str | None:
    """The first label of `value[type]`, of `value.labels`, or of any list of labels in the value.

    What a choice or a text about the region says is no label.
    """
    value = as_object(entry.get("value"))
    keys = [as_text(entry.get("type")), "labels", *map(str, value)]
    for key in (key for key in keys if key.endswith("labels")):
        labels = value.get(key)
        if isinstance(labels, list) and labels and isinstance(labels[0], str):
            return labels[0]
    return None


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) of the image, when both are sensible."""
    width, height = as_number(entry.get("original_width")), as_number(entry.get("original_height"))
    if width is None or height is None or not (width.is_integer() and height.is_integer()):
        return None
    return (int(width), int(height)) if min(width, height) >= 1 and width * height <= MAX_PIXELS else None


def _near(percent: float) -> bool:
    return -BORDER_PERCENT <= percent <= 100.0 + BORDER_PERCENT
