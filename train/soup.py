"""`python -m train soup`: the mean of the weights of several runs that began from the same ones.

Each run learns its photos by heart in its own way; in the mean that part fades and what they share stays (model soups,
Wortsman et al., 2022). One model to serve, at no cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from inter2former.checkpoints import Loaded, load_checkpoint, save_checkpoint
from inter2former.errors import CheckpointError, Inter2FormerError
from inter2former.nn.model import Inter2Former


def mean(loaded: Sequence[Loaded]) -> Inter2Former:
    """The model of the mean weights; counters are those of the first.

    raises  CheckpointError when the configurations differ in more than weights of score and levels, which are left out
    """
    configs = [dataclasses.replace(one.model.config, score_weights=(), level_weights=()) for one in loaded]
    for number, config in enumerate(configs[1:], 2):
        if config != configs[0]:
            differing = [
                field.name
                for field in dataclasses.fields(config)
                if getattr(config, field.name) != getattr(configs[0], field.name)
            ]
            raise CheckpointError(
                f"Checkpoint {number} has another {', '.join(differing)} than the first.",
                "Only weights of one configuration have a mean.",
            )
    states = [one.model.state_dict() for one in loaded]
    averaged = {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }
    model = Inter2Former(configs[0])
    model.load_state_dict(averaged)
    return model.eval()


def command(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more, fine-tuned from the same weights.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    half: Annotated[bool, typer.Option("--half", help="Store float16: half the bytes.")] = False,
) -> None:
    """Write the mean of several checkpoints' weights; calibrate its score afterwards."""
    try:
        loaded = [load_checkpoint(path) for path in checkpoints]
        ingredients = [{"sha256": one.digest, **one.provenance} for one in loaded]
        licences = sorted({str(one.provenance["licence"]) for one in loaded if one.provenance.get("licence")})
        provenance = {"recipe": "train soup", "ingredients": ingredients, "licence": "; ".join(licences) or None}
        save_checkpoint(out, mean(loaded), provenance=provenance, dtype=torch.float16 if half else torch.float32)
    except (Inter2FormerError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"wrote {out}")
