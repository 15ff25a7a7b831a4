"""Parts of a model that are fitted on their own, after the rest: how a model gets one, and the checkpoint with it.

What a part is and how it learns is the business of its own file (affinity.py, outline.py, calibrate.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.nn.model import Inter2Former


def with_part(model: Inter2Former, part: str, seed: int, **values: Any) -> Inter2Former:
    """The model with these values of its configuration: itself, if it has them, else one whose `part` (the name of a
    submodule) is new and whose other weights are the model's."""
    if all(getattr(model.config, name) == value for name, value in values.items()):
        return model
    torch.manual_seed(seed)
    grown = Inter2Former(dataclasses.replace(model.config, **values))
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{part}.")}
    grown.load_state_dict(kept, strict=False)
    return grown.eval()


def write(
    checkpoint: Path, out: Path, what: str, facts: dict[str, Any], change: Callable[[Inter2Former], Inter2Former]
) -> str:
    """The checkpoint's model after `change`, tensors as precise as before; returns the digest.

    what, facts  of the provenance
    """
    loaded = load_checkpoint(checkpoint)
    provenance = {**loaded.provenance, what: {**facts, "of": loaded.digest}}
    return save_checkpoint(out, change(loaded.model), provenance=provenance, dtype=loaded.dtype)


__all__ = ["with_part", "write"]
