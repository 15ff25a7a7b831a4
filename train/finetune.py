"""Fine-tuning: an annotation export in, a checkpoint out that is not worse than its parent on pictures held back.

The steps of one run and the command line for them. Reading exports is in exports.py, the training itself in loop.py.

A run writes into its folder:
    export_report.txt     every line of the export's report
    run.json              what the run is made of; a resumed run must be made of the same
    before.json           figures of the parent on the held-back pictures
    state.pt, log.jsonl   the training so far
    rejected.safetensors  the tuned weights, when they turned out worse than the parent
    model.safetensors     the result: the tuned weights, or the parent's bytes when those are better
    finetune.json         everything that was printed
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer

from inter2former import evaluation
from inter2former.checkpoints import STARTER, load_checkpoint, save_checkpoint
from inter2former.errors import ConfigError, Inter2FormerError
from inter2former.files import write_atomically
from inter2former.nn.model import Inter2Former
from inter2former.segmenter import load_segmenter
from inter2former.terminal import print_rows, score_progress
from train import loop
from train.cvat_exports import read_cvat
from train.data import DrawConfig, Pack, Photo
from train.exports import ExportError, ObjectMask, Record, Report, read_label_studio, split_by_content
from train.run_folder import claim

# A tuned model counts as worse when the mean of these falls: they are in the printed table, and say more than the
# number of clicks, which stays at its maximum for every object that is never reached.
JUDGED = tuple(f"miou@{k}" for k in evaluation.MIOU_AT)

LONGER_SIDE = 1024  # photos are trained on at most this large: twice what a starter sees of them in use
SMALLEST = 8  # pixels of an object there; the largest magnification of a crop makes 128 of them
FREE = ("minutes", "max_steps", "workers")  # may change when a run is continued
LINES_PRINTED = 20  # of the export's report; all of them are in the file


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """One run. Each default with its reason."""

    minutes: float = 20.0  # of training; the two measurements come on top
    max_steps: int | None = None  # instead of minutes: for tests and exact repetition
    train_encoder: bool = False  # a few photos teach the decoder; the encoder would forget the rest
    seed: int = 0
    lr: float = 2e-4  # a fifth of what the starter is trained with from scratch
    batch: int = 8  # crops
    size: int = 256  # pixels of a crop; the last stretch uses larger ones
    objects: int = 60  # measured on the held-back pictures; more do not change the verdict, only the time
    clicks: int = evaluation.MAX_CLICKS
    held_back: float = 0.2  # of the pictures
    workers: int = 1  # data processes

    def __post_init__(self) -> None:
        rules = [
            (self.minutes > 0, "minutes must be above 0"),
            (self.max_steps is None or self.max_steps > 0, "max-steps must be at least 1"),
            (self.size >= 64 and self.size % 16 == 0, "size must be a multiple of 16 from 64 on"),
            (self.batch >= 1, "batch must be at least 1"),
            (self.objects >= 1, "objects must be at least 1"),
            (self.clicks >= 1, "clicks must be at least 1"),
            (0 < self.held_back < 1, "held-back must be between 0 and 1"),
            (self.lr > 0, "lr must be above 0"),
        ]
        if broken := [text for holds, text in rules if not holds]:
            raise ConfigError("Fine-tuning: " + "; ".join(broken) + ".")

    def training(self) -> loop.TrainConfig:
        """For the loop: clicks alone, on the objects as they are; no unions, parts or complements of them."""
        return loop.TrainConfig(
            seed=self.seed,
            minutes=self.minutes,
            max_steps=self.max_steps,
            batch=self.batch,
            sizes=(self.size, self.size, self.size * 3 // 32 * 16),  # a third of the steps one and a half times
            freeze_norms=True,
            dense_share=0.0,
            dense_weight=0.0,
            lr=self.lr,
            warmup_steps=20,
            ema=0.99,
            amp=torch.cuda.is_available(),  # float32 on a CPU: the steps of a fine-tuning are small
            workers=self.workers,
            draw=DrawConfig(paste=0.0, union=0.0, minus=0.0, complement=0.0, whole=0.35),
        )


def run(
    records: Sequence[Record],
    out: Path,
    config: FinetuneConfig,
    *,
    checkpoint: Path = STARTER,
    data: dict[str, Any] | None = None,
    force: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Split, measure, train, measure, decide; returns what finetune.json holds.

    data     where the records come from, for the provenance
    force    keep the tuned weights even when they are worse
    raises   ExportError, CheckpointError, ConfigError
    """
    train, held = split_by_content(records, config.held_back)
    parent = load_checkpoint(checkpoint)
    identity = {
        "parent": parent.digest,
        "train": _digest_of(train),
        "held_back": _digest_of(held),
        "config": {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE},
    }
    claim(out, identity, resume)
    objects = choose_objects(held, config.objects)
    say(f"{len(train)} pictures to train on, {len(held)} held back, of which {len(objects)} objects are measured.")

    before = _remembered(out / "before.json", lambda: measure(checkpoint, objects, config.clicks, "before"))

    pack, n_lost = build_pack(train)
    if n_lost:
        say(f"{n_lost} objects are not trained on: under {SMALLEST} pixels in a photo of {LONGER_SIDE}.")
    if not config.train_encoder:
        _freeze(parent.model.encoder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = loop.Trainer(parent.model, config.training(), device)
    if resume and (out / "state.pt").is_file():
        trainer.load(out / "state.pt")
        say(f"Continuing at step {trainer.step}.")
    loop.run(trainer, pack, out, report=_progress(trainer, say))

    facts = {
        "recipe": "finetune",
        "parent": parent.digest,
        "parent_provenance": parent.provenance,
        "data": {**(data or {}), "images": len(train), "objects": _count(train), "held_back": len(held)},
        "steps": trainer.step,
        "training_s": round(trainer.elapsed_s),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": dataclasses.asdict(config),
        "before": before,
    }
    if "licence" in parent.provenance:
        facts["licence"] = parent.provenance["licence"]

    # Judged is what was written and read back, not what is in memory; the name that a server reads comes last.
    tuned, result, model = out / "rejected.safetensors", out / "model.safetensors", trainer.average.model
    assert isinstance(model, Inter2Former)
    save_checkpoint(tuned, model, provenance=facts)
    after = measure(tuned, objects, config.clicks, "after")
    better = _score(after) >= _score(before)
    accepted = better or force
    if accepted:
        digest = save_checkpoint(result, model, provenance={**facts, "after": after, "forced": not better})
        tuned.unlink()
    else:
        write_atomically(result, Path(checkpoint).read_bytes())
        digest = parent.digest
    summary = {
        "accepted": accepted,
        "better": better,
        "before": before,
        "after": after,
        "checkpoint": str(result),
        "digest": digest,
        "parent": parent.digest,
        "steps": trainer.step,
        "training_s": round(trainer.elapsed_s, 1),
        "images": {"train": len(train), "held_back": len(held)},
        "objects": {"train": _count(train), "held_back": _count(held), "measured": len(objects)},
    }
    write_atomically(out / "finetune.json", json.dumps(summary, indent=1).encode())
    return summary


def _freeze(module: torch.nn.Module) -> None:
    """No gradients, and no training mode either: it would move the running means of batch norms."""
    module.requires_grad_(False).eval()
    module.train = types.MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]


