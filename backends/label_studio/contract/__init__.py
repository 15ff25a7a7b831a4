"""Label Studio's JSON and what it means, as pure functions: a request becomes ordered prompts and a place for the
answer, a mask becomes a region. No Flask, no fetching, no network, no memory between calls.

    requests.py   the bodies of /predict and /setup        config.py   the labeling config
    context.py    what was clicked and drawn               task.py     what a task holds already
    pixels.py     from percent to the core's prompts       values.py   masks and the values of regions, both ways
    answers.py    regions and predictions                  foreign.py  small readers of foreign JSON

Verified against label-studio 1.23.2. Points that are easy to get wrong:

- Coordinates are percent of the image as the browser shows it, upright after EXIF.
- The context is the whole list of prompts of one object, every time. It may shrink, and prompts may move.
- `is_positive` is missing after the page was reloaded; missing never means negative.
- One region may come as two entries with one id, when labels of two controls are selected.
- The answer goes to the mask control of the Image tag that was clicked on, which need not be the first of the config.

What is missing or odd in a single entry of the context skips that entry; what is wrong with the request as a whole
raises RequestError. Unknown keys are ignored.
"""

from backends.label_studio.contract.answers import acknowledgement, capabilities, prediction, provenance, regions
from backends.label_studio.contract.config import Control, LabelConfig, control_label, parse_config
from backends.label_studio.contract.context import Interaction, Point, Stroke, read_context
from backends.label_studio.contract.pixels import Prompt, prompts, resize_mask, shown_size
from backends.label_studio.contract.requests import PredictRequest, Setup, parse_predict, parse_setup
from backends.label_studio.contract.task import (
    Existing,
    existing_masks,
    image_address,
    image_addresses,
    nearest,
    objects_of_task,
    polarities,
    without_spent_points,
)
from backends.label_studio.contract.values import Rectangle, region_mask

__all__ = [
    "Control",
    "Existing",
    "Interaction",
    "LabelConfig",
    "Point",
    "PredictRequest",
    "Prompt",
    "Rectangle",
    "Setup",
    "Stroke",
    "acknowledgement",
    "capabilities",
    "control_label",
    "existing_masks",
    "image_address",
    "image_addresses",
    "nearest",
    "objects_of_task",
    "parse_config",
    "parse_predict",
    "parse_setup",
    "polarities",
    "prediction",
    "prompts",
    "provenance",
    "read_context",
    "region_mask",
    "regions",
    "resize_mask",
    "shown_size",
    "without_spent_points",
]
