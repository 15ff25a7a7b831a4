"""The labeling config: which tags make regions, which labels they have, and where an Image tag finds its address."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping
from xml.etree import ElementTree

MAX_CONFIG_CHARS = 250_000
# In order of preference: pixels before outlines before boxes, and a control that has its own labels before one that
# does not.
MASK_CONTROLS = (
    "brushlabels", "brush", "bitmasklabels", "bitmask", "polygonlabels", "polygon", "rectanglelabels", "rectangle",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Control:
    """A tag of the labeling config that makes regions: its kind (lower case), name, Image tag and labels.

    A tag that is meant for several Image tags is a control of each.
    """

    kind: str
    name: str
    to_name: str
    labels: tuple[str, ...]

    @property
    def for_boxes(self) -> bool:
        """Its regions are boxes and not masks."""
        return self.kind.startswith("rectangle")


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """What matters of a labeling config: controls, and where each Image tag finds its address in a task."""

    controls: tuple[Control, ...] = ()
    images: Mapping[str, str] = dataclasses.field(default_factory=dict)  # tag name -> "$key" or a literal
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)  # tag name -> "$key" of a list of pages
    problem: str = ""

    def mask_control(self, to_name: str, label: str | None = None) -> Control | None:
        """The control for answers on this Image tag: for masks if there is one, that has the label if one has it, the
        best kind of MASK_CONTROLS.
        """
        fitting = [
            control
            for kind in MASK_CONTROLS
            for control in self.controls
            if (control.kind, control.to_name) == (kind, to_name)
        ]
        return min(fitting, key=lambda one: (one.for_boxes, control_label(one, label) is None), default=None)

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
            if mask.for_boxes:
                found.append(f"Image {tag!r} has no control for masks: {mask.name!r} gets boxes around them.")
            here = [control for control in self.controls if control.to_name == tag]
            masks = [one for one in here if one.kind in MASK_CONTROLS and one.for_boxes == mask.for_boxes]
            offered = {label for control in masks for label in control.labels}
            for control in here:
                smart = control.kind in ("keypointlabels", "rectanglelabels")
                if smart and all(one.labels for one in masks) and set(control.labels) != offered:
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
                    own = tuple(labels.pop())
                    controls += [Control(kind, name, to.strip(), own) for to in attribute["toname"].split(",")]
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


def control_label(control: Control, label: str | None) -> str | None:
    """The control's own spelling of a label; None when it does not have it, or nothing was said."""
    if label is None:
        return None
    if not control.labels or label in control.labels:
        return label
    plain = label.strip().casefold()
    return next((known for known in control.labels if known.strip().casefold() == plain), None)
