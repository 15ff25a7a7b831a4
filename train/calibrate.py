"""`python -m train calibrate`: fit a checkpoint's levels and its predicted IoU to the truth; nothing else changes.

Objects of the train split are clicked through as in evaluation. First a tiny network learns at which level the logits
of a pass are best cut (inter2former/level.py; only for a checkpoint with a random walk, which has the outlines that
it looks at); in rounds, because what it chooses decides which masks are clicked on next. Then, with these levels,
another one learns the IoU from the evidence of each answer (inter2former/score.py). What both bring is reported on
objects of the val split.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from inter2former import evaluation, level, score
from inter2former.checkpoints import load_checkpoint
from inter2former.errors import ConfigError, Inter2FormerError
from inter2former.images import Frame
from inter2former.nn.model import ImageEncoding, Inter2Former
from inter2former.prompts import Click
from inter2former.runtime.packing import pack as pack_model
from inter2former.segmenter import ModelSize, Segmenter, at_levels, load_segmenter
from inter2former.terminal import print_rows, score_progress
from train import fitted

UNITS = 16  # of the hidden layer; none (a line) errs a tenth more, 8 and 32 as much
CLICKS = 6  # an object; annotators seldom make more
LEVEL_CLICKS = 8  # late passes are where a wrong level costs most
REPORTED = (1, 3, 5)
_STEPS, _LR, _DECAY = 1500, 0.02, 0.05


LEVEL_UNITS = 40  # of the hidden layer; 24 gain a tenth less, 64 and a second layer nothing
_LEVEL_EPOCHS, _LEVEL_BATCH, _LEVEL_LR, _LEVEL_DECAY = 60, 128, 4e-3, 1e-3


def _random(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Weights to begin with, float64."""
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
    return [weights.requires_grad_() for weights in drawn]


@torch.no_grad()
def _of_plain_numbers(
    mean: torch.Tensor, scale: torch.Tensor, W: torch.Tensor, b: torch.Tensor, *rest: torch.Tensor
) -> tuple[float, ...]:
    """All weights one after the other, of numbers as they are instead of (x - mean) / scale; to six digits."""
    W = W / scale
    flat = torch.cat([W.flatten(), b - W @ mean, *rest])
    return tuple(float(f"{value:.6g}") for value in flat.tolist())


class Pass(NamedTuple):
    """One decoder pass: what its mask looks like at each level (level.describe), and its IoU there."""

    source: str
    described: tuple[tuple[float, ...] | None, ...]
    ious: tuple[float, ...]


class _Watching(Segmenter):
    """Keeps every pass while the target, which has to be said, is clicked through."""

    passes: list[Pass]
    target: evaluation.Target

    def _level(
        self,
        found: Any,
        encoding: ImageEncoding,
        clicks: Sequence[tuple[int, int, bool]],
        previous: Any,
        frame: Frame,
    ) -> float:
        truth = frame.mask_to_model(self.target.mask)
        asked = np.zeros(truth.shape, np.bool_)
        for row, column, positive in clicks:
            asked[row, column] |= positive
        ious = []
        for zero in level.LEVELS:
            cut = found.cut_at(zero).without_small(self.config.island_share, asked, inside=True)
            mask = np.zeros(truth.shape, np.bool_)
            np.greater(cut.inside, 0, out=mask[cut.pixels])
            ious.append(evaluation.iou(mask, truth))
        described = at_levels(found, encoding, clicks, previous, frame)
        self.passes.append(Pass(self.target.source, tuple(described), tuple(ious)))
        return super()._level(found, encoding, clicks, previous, frame)


def collect_passes(
    model: Inter2Former,
    targets: Iterable[evaluation.Target],
    clicks: int = LEVEL_CLICKS,
    *,
    levels: tuple[float, ...] = (),
    model_size: ModelSize = "auto",
    on_score: Callable[[evaluation.Score], object] | None = None,
) -> list[Pass]:
    """Every pass while clicking through the targets with masks that are cut by these weights of levels.

    model  one that was packed
    """
    watching = _Watching(model, model_size=model_size)
    watching.config = dataclasses.replace(watching.config, level_weights=levels)
    watching.passes = []

    def said() -> Iterator[evaluation.Target]:
        for watching.target in targets:
            yield watching.target

    def segment(image: evaluation.Image, made: Sequence[Click]) -> evaluation.Mask:
        return watching.segment(image, made).mask

    evaluation.evaluate(said(), segment, clicks=clicks, prepare=watching.prefetch, on_score=on_score)
    return watching.passes


