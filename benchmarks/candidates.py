"""Which `small()`: candidates trained alike, accuracy against CPU time.

    python -m benchmarks.candidates --data PACK --out runs/candidates --minutes 30 --write

Each candidate differs from `small()` in what its name says; seed, data, budget and recipe are the same. The command can
be killed at any moment and given again: finished candidates are not trained again. Time is CPU time of one thread,
which a busy machine does not change much, taken in turns.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer

from benchmarks.results import write_result
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import ModelConfig, small
from inter2former.evaluation import Pack, evaluate, summarise
from inter2former.files import write_atomically
from inter2former.nn.model import Inter2Former
from inter2former.prompts import Click
from inter2former.segmenter import ModelSize, load_segmenter
from inter2former.terminal import print_rows, score_progress
from train import loop
from train.data import Pack as TrainingPack
from train.data import read_pack

CHANGES: dict[str, dict[str, Any]] = {
    "small": {},
    "patch stem": {"stem": "patch", "stem_channels": ()},
    "width 128": {"encoder_dim": 128, "encoder_heads": 4},
    "width 256": {"encoder_dim": 256, "encoder_heads": 8},
    "anchor 256": {"anchor_size": 256},
    "one expert": {"n_experts": 1},
    "from unknown": {"initial_reference": 2},
    "exact edges": {"edge_rule": "exact"},
}
SESSION = 5  # clicks; the first one pays for the image
CLICKS = 20


def candidates(base: ModelConfig, names: Sequence[str]) -> dict[str, ModelConfig]:
    """The named changes of a model."""
    return {name: dataclasses.replace(base, name=name, **CHANGES[name]) for name in names}


def train(
    config: ModelConfig,
    pack: TrainingPack,
    out: Path,
    settings: loop.TrainConfig,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Path:
    """Train one candidate, or go on with it; returns its checkpoint. A larger budget trains a finished one further."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    trainer = loop.Trainer(Inter2Former(config), settings, torch.device("cpu"))
    if (out / "state.pt").is_file():
        trainer.load(out / "state.pt")
    result = out / "model.safetensors"

    def save(average: Inter2Former, facts: dict[str, Any]) -> None:
        save_checkpoint(result, average, provenance={"recipe": "benchmarks candidates", **facts})

    if trainer.progress < 1 or not result.is_file():
        loop.run(trainer, pack, out, checkpoint=save, report=report)
    return result


def accuracy(checkpoint: Path, folder: Path, *, limit: int, size: ModelSize) -> dict[str, float]:
    """Means over sources of the val split; remembered beside the checkpoint for these weights and settings."""
    segmenter = load_segmenter(checkpoint, model_size=size, threads=1)
    asked = {"checkpoint": segmenter.digest, "limit": limit, "size": size, "clicks": CLICKS}
    memory = checkpoint.with_name("accuracy.json")
    if memory.is_file() and (known := json.loads(memory.read_bytes()))["asked"] == asked:
        return dict(known["mean"])
    with Pack(folder) as pack:
        refs = pack.choose("val", limit)
        with score_progress(len(refs), checkpoint.parent.name) as advance:
            scores = evaluate(
                pack.targets(refs),
                lambda image, made: segmenter.segment(image, made).mask,
                clicks=CLICKS,
                prepare=segmenter.prefetch,
                on_score=advance,
            )
    mean: dict[str, float] = summarise(scores)["mean"]
    write_atomically(memory, json.dumps({"asked": asked, "mean": mean}).encode())
    return mean


def cpu_times(checkpoints: dict[str, Path], *, size: ModelSize, runs: int) -> dict[str, dict[str, float]]:
    """Median CPU milliseconds of one thread: encoding, first click, later click; candidates take turns."""
    segmenters = {name: load_segmenter(path, model_size=size, threads=1) for name, path in checkpoints.items()}
    spent: dict[str, dict[str, list[float]]] = {n: {"encode": [], "first_click": [], "click": []} for n in checkpoints}
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    made = [Click(320, 240), Click(200, 150), Click(400, 300), Click(300, 100, positive=False), Click(500, 400)]
    for run in range(runs + 1):
        for name, segmenter in segmenters.items():
            segmenter.clear_cache()
            times = [time.process_time()]
            segmenter.prefetch(image)
            times.append(time.process_time())
            for n in range(1, SESSION + 1):
                segmenter.segment(image, made[:n])
                times.append(time.process_time())
            if run:  # the first one warms up
                steps = [1000 * step for step in np.diff(times)]
                spent[name]["encode"].append(steps[0])
                spent[name]["first_click"].append(steps[1])
                spent[name]["click"] += steps[2:]
    return {
        name: {f"{what}_ms": round(statistics.median(values), 2) for what, values in parts.items()}
        for name, parts in spent.items()
    }


