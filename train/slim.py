"""`python -m train slim`: take residual blocks of CannyNet out of trained weights, without training.

The convolution in front of a stage is fitted anew, by least squares over training crops, so that its own output is as
near as it can be to what the stage made of it. Fine-tuning afterwards makes up for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.errors import Inter2FormerError
from inter2former.nn.model import Inter2Former
from train.data import DrawConfig, Sampler, read_pack
from train.loop import normalise

SIZES = (256, 384, 512)  # sides of crops, as in training
_RIDGE = 1e-6  # of the mean square: inputs may depend on each other


@torch.inference_mode()
def without_stage(model: Inter2Former, stage: int, images: Iterable[Tensor]) -> tuple[Inter2Former, float]:
    """A model without the residual blocks of one stage of CannyNet.

    stage    0 (full resolution) to 3 (an eighth)
    images   float32 [B, 3, S, S], normalised as the network's input
    returns  the new model, and the share of the stage's variance that is explained, 0..1
    raises   ValueError when the stage has no blocks
    """
    blocks = model.config.edge_blocks
    if not 0 <= stage < len(blocks) or not blocks[stage]:
        raise ValueError(f"Stage {stage} has no residual blocks to take out; they are {list(blocks)}.")
    name = "conv1" if stage == 0 else f"downs.{stage - 1}"
    conv = model.canny_net.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    seen: dict[str, Tensor] = {}
    hooks = [
        conv.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0])),
        model.canny_net.stages[stage].register_forward_hook(lambda _, inputs, out: seen.update(y=out)),
    ]
    n = conv.weight[0].numel() + 1  # the bias is a weight of a constant
    xx, xy = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, conv.out_channels, dtype=torch.float64)
    y_sum, yy = torch.zeros(conv.out_channels, dtype=torch.float64), torch.zeros(conv.out_channels, dtype=torch.float64)
    count = 0
    for image in images:
        model.encode_batch(image)
        rows = F.unfold(seen["x"], 3, padding=1, stride=conv.stride).transpose(1, 2).flatten(0, 1)
        x = F.pad(rows, (0, 1), value=1.0).double()
        y = seen["y"].flatten(2).transpose(1, 2).flatten(0, 1).double()
        xx, xy, y_sum, yy, count = xx + x.T @ x, xy + x.T @ y, y_sum + y.sum(0), yy + y.square().sum(0), count + len(x)
    for hook in hooks:
        hook.remove()
    fitted = torch.linalg.solve(xx + _RIDGE * xx.diagonal().mean() * torch.eye(n, dtype=torch.float64), xy)
    left = yy - 2 * (fitted * xy).sum(0) + (fitted * (xx @ fitted)).sum(0)
    explained = 1 - float(left.sum() / (yy - y_sum.square() / count).sum())

    state = {k: v for k, v in model.state_dict().items() if not k.startswith(f"canny_net.stages.{stage}.")}
    state[f"canny_net.{name}.weight"] = fitted[:-1].T.reshape(conv.weight.shape).float()
    state[f"canny_net.{name}.bias"] = fitted[-1].float()
    remaining = tuple(0 if index == stage else blocks_ for index, blocks_ in enumerate(blocks))
    slim = Inter2Former(dataclasses.replace(model.config, edge_blocks=remaining))
    slim.load_state_dict(state)
    return slim.eval(), explained


def command(
    checkpoint: Annotated[Path, typer.Option(help="Trained weights.")],
    data: Annotated[list[Path], typer.Option(help="A pack; may be given several times.")],
    stage: Annotated[list[int], typer.Option(help="0 (full resolution) to 3 (an eighth); may be repeated.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    batches: Annotated[int, typer.Option(min=1, help="Of crops, at each of three sizes.")] = 10,
    limit: Annotated[int, typer.Option(min=1, help="Photos a source.")] = 6,
    seed: int = 0,
) -> None:
    """Take residual blocks of CannyNet out of trained weights: a faster encode for a start to fine-tune from."""
    try:
        loaded = load_checkpoint(checkpoint)
        model, pack = loaded.model, read_pack(data, limit=limit)
        samplers = [Sampler(pack, DrawConfig(size=size), seed) for size in SIZES]
        for number in sorted(stage):
            drawn = (sampler.batch(step, 2) for step in range(batches) for sampler in samplers)
            images = (normalise(torch.from_numpy(b["image"]), torch.from_numpy(b["valid"])) for b in drawn)
            model, explained = without_stage(model, number, images)
            typer.echo(f"stage {number}: {100 * explained:.1f} % of its variance is kept")
        facts = {"stages": sorted(stage), "of": loaded.digest}
        save_checkpoint(out, model, provenance={**loaded.provenance, "slim": facts})
    except (Inter2FormerError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"wrote {out}")