# -- data ------------------------------------------------------------------------------------------------------------


def build_pack(records: Sequence[Record]) -> tuple[Pack, int]:
    """Records as a pack in memory, and the number of objects too small to be trained on.

    Objects that overlap go into different label maps of their photo.
    """
    photos, n_lost = [], 0
    for record in records:
        rgb = record.image()
        scale = min(1.0, LONGER_SIDE / max(rgb.shape[:2]))
        width, height = (max(1, round(side * scale)) for side in (rgb.shape[1], rgb.shape[0]))
        maps: list[np.ndarray] = []
        rows: list[tuple[int, int, int]] = []
        if scale < 1:
            rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        for number, mask in enumerate(record.masks, start=1):
            pixels = mask.pixels()
            if scale < 1:
                covered = cv2.resize(pixels.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
                pixels = np.asarray(covered >= 0.5)
            if pixels.sum() < SMALLEST:
                n_lost += 1
                continue
            layer = next((n for n, labels in enumerate(maps) if not labels[pixels].any()), len(maps))
            if layer == len(maps):
                maps.append(np.zeros((height, width), np.uint16))
            maps[layer][pixels] = number
            rows.append((layer, number, int(pixels.sum())))
        photos.append(Photo(record.key, "export", rgb, tuple(maps), np.array(rows, np.int64).reshape(-1, 3)))
    if not any(len(photo.objects) for photo in photos):
        raise ExportError("No object is large enough to train on.", f"Photos are scaled to {LONGER_SIDE} pixels.")
    return Pack(tuple(photos)), n_lost


def choose_objects(records: Sequence[Record], limit: int) -> list[tuple[Record, ObjectMask]]:
    """At most `limit` objects, the same ones each time, spread over the pictures; objects of a picture together."""
    ranked = []
    for record in records:
        ordered = sorted(record.masks, key=lambda mask: hashlib.blake2b(mask.bits, digest_size=8).digest())
        ranked += [(rank, record.key, record, mask) for rank, mask in enumerate(ordered)]
    chosen = sorted(ranked, key=lambda row: row[:2])[:limit]
    return [(record, mask) for _, _, record, mask in sorted(chosen, key=lambda row: row[1])]


def _targets(objects: Sequence[tuple[Record, ObjectMask]]) -> Iterator[evaluation.Target]:
    record, image = None, np.zeros((0, 0, 3), np.uint8)
    for wanted, mask in objects:
        if wanted is not record:
            record, image = wanted, wanted.image()
        yield evaluation.Target("held back", mask.where, image, mask.pixels())


def measure(
    checkpoint: Path, objects: Sequence[tuple[Record, ObjectMask]], clicks: int, title: str
) -> dict[str, float]:
    """Figures of a checkpoint under simulated clicks, as `evaluation.summarise` names them; IoU in percent."""
    segmenter = load_segmenter(checkpoint)
    with score_progress(len(objects), title) as advance:
        scores = evaluation.evaluate(
            _targets(objects),
            lambda image, made: segmenter.segment(image, made).mask,
            clicks=clicks,
            prepare=segmenter.prefetch,
            on_score=advance,
        )
    figures: dict[str, float] = evaluation.summarise(scores)["mean"]
    return figures


def _score(figures: dict[str, float]) -> float:
    return sum(figures[key] for key in JUDGED if key in figures)


# -- a run's folder --------------------------------------------------------------------------------------------------


def _remembered(path: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    if not path.is_file():
        write_atomically(path, json.dumps(make()).encode())
    figures: dict[str, float] = json.loads(path.read_bytes())
    return figures


def _digest_of(records: Sequence[Record]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        digest.update(record.key.encode())
        for mask in record.masks:
            digest.update(repr(mask.box).encode() + mask.bits)
    return digest.hexdigest()


def _count(records: Sequence[Record]) -> int:
    return sum(len(record.masks) for record in records)


def _progress(
    trainer: loop.Trainer, say: Callable[[str], None], every_s: float = 15.0
) -> Callable[[dict[str, Any]], None]:
    """A line now and then from the rows of the log, with the time that is left."""
    began, first, last = time.monotonic(), trainer.progress, time.monotonic()

    def report(row: dict[str, Any]) -> None:
        nonlocal last
        now, progress = time.monotonic(), trainer.progress
        if "loss" not in row or (now - last < every_s and progress < 1):
            return
        last = now
        left_s = (now - began) / max(1e-6, progress - first) * max(0.0, 1 - progress)
        say(f"step {row['step']}: loss {row['loss']:.3f}, IoU {row['iou']:.3f}, {left_s / 60:.1f} minutes left")

    return report


# -- command line ----------------------------------------------------------------------------------------------------


def read_export(export: Path, images: Path | None) -> tuple[list[Record], Report, dict[str, Any]]:
    """Records, report, and what the provenance says of their source.

    raises   ExportError
    """
    if export.suffix.lower() == ".json":
        if images is None:
            raise ExportError("Label Studio's export holds no photos.", "Give their folder with --images.")
        kind, (records, report) = "Label Studio JSON", read_label_studio(export, images)
    else:
        kind, (records, report) = "CVAT", read_cvat(export, images)
    digest = _digest_of(records) if export.is_dir() else hashlib.sha256(export.read_bytes()).hexdigest()
    return records, report, {"export": digest, "format": kind}


def print_report(records: Sequence[Record], report: Report, file: Any) -> None:
    """What the export holds: counts by kind, then the lines, the first of each kind at least."""
    print(f"{len(records)} images with {_count(records)} objects.", file=file)
    if not report.findings:
        return
    print("Export report: " + ", ".join(f"{n} x {kind}" for kind, n in report.counts().items()) + ".", file=file)
    for finding in report.findings[:LINES_PRINTED]:
        print(f"  {finding}", file=file)
    if (more := len(report.findings) - LINES_PRINTED) > 0:
        print(f"  ... and {more} more in export_report.txt", file=file)


def print_verdict(summary: dict[str, Any]) -> None:
    """The table before / after / change and the decision."""
    before, after = summary["before"], summary["after"]
    spelt = {"miou": "mIoU", "biou": "BIoU", "noc": "NoC", "nof": "NoF"}
    heads = {key: re.sub("|".join(spelt), lambda match: spelt[match[0]], key) for key in before}
    rows: list[dict[str, Any]] = [
        {"": name} | {heads[key]: figures[key] for key in before}
        for name, figures in (("before", before), ("after", after))
    ]
    change = {heads[key]: f"{after[key] - before[key]:+.1f}" for key in before if key != "objects"}
    rows.append({"": "change", "objects": ""} | change)
    print_rows("Held-back pictures, IoU in percent, clicks counted", rows)
    if summary["better"]:
        print(f"wrote {summary['checkpoint']}, SHA-256 {summary['digest']}")
    elif summary["accepted"]:
        print(f"wrote {summary['checkpoint']}, although it is worse than its parent (--force)")
    else:
        print(
            f"The tuned weights are worse on the held-back pictures: {summary['checkpoint']} is the parent unchanged. "
            "(--resume --force takes them nevertheless.)"
        )


def finetune(
    export: Annotated[
        Path, typer.Option(metavar="FILE", help="Label Studio's JSON, or a zip (or its folder) of CVAT: see the docs.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run; holds model.safetensors at the end.")],
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The photos, where the export does not hold them.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Training time; measuring before and after comes on top.")] = 20.0,
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="The parent [the starter weights].")] = None,
    train_encoder: Annotated[bool, typer.Option("--train-encoder", help="Train the image encoder, too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at any defect of the export.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Keep the tuned weights even when they are worse.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps instead of minutes.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = FinetuneConfig.lr,
    batch: Annotated[int, typer.Option(min=1, help="Crops a step.")] = FinetuneConfig.batch,
    size: Annotated[int, typer.Option(help="Pixels of a crop.")] = FinetuneConfig.size,
    objects: Annotated[int, typer.Option(min=1, help="Held-back objects to measure.")] = FinetuneConfig.objects,
    clicks: Annotated[int, typer.Option(min=1, help="Simulated clicks an object.")] = FinetuneConfig.clicks,
    workers: Annotated[int, typer.Option(min=0, help="Data processes.")] = FinetuneConfig.workers,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads [all cores].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tune a checkpoint on an export of Label Studio or CVAT; pictures held back decide whether it is kept."""
    people = sys.stderr if as_json else sys.stdout
    if threads is not None:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
    try:
        config = FinetuneConfig(
            minutes=minutes,
            max_steps=max_steps,
            train_encoder=train_encoder,
            seed=seed,
            lr=lr,
            batch=batch,
            size=size,
            objects=objects,
            clicks=clicks,
            workers=workers,
        )
        records, report, source = read_export(export, images)
        print_report(records, report, people)
        write_atomically(out / "export_report.txt", "".join(f"{finding}\n" for finding in report.findings).encode())
        if strict:
            report.raise_for_defects()
        summary = run(
            records,
            out,
            config,
            checkpoint=STARTER if checkpoint is None else checkpoint,
            data=source,
            force=force,
            resume=resume,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    except (Inter2FormerError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    summary["report"] = report.counts()
    if as_json:
        print(json.dumps(summary, allow_nan=False))
    else:
        print_verdict(summary)
