"""Answers as the platform wants them: masks as regions of a control, and what newer pages ask for beside masks."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from backends.label_studio.contract.config import Control, LabelConfig, control_label
from backends.label_studio.contract.context import Interaction
from backends.label_studio.contract.pixels import Prompt
from backends.label_studio.contract.values import TOLERANCE, Mask, region_values

# What newer pages are told of: tag and the word for its kind of answer.
TARGETS = (
    ("BrushLabels", "mask"), ("BitmaskLabels", "mask"), ("PolygonLabels", "polygon"), ("RectangleLabels", "bbox"),
)  # fmt: skip


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
        for position, value in enumerate(region_values(mask, control.kind, tolerance))
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


def _label_field(control: Control, label: str | None) -> dict[str, list[str]]:
    if label is None:
        return {}
    return {control.kind if control.kind.endswith("labels") else "labels": [label]}


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
