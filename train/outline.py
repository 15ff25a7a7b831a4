"""`python -m train outline`: fit the network that draws the outlines of a checkpoint's masks; no other weight changes.

Objects of the train split are clicked through as in evaluation. Of every answer is kept what had been found before its
outline was drawn, and what was shown before its latest click. Then small crops around outlines are cut out of what the
network would have seen (refinement.py), disturbed, mirrored and turned, and it learns what it should have added to the
logits.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from inter2former import evaluation, refinement
from inter2former.checkpoints import load_checkpoint
from inter2former.errors import ConfigError, Inter2FormerError
from inter2former.images import Frame
from inter2former.nn.model import Inter2Former
from inter2former.nn.outline import BEFORE, LOGITS, SCALE, WIDTHS, Outline
from inter2former.prompts import Click
from inter2former.refinement import SIDE, SURE, Spread, TokenBox
from inter2former.runtime.packing import pack as pack_model
from inter2former.segmenter import Segmenter
from inter2former.terminal import print_rows, score_progress
from train import fitted

CLICKS = 10  # an object
STEPS, WARMUP, BATCH, LR, DECAY = 6000, 100, 8, 2e-3, 0.02
CROP = 160  # pixels a side
NEARER = (0.75, 1.25)  # crops are cut from what is so much larger than what is served
JITTER = 30  # pixels between an outline and the middle of a crop
WRONG = 0.5  # of the crops lie where something is wrong, the others anywhere at the outline
BENT, BEND = 0.3, (1.0, 5.0)  # of the crops so many have bent logits, by so many pixels
NEAR = 2.5 / SCALE  # logits below are close to the outline, and count
FAR_WEIGHT = 0.15  # of the others
TENTHS = 10  # of a logit, in which what was shown is kept

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


class Answer(NamedTuple):
    """What was found before its outline was drawn.

    picture  number of what its frame shows
    logits   float16 [16 h, 16 w] in a box of the coarse frame's tokens
    clicks   pixels of the frame
    truth    bits of bool [H, W], see np.packbits
    before   what was shown before the latest click: a PNG of its logits, and a box of the frame's tokens
    """

    picture: int
    source: str
    frame: Frame
    coarse: Frame
    logits: Float16
    box: TokenBox
    clicks: tuple[tuple[int, int, bool], ...]
    truth: UInt8
    before: tuple[UInt8, TokenBox] | None

    def shown(self) -> Spread | None:
        """Before the latest click."""
        return None if self.before is None else Spread(_unpacked(self.before[0]), self.before[1])

    def found(self) -> Spread | None:
        return refinement.spread(self.logits.astype(np.float32), self.box, self.coarse, self.frame)

    def mask(self) -> Mask:
        """Of the truth, bool [H, W]."""
        shape = self.frame.height, self.frame.width
        return np.unpackbits(self.truth, count=shape[0] * shape[1]).reshape(shape).view(np.bool_)


class _Watching(Segmenter):
    """Keeps the answers for a target, which has to be said."""

    pictures: list[UInt8]
    answers: list[Answer]
    target: evaluation.Target

    def watch(self) -> None:
        self.pictures, self.answers = [], []
        self._numbers: dict[tuple[str, int], int] = {}

    def _drawn(self, pixels: Any, found: Any, before: Any, coarse: Frame, frame: Frame, clicks: Any) -> Any:
        number = self._numbers.setdefault((pixels.info.key, frame.size), len(self.pictures))
        if number == len(self.pictures):
            self.pictures.append(self._picture(pixels, frame))
        spread = refinement.spread(found.inside, found.box, coarse, coarse)  # no more of the frame than is looked at
        if spread is not None:
            logits = spread.logits.clip(-SURE, SURE).astype(np.float16)
            truth = np.packbits(self.target.mask)
            source, shown = self.target.source, None if before is None else (_packed(before.inside), before.box)
            self.answers.append(Answer(number, source, frame, coarse, logits, spread.box, tuple(clicks), truth, shown))
        return super()._drawn(pixels, found, before, coarse, frame, clicks)


def _packed(logits: Float32) -> UInt8:
    """As a PNG, to a tenth."""
    grey = np.rint((logits.clip(-SURE, SURE) + np.float32(SURE)) * TENTHS).astype(np.uint8)
    return np.asarray(cv2.imencode(".png", grey, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])


def _unpacked(png: UInt8) -> Float32:
    grey = np.asarray(cv2.imdecode(png, cv2.IMREAD_GRAYSCALE), np.float32)
    return grey / np.float32(TENTHS) - np.float32(SURE)


def collect(
    model: Inter2Former,
    targets: Iterable[evaluation.Target],
    clicks: int = CLICKS,
    *,
    on_score: Callable[[evaluation.Score], object] | None = None,
) -> tuple[list[UInt8], list[Answer]]:
    """Pictures, and every answer, while clicking through the targets.

    model    with an outline network, and packed
    targets  the objects of one image follow one another
    """
    watching = _Watching(model, cache_bytes=64 << 20)
    watching.watch()

    def said() -> Iterator[evaluation.Target]:
        for watching.target in targets:
            yield watching.target

    def segment(image: evaluation.Image, made: Sequence[Click]) -> evaluation.Mask:
        return watching.segment(image, made).mask

    evaluation.evaluate(said(), segment, clicks=clicks, on_score=on_score)
    return watching.pictures, watching.answers


# -- crops -------------------------------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """seen float32 [CHANNELS, CROP, CROP]; truth, how much of a pixel is object; shown, 1 where there is a picture."""

    seen: Float32
    truth: Float32
    shown: Float32


def crop(answer: Answer, picture: UInt8, rng: np.random.Generator) -> Crop | None:
    """A part of what the network sees of an answer, somewhere at its outline; None when nothing was found."""
    found = answer.found()
    if found is None:
        return None
    seen = refinement.look(refinement.view(found, answer.shown(), picture, answer.clicks, SIDE * rng.uniform(*NEARER)))
    height, width = seen.shape[1:]
    left, top = 16 * found.box[0], 16 * found.box[1]
    rows, columns = found.logits.shape
    target = answer.frame.mask_to_model(answer.mask())[top : top + rows, left : left + columns]
    how = cv2.INTER_AREA if height < rows else cv2.INTER_LINEAR
    truth: Float32 = cv2.resize(target.astype(np.float32), (width, height), interpolation=how)  # type: ignore[assignment]
    shown = np.zeros((height, width), np.float32)
    valid = answer.frame.valid
    shown[: round((valid[0] - top) * height / rows), : round((valid[1] - left) * width / columns)] = 1
    if rng.random() < BENT:
        _bend(seen, rng)

    inside = seen[LOGITS] > 0
    places = np.argwhere(cv2.morphologyEx(inside.view(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)))
    if len(places) == 0:
        return None
    if rng.random() < WRONG and (wrong := inside != (truth > 0.5)).any():
        places = np.argwhere(wrong)
    middle = places[rng.integers(len(places))] + rng.integers(-JITTER, JITTER + 1, 2)
    parts = [_part(at, side) for at, side in zip(middle, (height, width), strict=True)]
    seen, truth, shown = (_cut(maps, parts) for maps in (seen, truth, shown))
    beyond = _cut(np.ones((height, width), np.float32), parts) == 0
    seen[LOGITS][beyond] = -SURE / SCALE
    if answer.before is not None:
        seen[BEFORE][beyond] = -SURE / SCALE
    shade = rng.uniform(0.8, 1.2), rng.normal(0, 0.15, (3, 1, 1)) + rng.normal(0, 0.2)
    seen[:3] = (seen[:3] * shade[0] + shade[1]) * shown
    turns, mirrored = int(rng.integers(4)), rng.random() < 0.5

    def turned(maps: Float32) -> Float32:
        maps = np.rot90(maps, turns, (-2, -1))
        return np.ascontiguousarray(maps[..., ::-1] if mirrored else maps, np.float32)

    return Crop(turned(seen), turned(truth), turned(shown))


def _bend(seen: Float32, rng: np.random.Generator) -> None:
    """Move the logits smoothly, in place: outlines are wrong in more ways than the decoder's."""
    height, width = seen.shape[1:]
    far = rng.uniform(*BEND)
    coarse = rng.normal(size=(2, max(height // 16, 2), max(width // 16, 2))).astype(np.float32) * np.float32(far)
    dy, dx = (cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC) for part in coarse)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    bent = cv2.remap(seen[LOGITS], x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    seen[LOGITS] = bent
    seen[LOGITS + 1] = 1 / (1 + np.exp(-SCALE * bent))


def _part(middle: int, side: int) -> int:
    """Where a crop begins along one side; inside, where it has room."""
    begin = int(middle) - CROP // 2
    return min(max(begin, 0), side - CROP) if side >= CROP else -((CROP - side) // 2)


def _cut(maps: Float32, begins: Sequence[int]) -> Float32:
    """[.., h, w] -> [.., CROP, CROP], zeros beyond."""
    out = np.zeros((*maps.shape[:-2], CROP, CROP), np.float32)
    here, there = [], []
    for begin, side in zip(begins, maps.shape[-2:], strict=True):
        first, last = max(begin, 0), min(begin + CROP, side)
        here.append(slice(first - begin, last - begin))
        there.append(slice(first, last))
    out[..., here[0], here[1]] = maps[..., there[0], there[1]]
    return out


# -- fit ---------------------------------------------------------------------------------------------------------------


def loss(logits: Tensor, truth: Tensor, shown: Tensor, before: Tensor) -> Tensor:
    """1 - soft IoU, and cross entropy, above all close to the outline. All [B, h, w]; `before` as the network sees."""
    chance, truth = torch.sigmoid(logits) * shown, truth * shown
    both = (chance * truth).sum((1, 2))
    overlap = (both + 20) / ((chance + truth - chance * truth).sum((1, 2)) + 20)
    weight = shown * (FAR_WEIGHT + (before.abs() < NEAR))
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (1 - overlap).mean() + (weight * entropy).sum() / weight.sum().clamp_min(1)


def fit(
    outline: Outline,
    pictures: Sequence[UInt8],
    answers: Sequence[Answer],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    lr: float = LR,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = lambda steps: steps,
) -> None:
    """Train the outline network in place, in bfloat16; the same for the same answers on one machine.

    Sources count with the root of their pictures.

    raises  ConfigError when there is nothing to learn from
    """
    by_source: dict[str, list[Answer]] = {}
    for answer in answers:
        if (answer.logits > 0).any():
            by_source.setdefault(answer.source, []).append(answer)
    if not by_source:
        raise ConfigError("In no answer anything was found.", "Give more objects.")
    sources = sorted(by_source)
    share = np.sqrt([len({answer.picture for answer in by_source[name]}) for name in sources])
    rng = np.random.default_rng(seed)

    def crops() -> list[Crop]:
        found: list[Crop] = []
        while len(found) < batch:
            pool = by_source[rng.choice(sources, p=share / share.sum())]
            answer = pool[rng.integers(len(pool))]
            one = crop(answer, pictures[answer.picture], rng)
            found += [] if one is None else [one]
        return found

    outline.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    outline.train()
    optimizer = torch.optim.AdamW(outline.parameters(), lr=lr, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    with ThreadPoolExecutor(1) as ahead:  # crops are cut while the network learns from those before
        waiting = ahead.submit(crops)
        for _ in progress(range(steps)):
            seen, truth, shown = (torch.from_numpy(np.stack(part)) for part in zip(*waiting.result(), strict=True))
            waiting = ahead.submit(crops)
            with torch.autocast("cpu", torch.bfloat16):
                change = outline(seen.contiguous(memory_format=torch.channels_last))
            before = seen[:, LOGITS]
            error = loss(before * SCALE + change.float(), truth, shown, before)
            optimizer.zero_grad()
            error.backward()
            torch.nn.utils.clip_grad_norm_(outline.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    outline.eval()


def ious(model: Inter2Former, pictures: Sequence[UInt8], answers: Sequence[Answer]) -> dict[str, float]:
    """Mean IoU of the masks as found, and as the model draws them, mean over sources; 0..1."""
    found: dict[str, list[tuple[float, float]]] = {}
    for answer in answers:
        spread = answer.found()
        if spread is None:
            continue
        view = refinement.view(spread, answer.shown(), pictures[answer.picture], answer.clicks)
        masks = (
            answer.frame.mask_from_logits(torch.from_numpy(logits), spread.box)
            for logits in (spread.logits, refinement.drawn(view, model.draw(refinement.look(view))).logits)
        )
        truth = answer.mask()
        before, after = (evaluation.iou(mask, truth) for mask in masks)
        found.setdefault(answer.source, []).append((before, after))
    if not found:
        return {}
    means = [[statistics.fmean(column) for column in zip(*pairs, strict=True)] for pairs in found.values()]
    before, after = (statistics.fmean(column) for column in zip(*means, strict=True))
    return {"as found": round(before, 4), "drawn": round(after, 4)}


def with_outline(model: Inter2Former, widths: tuple[int, ...], seed: int) -> Inter2Former:
    """The model with an outline network of these widths: its own, if it has one, else one that changes nothing yet."""
    return fitted.with_part(model, "outline", seed, outline_widths=widths)


def write(checkpoint: Path, out: Path, outline: Outline, widths: tuple[int, ...], facts: dict[str, Any]) -> str:
    """The checkpoint with this outline network; returns the digest."""

    def change(model: Inter2Former) -> Inter2Former:
        model = with_outline(model, widths, 0)
        assert model.outline is not None
        model.outline.load_state_dict(outline.state_dict())
        return model

    return fitted.write(checkpoint, out, "outline", facts, change)


def command(
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint to fit.")],
    data: Annotated[Path, typer.Option(help="A pack with the splits train and val.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write; may be the same file.")],
    limit: Annotated[int, typer.Option(min=1, help="Objects a source to fit on.")] = 100,
    clicks: Annotated[int, typer.Option(min=1, help="An object.")] = CLICKS,
    val_limit: Annotated[int, typer.Option(min=1, help="Objects a source to report on.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = STEPS,
    width: Annotated[
        list[int] | None,
        typer.Option(help=f"Channels at strides 2, 4, 8, 16; four times [{', '.join(map(str, WIDTHS))}]."),
    ] = None,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads [all cores].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit the network that draws outlines again in the photo. The score (`calibrate`) is to be fitted afterwards."""
    widths = tuple(width or WIDTHS)
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        model = with_outline(load_checkpoint(checkpoint).model, widths, seed)
        assert model.outline is not None
        learnt = Outline(widths)
        learnt.load_state_dict(model.outline.state_dict())
        packed = pack_model(model)
        with evaluation.Pack(data) as pack:

            def answers(split: str, n: int) -> tuple[list[UInt8], list[Answer]]:
                refs = pack.choose(split, n)
                with score_progress(len(refs), f"{split}, answers") as advance:
                    return collect(packed, pack.targets(refs), clicks, on_score=advance)

            held_out, seen = answers("val", val_limit), answers("train", limit)

        def shown(numbers: range) -> Iterable[int]:
            return track(numbers, description="outlines", disable=as_json)

        fit(learnt, *seen, steps=steps, seed=seed, progress=shown)
        facts = {"objects a source": limit, "clicks": clicks, "answers": len(seen[1]), "steps": steps}
        digest = write(checkpoint, out, learnt, widths, facts)
        figures = ious(load_checkpoint(out).model, *held_out)
    except (Inter2FormerError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({"out": str(out), "sha256": digest, **figures}))
        return
    print_rows("IoU of val objects", [figures])
    typer.echo(f"wrote {out}")