def table(
    checkpoints: dict[str, Path], folder: Path, *, limit: int, size: ModelSize, runs: int
) -> list[dict[str, Any]]:
    """A row a candidate."""
    times = cpu_times(checkpoints, size=size, runs=runs)
    rows = []
    for name, path in checkpoints.items():
        mean = accuracy(path, folder, limit=limit, size=size)
        loaded = load_checkpoint(path)
        session = times[name]["encode_ms"] + times[name]["first_click_ms"] + (SESSION - 1) * times[name]["click_ms"]
        row: dict[str, Any] = {
            "candidate": name,
            "parameters_m": round(sum(p.numel() for p in loaded.model.parameters()) / 1e6, 2),
            "steps": loaded.provenance.get("steps"),
        }
        row |= {key: mean[key] for key in ("miou@1", "miou@3", "miou@5", "noc90") if key in mean}
        row |= times[name]
        row |= {"session_ms": round(session, 1), "miou@5_per_ms": round(mean["miou@5"] / session, 3)}
        rows.append(row)
    return rows


def plot(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """PNG: mIoU@5 against the CPU time of an image with five clicks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for row, marker in zip(rows, itertools.cycle("osD^vP*X")):  # beside the picture: names of equal ones would collide
        axes.plot(row["session_ms"], row["miou@5"], marker, markersize=8, alpha=0.7, label=row["candidate"])
    axes.set(xlabel=f"CPU ms of an image with {SESSION} clicks", ylabel="mIoU@5, %")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.margins(0.2)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def main(
    data: Annotated[list[Path], typer.Option(help="A pack (the first one is measured on), or a folder of cut-outs.")],
    out: Annotated[Path, typer.Option(help="A folder a candidate is made in here.")],
    minutes: Annotated[float, typer.Option(help="Of training, each candidate.")] = 30.0,
    max_steps: Annotated[int | None, typer.Option(help="Steps instead of minutes: repeats exactly.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(CHANGES)}; may be repeated.")] = None,
    batch: int = loop.TrainConfig.batch,
    crop: Annotated[list[int] | None, typer.Option(help="Side of training crops; may be repeated.")] = None,
    seed: int = 0,
    workers: int = 1,
    train_limit: Annotated[int | None, typer.Option(help="Training photos a source, for rehearsals.")] = None,
    limit: Annotated[int, typer.Option(help="Val objects a source.")] = 20,
    size: Annotated[int | None, typer.Option(help="Model size T [what the model chooses].")] = None,
    runs: Annotated[int, typer.Option(help="Timed sessions.")] = 10,
    threads: int = 1,
    write: Annotated[bool, typer.Option(help="Keep table and picture in benchmarks/results/.")] = False,
) -> None:
    """Train candidates alike, measure them, print a table."""
    if unknown := sorted(set(only or ()) - set(CHANGES)):
        raise typer.BadParameter(f"unknown candidate {', '.join(unknown)}; choose from {', '.join(CHANGES)}.")
    torch.set_num_threads(threads)
    cv2.setNumThreads(0)
    settings = loop.TrainConfig(
        seed=seed, minutes=minutes, max_steps=max_steps, batch=batch, sizes=tuple(crop or loop.TrainConfig.sizes),
        workers=workers,
    )  # fmt: skip
    pack = read_pack(data, limit=train_limit)
    checkpoints = {}
    for name, config in candidates(small(), only or list(CHANGES)).items():
        checkpoints[name] = train(config, pack, out / name.replace(" ", "_"), settings)
        print(f"{name}: trained")
    rows = table(checkpoints, data[0], limit=limit, size=size or "auto", runs=runs)
    budget = f"{max_steps} steps" if max_steps else f"{minutes:g} minutes"
    title = f"{budget} of training each, {limit} objects a source, one thread"
    print_rows(title, rows)
    if write:
        facts = {"settings": dataclasses.asdict(settings), "limit": limit, "size": size or "auto", "rows": rows}
        path = write_result("candidates", facts, threads=1)
        write_atomically(path.with_suffix(".png"), plot(rows, title))
        print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
