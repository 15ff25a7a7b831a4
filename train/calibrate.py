"""`python -m train calibrate`: fit the predicted IoU of a checkpoint to the truth; nothing else of it changes.

Objects of the train split are clicked through as in evaluation; a tiny network learns the IoU from the evidence of
each answer (inter2former/score.py). The error is reported on objects of the val split.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from safetensors.torch import load_file

from inter2former import evaluation, score
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.errors import ConfigError, Inter2FormerError
from inter2former.prompts import Click
from inter2former.segmenter import ModelSize, Segmenter, load_segmenter
from inter2former.terminal import print_rows, score_progress

UNITS = 8  # of the hidden layer; none (a line) errs a tenth more, 16 and 32 gain nothing
CLICKS = 6  # an object; annotators seldom make more
REPORTED = (1, 3, 5)
_STEPS, _LR, _DECAY = 600, 0.02, 0.05


class Answer(NamedTuple):
    """One answer to a simulated click."""

    source: str
    clicks: int
    evidence: tuple[float, ...] | None  # None: an empty mask
    predicted: float
    iou: float


def collect(
    segmenter: Segmenter,
    targets: Iterable[evaluation.Target],
    clicks: int = CLICKS,
    on_score: Callable[[evaluation.Score], object] | None = None,
) -> list[Answer]:
    """Every answer while clicking through the targets."""
    answers: list[Answer] = []
    seen: list[tuple[tuple[float, ...] | None, float]] = []

    def segment(image: evaluation.Image, made: Sequence[Click]) -> evaluation.Mask:
        result = segmenter.segment(image, made)
        seen.append((result.evidence, result.score))
        return result.mask

    def keep(figures: evaluation.Score) -> None:
        for k, ((evidence, predicted), iou) in enumerate(zip(seen, figures.ious, strict=False), 1):
            answers.append(Answer(figures.source, k, evidence, predicted, iou))
        seen.clear()
        if on_score is not None:
            on_score(figures)

    evaluation.evaluate(targets, segment, clicks=clicks, prepare=segmenter.prefetch, on_score=keep)
    return answers


def fit(answers: Sequence[Answer], *, units: int = UNITS, seed: int = 0) -> tuple[float, ...]:
    """Weights for score.predict; the same for the same answers on one machine.

    raises  ConfigError when there are too few answers to learn from
    """
    useful = [(answer.evidence, answer.iou) for answer in answers if answer.evidence is not None]
    if len(useful) < 20:
        raise ConfigError(f"{len(useful)} masks are too few to calibrate with.", "Give more objects.")
    x = torch.tensor([evidence for evidence, _ in useful], dtype=torch.float64)
    y = torch.tensor([iou for _, iou in useful], dtype=torch.float64)
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-3)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return drawn.requires_grad_()

    W, b, v, c = random(units, x.shape[1]), random(units), random(units), random(1)
    optimizer = torch.optim.AdamW([W, b, v, c], lr=_LR, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)
    standard = (x - mean) / scale
    for _ in range(_STEPS):
        predicted = torch.sigmoid(torch.tanh(standard @ W.T + b) @ v + c)
        loss = torch.nn.functional.smooth_l1_loss(predicted, y, beta=0.05)  # the mean absolute error is what counts
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():  # weights for the evidence as it is
        W, b = W / scale, b - (W / scale) @ mean
        flat = torch.cat([W.flatten(), b, v, c])
    return tuple(float(f"{value:.6g}") for value in flat.tolist())


def errors(answers: Sequence[Answer], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Mean absolute error of the predicted IoU after 1, 3 and 5 clicks, mean over sources; 0..1.

    weights   None takes the scores as they were given
    """
    out = {}
    for k in REPORTED:
        by_source: dict[str, list[float]] = {}
        for answer in answers:
            if answer.clicks == k:
                predicted = answer.predicted
                if weights is not None:
                    predicted = 0.0 if answer.evidence is None else score.predict(answer.evidence, weights)
                by_source.setdefault(answer.source, []).append(abs(predicted - answer.iou))
        if by_source:
            out[f"score_mae@{k}"] = round(statistics.fmean(map(statistics.fmean, by_source.values())), 4)
    return out


def write(checkpoint: Path, out: Path, weights: tuple[float, ...], facts: dict[str, Any]) -> str:
    """The checkpoint with these weights of the score, tensors as precise as before; returns the digest."""
    loaded = load_checkpoint(checkpoint)
    dtype = next(t.dtype for t in load_file(checkpoint).values() if t.is_floating_point())
    loaded.model.config = dataclasses.replace(loaded.model.config, score_weights=weights)
    provenance = {**loaded.provenance, "calibration": {**facts, "of": loaded.digest}}
    return save_checkpoint(out, loaded.model, provenance=provenance, dtype=dtype)


def command(
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint to calibrate.")],
    data: Annotated[Path, typer.Option(help="A pack with the splits train and val.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write; may be the same file.")],
    limit: Annotated[int, typer.Option(min=1, help="Objects a source to fit on.")] = 45,
    val_limit: Annotated[int, typer.Option(min=1, help="Objects a source to report on.")] = 20,
    model_size: Annotated[int | None, typer.Option(help="Model size T [what the checkpoint chooses].")] = None,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads [all cores].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the score of a checkpoint predict the IoU: mean absolute error before and after, on val objects."""
    size: ModelSize = "auto" if model_size is None else model_size
    try:
        segmenter = load_segmenter(checkpoint, model_size=size, threads=threads)
        found: dict[str, list[Answer]] = {}
        with evaluation.Pack(data) as pack:
            for split, n in (("train", limit), ("val", val_limit)):
                refs = pack.choose(split, n)
                with score_progress(len(refs), split) as advance:
                    found[split] = collect(segmenter, pack.targets(refs), on_score=advance)
        weights = fit(found["train"], seed=seed)
        figures = {
            "before": errors(found["val"]),
            "after": errors(found["val"], weights),
            "on train": errors(found["train"], weights),
        }
        facts = {"objects a source": limit, "model_size": size, "answers": len(found["train"]), "val": figures["after"]}
        digest = write(checkpoint, out, weights, facts)
    except (Inter2FormerError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({"out": str(out), "sha256": digest, **figures}))
        return
    print_rows("mean absolute error of the score", [{"": name, **row} for name, row in figures.items()])
    typer.echo(f"wrote {out}")
