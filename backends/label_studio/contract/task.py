"""What a task holds: the address of its image, masks and signs of clicks that are saved, objects that others made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backends.common.http import RequestError
from backends.label_studio.contract.config import Control, LabelConfig, control_label
from backends.label_studio.contract.context import (
    MAX_OBJECTS,
    Interaction,
    Point,
    Stroke,
    label_of,
    polarity_of,
    regions_of,
)
from backends.label_studio.contract.foreign import as_index, as_number, as_object, as_objects, as_text
from backends.label_studio.contract.pixels import pixel
from backends.label_studio.contract.values import Mask, Rectangle, region_mask
from inter2former.errors import PromptError

_KEY = r"\$\w+(?:\.\w+)*"
_SAME_PIXEL = 0.05  # pixels; percent and back


def image_address(task: Mapping[str, Any], config: LabelConfig, interaction: Interaction) -> str:
    """The address that the task's data give for the Image tag and page of an interaction, as it stands there.

    raises  RequestError when the config has no such tag, or the task no such key
    """
    tag = interaction.to_name
    pages = _addresses(task, config, tag)
    index = (interaction.item_index or 0) if tag not in config.images else 0
    if not 0 <= index < len(pages):
        raise RequestError(f"The task has no page {index} for the Image tag {tag[:80]!r}.")
    address = pages[index]
    if address is None:
        raise RequestError(f"The task has no image address under {_source(config, tag)[:80]!r}.")
    return address


def image_addresses(task: Mapping[str, Any], config: LabelConfig) -> tuple[str, ...]:
    """The addresses of all its images, in the order of Image tags and pages, each once.

    raises  RequestError when there is none
    """
    tags = (*config.images, *config.lists)
    found = tuple(dict.fromkeys(filter(None, (one for tag in tags for one in _addresses(task, config, tag)))))
    if not found:
        raise RequestError("The task has no image address that the labeling config names.")
    return found


def _source(config: LabelConfig, tag: str) -> str:
    source = config.images.get(tag) or config.lists.get(tag)
    if source is None:
        raise RequestError(f"The labeling config has no Image tag {tag[:80]!r} with a value.")
    return source


def _addresses(task: Mapping[str, Any], config: LabelConfig, tag: str) -> list[str | None]:
    """Of the pages of an Image tag, one for a tag without pages; None where there is none."""
    found = _from_data(task, _source(config, tag))
    pages = [found] if tag in config.images else found if isinstance(found, list) else []
    return [page.strip() or None if isinstance(page, str) else None for page in pages]


def _from_data(task: Mapping[str, Any], source: str) -> Any:
    """`$key` of the task's data (`$key.inner` too); or a text with such keys in it, which are filled in."""
    data = as_object(task.get("data"))
    if source[:1] == "$" and source[1:] in data:
        return data[source[1:]]
    if re.fullmatch(_KEY, source):
        return _inside(data, source[1:])
    return re.sub(_KEY, lambda key: as_text(_inside(data, key[0][1:])), source)