def fit_levels(passes: Sequence[Pass], *, units: int = LEVEL_UNITS, seed: int = 0) -> tuple[float, ...]:
    """Weights for level.choose: the highest expected IoU, with the levels chosen by softmax. The same for the same
    passes on one machine.

    raises  ConfigError when there are too few passes to learn from
    """
    useful = [one for one in passes if any(one.described)]
    if len(useful) < 20:
        raise ConfigError(f"{len(useful)} masks are too few to calibrate with.", "Give more objects.")
    empty = (0.0,) * len(level.FEATURES)
    x = torch.tensor([[numbers or empty for numbers in one.described] for one in useful], dtype=torch.float64)
    known = torch.tensor([[numbers is not None for numbers in one.described] for one in useful])
    iou = torch.tensor([one.ious for one in useful], dtype=torch.float64)
    mean, scale = x[known].mean(0), x[known].std(0).clamp_min(1e-3)
    x = (x - mean) / scale
    generator = torch.Generator().manual_seed(seed)
    W, b, v = _random(generator, (units, x.shape[2]), (units,), (units,))
    optimizer = torch.optim.AdamW([W, b, v], lr=_LEVEL_LR, weight_decay=_LEVEL_DECAY)
    steps = _LEVEL_EPOCHS * -(-len(x) // _LEVEL_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(_LEVEL_EPOCHS):
        for batch in torch.randperm(len(x), generator=generator).split(_LEVEL_BATCH):
            worth = torch.tanh(x[batch] @ W.T + b) @ v
            chosen = worth.masked_fill(~known[batch], -torch.inf).softmax(1)
            loss = -(chosen * iou[batch]).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return _of_plain_numbers(mean, scale, W, b, v)


def ious_at_levels(passes: Sequence[Pass], weights: Sequence[float]) -> dict[str, float]:
    """Mean IoU of the passes at zero, at the chosen levels and at the best ones, mean over sources; 0..1."""
    found: dict[str, dict[str, list[float]]] = {"at zero": {}, "chosen": {}, "best": {}}
    for one in passes:
        chosen = level.LEVELS.index(level.choose(one.described, weights))
        for name, value in (("at zero", one.ious[level.ZERO]), ("chosen", one.ious[chosen]), ("best", max(one.ious))):
            found[name].setdefault(one.source, []).append(value)
    return {name: round(statistics.fmean(map(statistics.fmean, by.values())), 4) for name, by in found.items()}


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
    W, b, v, c = _random(generator, (units, x.shape[1]), (units,), (units,), (1,))
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
    return _of_plain_numbers(mean, scale, W, b, v, c)


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


def write(
    checkpoint: Path, out: Path, weights: tuple[float, ...], levels: tuple[float, ...], facts: dict[str, Any]
) -> str:
    """The checkpoint with these weights of score and levels; returns the digest."""

    def change(model: Inter2Former) -> Inter2Former:
        model.config = dataclasses.replace(model.config, score_weights=weights, level_weights=levels)
        return model

    return fitted.write(checkpoint, out, "calibration", facts, change)


def command(
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint to calibrate.")],
    data: Annotated[Path, typer.Option(help="A pack with the splits train and val.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write; may be the same file.")],
    limit: Annotated[int, typer.Option(min=1, help="Objects a source to fit on.")] = 45,
    val_limit: Annotated[int, typer.Option(min=1, help="Objects a source to report on.")] = 20,
    first_limit: Annotated[int, typer.Option(min=1, help="Objects a source whose first clicks fit the levels.")] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="Of levels; each learns from those before it too.")] = 2,
    model_size: Annotated[int | None, typer.Option(help="Model size T [what the checkpoint chooses].")] = None,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads [all cores].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit where masks are cut and what IoU the score promises: mean absolute error before and after, on val objects."""
    size: ModelSize = "auto" if model_size is None else model_size
    try:
        segmenter = load_segmenter(checkpoint, model_size=size, threads=threads)
        levels = segmenter.config.level_weights
        figures: dict[str, dict[str, float]] = {}
        with evaluation.Pack(data) as pack:

            def answers(split: str, n: int) -> list[Answer]:
                refs = pack.choose(split, n)
                with score_progress(len(refs), f"{split}, score") as advance:
                    return collect(segmenter, pack.targets(refs), on_score=advance)

            def passes(refs: Sequence[evaluation.ObjectRef], clicks: int, what: str) -> list[Pass]:
                with score_progress(len(refs), what) as advance:
                    return collect_passes(
                        model, pack.targets(refs), clicks, levels=levels, model_size=size, on_score=advance
                    )

            figures["before"] = errors(answers("val", val_limit))
            if segmenter.config.walk_trust:
                model = pack_model(load_checkpoint(checkpoint).model)
                levels = ()
                refs = pack.choose("train", limit)
                known = set(refs)
                # At the first click there is most to choose, and no level before it that matters.
                more = [ref for ref in pack.choose("train", first_limit) if ref not in known]
                seen = passes(more, 1, "train, first clicks") if more else []
                for number in range(rounds):
                    seen += passes(refs, LEVEL_CLICKS, f"train, levels {number + 1} of {rounds}")
                    levels = fit_levels(seen, seed=seed)
                refs = pack.choose("val", val_limit)
                figures["IoU of passes"] = ious_at_levels(passes(refs, LEVEL_CLICKS, "val, levels"), levels)
                segmenter.config = dataclasses.replace(segmenter.config, level_weights=levels)
                segmenter.clear_cache()
            found = answers("train", limit)
            weights = fit(found, seed=seed)
            figures["after"] = errors(answers("val", val_limit), weights)
            figures["on train"] = errors(found, weights)
        facts = {
            "objects a source": limit,
            "first clicks a source": first_limit,
            "rounds": rounds,
            "model_size": size,
            "answers": len(found),
            "val": figures["after"],
        }
        digest = write(checkpoint, out, weights, levels, facts)
    except (Inter2FormerError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({"out": str(out), "sha256": digest, **figures}))
        return
    in_levels = figures.pop("IoU of passes", None)
    if in_levels is not None:
        print_rows("IoU by level", [in_levels])
    print_rows("mean absolute error of the score", [{"": name, **row} for name, row in figures.items()])
    typer.echo(f"wrote {out}")