def _inside(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = as_object(data).get(part)
    return data


def polarities(task: Mapping[str, Any]) -> dict[str, bool]:
    """The polarity of every click by region id, as far as the task's drafts and annotations still have it."""
    known: dict[str, bool] = {}
    for key in ("annotations", "drafts"):  # drafts are the younger ones: they count
        for saved in as_objects(task.get(key)):
            for entry in as_objects(saved.get("result")):
                region, positive = entry.get("id"), polarity_of(entry)
                if isinstance(region, str) and positive is not None:
                    known[region] = positive
    return known


@dataclasses.dataclass(frozen=True)
class Existing:
    """A mask that is on the page already: accepted from us, or made by a person."""

    region: str
    value: Mapping[str, Any]


def existing_masks(task: Mapping[str, Any], control: Control, interaction: Interaction) -> list[Existing]:
    """The masks of the clicked label, image and page in what the annotator sees, as far as the request shows it."""
    label = control_label(control, interaction.label)
    found = []
    for entry in _on_the_page(task):
        region, index = as_text(entry.get("id")), as_index(entry.get("item_index"))
        if (
            region
            and as_text(entry.get("type")) == control.kind  # the entry of the clicking control has the same id
            and (as_text(entry.get("from_name")), as_text(entry.get("to_name"))) == (control.name, interaction.to_name)
            and index == interaction.item_index
            and (label is None or control_label(control, label_of(entry)) == label)
        ):
            found.append(Existing(region, as_object(entry.get("value"))))
    return found


def _on_the_page(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The newest draft, else the only annotation: of several annotations it is not known which one is open."""
    drafts, annotations = as_objects(task.get("drafts")), as_objects(task.get("annotations"))
    if drafts:
        seen = max(drafts, key=lambda draft: (as_text(draft.get("updated_at")), as_text(draft.get("created_at"))))
        return as_objects(seen.get("result"))
    return as_objects(annotations[0].get("result")) if len(annotations) == 1 else []


def without_spent_points(task: Mapping[str, Any], interaction: Interaction) -> Interaction:
    """The interaction without points that already made a mask which was accepted.

    Accepting takes the clicks away, but for those from before a reload of the page: they stay as plain points, and the
    page sends them along with every later object of their label. A mask of ours says in its `meta` which clicks made
    it; a point without polarity at such a place is one of them.
    """
    width, height = interaction.width, interaction.height
    if width is None or height is None or all(point.positive is not None for point in interaction.points):
        return interaction
    spent: list[tuple[float, float]] = []
    for entry in _on_the_page(task):
        place = (as_text(entry.get("to_name")), as_index(entry.get("item_index")))
        if place == (interaction.to_name, interaction.item_index):
            made = as_object(as_object(entry.get("meta")).get("inter2former")).get("clicks")
            for click in made if isinstance(made, list) else ():
                if isinstance(click, list) and len(click) == 3:
                    x, y = as_number(click[0]), as_number(click[1])
                    spent += [(x, y)] if x is not None and y is not None else []

    def is_spent(point: Point) -> bool:
        x, y = pixel(point.x, width), pixel(point.y, height)
        return point.positive is None and any(math.hypot(x - sx, y - sy) < _SAME_PIXEL for sx, sy in spent)

    gone = {point for point in interaction.points if is_spent(point)}
    if not gone:
        return interaction
    names = {point.region for point in gone}
    return dataclasses.replace(
        interaction,
        points=tuple(point for point in interaction.points if point not in gone),
        ids=tuple(region for region in interaction.ids if region not in names),
    )


def nearest(
    existing: Sequence[Existing], point: Point, height: int, width: int, within: float
) -> tuple[Existing, Mask] | None:
    """The mask [H, W] closest to a point, at most `within` pixels away; the youngest of equals. None: none is."""
    column, row = int(pixel(point.x, width)), int(pixel(point.y, height))
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


def objects_of_task(task: Mapping[str, Any], config: LabelConfig, model_version: str) -> list[Interaction]:
    """The objects that a task already points at, each as an interaction of its own: for masks of a whole batch.

    Taken from the newest annotation or draft, else from the newest prediction of another model. Every positive point,
    rectangle, and painted, bitmask or polygon region is an object; negative points belong to all objects of their
    label.
    """
    made = [
        one
        for key in ("annotations", "drafts")
        for one in as_objects(task.get(key))
        if one.get("was_cancelled") is not True and as_objects(one.get("result"))
    ]
    others = [
        one
        for one in as_objects(task.get("predictions"))
        if one.get("model_version") != model_version and as_objects(one.get("result"))
    ]
    sources = made or others
    if not sources:
        return []
    newest = max(sources, key=lambda one: (as_text(one.get("updated_at")), as_text(one.get("created_at"))))
    entries = as_objects(newest.get("result"))
    known = polarities(task)
    found: list[Interaction] = []
    regions = [region for region in regions_of(entries, shapes=True) if region.shape is not None]
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
