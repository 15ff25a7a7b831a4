"""`python -m train distill`: a small model that sees what a large one sees (the paper's second protocol).

1. look     the teacher's tokens for views of the training photos, computed once and kept in OUT/tokens
2. encoder  the student's encoder learns them: mean squared error, through a projection where the widths differ
3. clicks   the whole student learns from simulated clicks on labelled objects (loop.py)

The teacher is one of our checkpoints, or a folder with a SAM-family model for `transformers` (an extra). Nothing of
the teacher is in the student's file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import cv2
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import PRESETS, ModelConfig
from inter2former.errors import ConfigError, Inter2FormerError
from inter2former.files import write_atomically
from inter2former.images import Frame
from inter2former.nn.model import Inter2Former
from train import fast, loop
from train.augment import photometric
from train.data import Pack, read_pack
from train.pretrain import device_of, make_probe, quiet_threads
from train.run_folder import claim

SAM_STEP = 16  # pixels a token side, in every SAM


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """One run. Each default with its reason."""

    seed: int = 0
    minutes: float = 120.0  # of training, both stages together; looking comes on top and is done once
    max_steps: int | None = None  # instead of minutes: for tests and exact repetition
    encoder_share: float = 0.4  # of the budget: tokens teach faster than clicks, outlines need the second stage
    views: int = 2  # of each photo: the whole, then crops; more cost teacher time and disk, and see more scales
    batch: int = 16
    # Sides of the student's input in the first stage. The teacher's tokens are kept on the grid of the largest.
    sizes: tuple[int, ...] = (256, 384, 512)
    lr: float = 1e-3
    workers: int = 1  # data processes
    save_every_s: float = 120.0
    clicks: loop.TrainConfig = dataclasses.field(default_factory=lambda: loop.TrainConfig(dense_share=0.0))

    def __post_init__(self) -> None:
        rules = [
            (self.minutes > 0, "minutes must be above 0"),
            (self.max_steps is None or self.max_steps > 0, "max-steps must be at least 1"),
            (0 <= self.encoder_share < 1, "encoder-share must be from 0 to below 1"),
            (self.views >= 1, "views must be at least 1"),
            (self.batch >= 1, "batch must be at least 1"),
            (
                len(self.sizes) > 0 and all(s >= 16 and s % 16 == 0 for s in self.sizes),
                "sizes must be multiples of 16",
            ),
        ]
        if broken := [text for holds, text in rules if not holds]:
            raise ConfigError("Distillation: " + "; ".join(broken) + ".")

    def first(self) -> loop.TrainConfig:
        """Budget and rates of the encoder stage, for loop.rate_at."""
        steps = None if self.max_steps is None else round(self.max_steps * self.encoder_share)
        minutes = self.minutes * self.encoder_share
        return dataclasses.replace(self.clicks, minutes=minutes, max_steps=steps, lr=self.lr, seed=self.seed)

    def second(self) -> loop.TrainConfig:
        first = self.first()
        return dataclasses.replace(
            self.clicks,
            seed=self.seed,
            minutes=self.minutes - first.minutes,
            max_steps=None if self.max_steps is None else self.max_steps - (first.max_steps or 0),
            batch=self.batch,
            lr=self.lr,
            workers=self.workers,
            save_every_s=self.save_every_s,
        )


# -- teachers --------------------------------------------------------------------------------------------------------


class Teacher(Protocol):
    """Whatever gives an image tokens of stride 16."""

    name: str
    digest: str  # of its weights
    facts: dict[str, Any]  # for the provenance
    width: int

    def tokens(self, rgb: np.ndarray) -> Tensor:
        """uint8 [h, w, 3] -> float32 [width, a, b]: the part of the grid that shows the image."""


class OurTeacher:
    """One of our checkpoints, at model size T."""

    def __init__(self, path: Path, size: int, device: torch.device) -> None:
        loaded = load_checkpoint(path)
        self.name, self.digest, self.size, self.device = path.name, loaded.digest, size, device
        self.model = loaded.model.to(device).requires_grad_(False)
        self.width = self.model.config.embed_dim
        self.facts = {"kind": self.model.config.name, "licence": loaded.provenance.get("licence")}

    @torch.inference_mode()
    def tokens(self, rgb: np.ndarray) -> Tensor:
        height, width, _ = rgb.shape
        frame = Frame(height, width, self.size, self.model.config.input_convention)
        tokens, _ = self.model.encoder(frame.prepare(rgb)[None].to(self.device))
        return _shown(tokens[0].float().cpu(), frame.valid)


class SamTeacher:
    """A model of the SAM family from a local folder: config.json and safetensors, read by `transformers`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files or not (folder / "config.json").is_file():
            raise ConfigError(
                f"{folder} is no folder of a teacher: config.json and *.safetensors are needed.",
                "Pickled weights (.bin, .pth) are not read; save them with save_pretrained first.",
            )
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is all there is
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise ConfigError(
                "A SAM teacher needs the package transformers.", "pip install transformers, or the bench extra."
            ) from error
        try:
            model = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            raise ConfigError(f"transformers cannot read {folder}: {str(error).splitlines()[0]}") from error
        if not hasattr(model, "get_image_embeddings"):
            raise ConfigError(f"{folder} holds a {type(model).__name__}, which has no image embeddings.")
        self.model = model.to(device).eval().requires_grad_(False)
        self.name, self.device = folder.name, device
        self.size = int(model.config.prompt_encoder_config.image_size)
        self.digest = hashlib.sha256(b"".join(_digest(file) for file in files)).hexdigest()
        self.width = int(model.config.prompt_encoder_config.hidden_size)
        self.facts = {"kind": type(model).__name__, "licence": None}

    @torch.inference_mode()
    def tokens(self, rgb: np.ndarray) -> Tensor:
        height, width, _ = rgb.shape
        frame = Frame(height, width, self.size, "fit")
        found = self.model.get_image_embeddings(frame.prepare(rgb)[None].to(self.device))
        if isinstance(found, tuple):  # SAM-HQ: embeddings, then those of blocks in between
            found = found[0]
        elif isinstance(found, list):  # SAM 2 and its children: a pyramid, coarsest last
            found = found[-1]
        return _shown(found[0].float().cpu(), frame.valid)


def open_teacher(path: Path, size: int, device: torch.device) -> Teacher:
    """A file is one of ours, a folder belongs to transformers.

    size    model size T for ours; a SAM has its own
    raises  CheckpointError, ConfigError
    """
    return SamTeacher(path, device) if path.is_dir() else OurTeacher(path, size, device)


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _shown(tokens: Tensor, valid: tuple[int, int]) -> Tensor:
    """Without the tokens that show padding alone."""
    rows, columns = (-(-v // SAM_STEP) for v in valid)
    return tokens[:, :rows, :columns]


# -- looking ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
    """A rectangle of a photo: index of the photo, x0, y0, x1, y1 in its pixels."""

    photo: int
    rect: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.photo}-" + "-".join(map(str, self.rect))


def choose_views(pack: Pack, n: int, seed: int) -> list[View]:
    """The whole of every photo, then n - 1 crops of a third to nine tenths of its sides; the same for the same seed."""
    views = []
    for index, photo in enumerate(pack.photos):
        height, width = photo.rgb.shape[:2]
        views.append(View(index, (0, 0, width, height)))
        rng = np.random.default_rng([seed, index])
        for _ in range(n - 1):
            share = rng.uniform(0.35, 0.9)
            w, h = max(16, round(share * width)), max(16, round(share * height))
            x, y = int(rng.integers(max(1, width - w))), int(rng.integers(max(1, height - h)))
            views.append(View(index, (x, y, min(width, x + w), min(height, y + h))))
    return views


def look(
    teacher: Teacher,
    pack: Pack,
    views: Sequence[View],
    folder: Path,
    grid: int,
    track: Callable[[Sequence[View]], Iterator[View]] = iter,
) -> None:
    """Write the teacher's tokens of every view that is not there yet: float16 [width, a, b], longer side `grid`."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in track(views):
        file = folder / f"{view.name}.safetensors"
        if file.is_file():
            continue
        x0, y0, x1, y1 = view.rect
        tokens = teacher.tokens(np.ascontiguousarray(pack.photos[view.photo].rgb[y0:y1, x0:x1]))
        if not bool(torch.isfinite(tokens).all()):
            raise ConfigError(f"The teacher {teacher.name} gives values that are not finite.", "Is the file damaged?")
        shape = _grid_of(y1 - y0, x1 - x0, grid)
        write_atomically(file, safetensors.torch.save({"tokens": _resize(tokens, shape).half()}))


def _grid_of(height: int, width: int, grid: int) -> tuple[int, int]:
    """Tokens of a view whose longer side has `grid` of them."""
    longer = max(height, width)
    return max(1, round(grid * height / longer)), max(1, round(grid * width / longer))


def _resize(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """[C, a, b] -> [C, *shape]: means over areas where it shrinks, bilinear where it grows."""
    if shape[0] * shape[1] <= tokens.shape[1] * tokens.shape[2]:
        return F.adaptive_avg_pool2d(tokens[None], shape)[0]
    return F.interpolate(tokens[None], shape, mode="bilinear", align_corners=False)[0]


# -- the encoder stage -----------------------------------------------------------------------------------------------


class Batches:
    """Item `step` is that step's batch: the same for the same seed, whatever happened before."""

    def __init__(self, pack: Pack, views: Sequence[View], tokens: Path, config: DistillConfig, rank: int) -> None:
        self.pack, self.views, self.tokens, self.config, self.rank = pack, views, tokens, config, rank

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """image uint8 [B, S, S, 3], valid int64 [B, 2], taught float32 [B, C, n, n], known float32 [B, n, n]."""
        cv2.setNumThreads(0)  # the data process shares the cores with the training
        config = self.config
        size = config.sizes[np.random.default_rng([config.seed, step]).integers(len(config.sizes))]
        rng = np.random.default_rng([config.seed, step, self.rank])
        n = max(1, round(config.batch * (config.sizes[0] / size) ** 2))  # as many pixels at every size
        samples = [self._sample(self.views[i], size, rng) for i in rng.integers(len(self.views), size=n)]
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def _sample(self, view: View, size: int, rng: np.random.Generator) -> dict[str, Tensor]:
        x0, y0, x1, y1 = view.rect
        n = size // 16
        rows, columns = shape = _grid_of(y1 - y0, x1 - x0, n)
        crop = self.pack.photos[view.photo].rgb[y0:y1, x0:x1]
        how = cv2.INTER_AREA if max(crop.shape[:2]) > size else cv2.INTER_LINEAR
        rgb = photometric(cv2.resize(crop, (16 * columns, 16 * rows), interpolation=how), rng)
        image = np.zeros((size, size, 3), np.uint8)
        image[: 16 * rows, : 16 * columns] = rgb
        stored = safetensors.torch.load_file(self.tokens / f"{view.name}.safetensors")["tokens"].float()
        taught, known = torch.zeros(stored.shape[0], n, n), torch.zeros(n, n)
        taught[:, :rows, :columns], known[:rows, :columns] = _resize(stored, shape), 1.0
        valid = torch.tensor([16 * rows, 16 * columns])
        return {"image": torch.from_numpy(image), "valid": valid, "taught": taught, "known": known}


class EncoderTrainer:
    """The student's encoder, the projection to the teacher's width, and their state on disk."""

    def __init__(self, student: Inter2Former, width: int, config: DistillConfig, device: torch.device) -> None:
        self.config, self.device, self.peers, self.budget = config, device, loop.Peers(), config.first()
        torch.manual_seed(config.seed + 2)
        self.student = student.to(device)
        own = student.config.embed_dim
        self.project: nn.Module = (nn.Conv2d(own, width, 1) if own != width else nn.Identity()).to(device)
        if device.type == "cpu":
            fast.speed_up(self.student)
        both = [*self.student.encoder.parameters(), *self.project.parameters()]
        self.parameters = [p for p in both if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": self.budget.weight_decay},
                {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(0.9, 0.99),
        )
        self.step, self.elapsed_s = 0, 0.0

    @property
    def progress(self) -> float:
        if self.budget.max_steps is not None:
            return self.step / self.budget.max_steps if self.budget.max_steps else 1.0
        return self.elapsed_s / (60 * self.budget.minutes) if self.budget.minutes else 1.0

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        batch = {key: value.to(self.device) for key, value in batch.items()}
        self.student.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            tokens, _ = self.student.encoder(loop.normalise(batch["image"], batch["valid"]))
            seen = self.project(tokens)
        error = (seen.float() - batch["taught"]).square().mean(1)
        loss = (error * batch["known"]).sum() / batch["known"].sum().clamp_min(1)
        for group in self.optimizer.param_groups:
            group["lr"] = loop.rate_at(self.progress, self.step, self.budget)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.peers.world > 1:
            clock = torch.tensor([self.elapsed_s], device=self.device)
            buffers = [b for b in self.student.encoder.buffers() if b.is_floating_point()]
            self.peers.average([clock, *buffers, *(p.grad for p in self.parameters if p.grad is not None)])
            self.elapsed_s = float(clock)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.budget.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        return {"mse": float(loss.detach()), "grad": float(norm), "lr": self.optimizer.param_groups[0]["lr"]}

    def save(self, path: Path) -> None:
        state = {
            "encoder": self.student.encoder.state_dict(),
            "project": self.project.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.student.encoder.load_state_dict(state["encoder"])
        self.project.load_state_dict(state["project"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]


def train_encoder(
    trainer: EncoderTrainer, batches: Batches, out: Path, report: Callable[[dict[str, Any]], None] = lambda row: None
) -> None:
    """Until the stage's budget is spent; state in OUT/encoder.pt, a line a step in OUT/encoder.jsonl."""
    state, log = out / "encoder.pt", out / "encoder.jsonl"
    speaks = not trainer.peers.rank
    if trainer.step and log.exists() and speaks:
        loop._forget(log, trainer.step)
    workers = trainer.config.workers
    source: Iterator[Any] = iter(
        torch.utils.data.DataLoader(
            batches,  # type: ignore[arg-type]  # only __getitem__ is asked of it
            batch_size=None,
            sampler=range(trainer.step, 1 << 40),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # the decoded pack is shared, not copied
        )
    )
    last_save, clock = trainer.elapsed_s, time.perf_counter()
    while trainer.progress < 1:
        row = trainer.train_step(next(source))
        now = time.perf_counter()
        trainer.elapsed_s += now - clock
        clock = now
        row = {"step": trainer.step, "elapsed_s": round(trainer.elapsed_s, 1), "progress": trainer.progress, **row}
        if speaks:
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            report(row)
            if trainer.elapsed_s - last_save > trainer.config.save_every_s:
                last_save = trainer.elapsed_s
                trainer.save(state)
    if speaks:
        trainer.save(state)


# -- the run ---------------------------------------------------------------------------------------------------------


def distill(
    teacher: Teacher,
    pack: Pack,
    out: Path,
    config: DistillConfig,
    student: Inter2Former,
    *,
    device: torch.device,
    resume: bool = False,
    probe: Callable[[Inter2Former], dict[str, Any]] | None = None,
    track: Callable[[Sequence[View]], Iterator[View]] = iter,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Path:
    """Look, learn the tokens, learn the clicks; returns OUT/model.safetensors.

    student  where the weights begin, random or from a checkpoint
    track    wraps the list of views while the teacher looks, for a progress bar
    report   receives every row of both logs
    raises   ConfigError for a folder that holds another run
    """
    peers = loop.Peers()
    views = choose_views(pack, config.views, config.seed)
    grid = max(config.sizes) // 16
    if not peers.rank:
        claim(out, _identity(teacher, student.config, views, grid, config), resume)
    look(teacher, pack, views[peers.rank :: peers.world], out / "tokens", grid, track)
    if peers.world > 1:
        torch.distributed.barrier()
    first = EncoderTrainer(student, teacher.width, config, device)
    if resume and (out / "encoder.pt").is_file():
        first.load(out / "encoder.pt")
    train_encoder(first, Batches(pack, views, out / "tokens", config, peers.rank), out, report)

    second = loop.Trainer(student, dataclasses.replace(config.second(), freeze_norms=bool(first.step)), device)
    if resume and (out / "state.pt").is_file():
        second.load(out / "state.pt")
    result = out / "model.safetensors"

    def save(average: Inter2Former, facts: dict[str, Any]) -> None:
        provenance = {
            "recipe": "train distill",
            "teacher": {"name": teacher.name, "digest": teacher.digest, **teacher.facts},
            "settings": dataclasses.asdict(config),
            "encoder_steps": first.step,
            "licence": teacher.facts.get("licence") or "not above that of the teacher's weights and the training data",
            **facts,
        }
        save_checkpoint(result, average, provenance=provenance)

    loop.run(second, pack, out, probe=probe, checkpoint=save, report=report)
    return result


def _identity(
    teacher: Teacher, student: ModelConfig, views: Sequence[View], grid: int, config: DistillConfig
) -> dict[str, Any]:
    """What must stay the same when a run goes on; budgets may change."""
    names = hashlib.blake2b(" ".join(view.name for view in views).encode(), digest_size=16).hexdigest()
    return {
        "teacher": teacher.digest,
        "student": student.to_json(),
        "views": names,
        "grid": grid,
        "seed": config.seed,
        "sizes": config.sizes,
        "batch": config.batch,
    }


# -- command line ----------------------------------------------------------------------------------------------------


def command(
    teacher: Annotated[Path, typer.Option(help="A checkpoint of ours, or a folder with a SAM for transformers.")],
    data: Annotated[list[Path], typer.Option(help="A pack, or a folder of cut-outs; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: tokens, state, logs, model.safetensors.")],
    minutes: Annotated[
        float, typer.Option(help="Of training, all sittings; looking is extra.")
    ] = DistillConfig.minutes,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out if there is one.")] = False,
    config: Annotated[str, typer.Option(help=f"The student: {', '.join(PRESETS)}.")] = "small",
    start: Annotated[Path | None, typer.Option(help="The student begins from this checkpoint.")] = None,
    teacher_size: Annotated[int, typer.Option(help="Model size T of a teacher of ours; a SAM has its own.")] = 1024,
    encoder_share: Annotated[
        float, typer.Option(help="Of the budget for the tokens; the rest is clicks.")
    ] = DistillConfig.encoder_share,
    views: Annotated[int, typer.Option(help="Of each photo that the teacher looks at.")] = DistillConfig.views,
    max_steps: Annotated[int | None, typer.Option(help="Steps instead of minutes: repeats exactly on a CPU.")] = None,
    batch: Annotated[int, typer.Option(help="Crops a step.")] = DistillConfig.batch,
    size: Annotated[list[int] | None, typer.Option(help="Side of crops, multiple of 16; may be repeated.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = DistillConfig.lr,
    seed: Annotated[int, typer.Option(help="Of weights, views, samples and clicks.")] = 0,
    workers: Annotated[int, typer.Option(help="Data processes.")] = DistillConfig.workers,
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    limit: Annotated[int | None, typer.Option(help="Photos a source, for rehearsals.")] = None,
    probe_objects: Annotated[int, typer.Option(help="Validation objects a source; 0 measures nothing.")] = 5,
    probe_size: Annotated[int, typer.Option(help="Model size T of the validation.")] = 256,
) -> None:
    """Teach a small model what a large one sees, then clicks; can be killed and resumed at any moment."""
    if config not in PRESETS:
        raise typer.BadParameter(f"{config!r} is not one of {', '.join(PRESETS)}.", param_hint="--config")
    quiet_threads(threads)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    try:
        settings = DistillConfig(
            seed=seed, minutes=minutes, max_steps=max_steps, encoder_share=encoder_share, views=views, batch=batch,
            sizes=tuple(size or DistillConfig.sizes), lr=lr, workers=workers,
            clicks=loop.TrainConfig(dense_share=0.0, sizes=tuple(size or loop.TrainConfig.sizes)),
        )  # fmt: skip
        where = device_of(device)
        large = open_teacher(teacher, teacher_size, where)
        torch.manual_seed(seed)
        student = load_checkpoint(start).model if start else Inter2Former(PRESETS[config]())
        pack = read_pack(data, limit=limit)
        packs = (f for f in data if "samples" in json.loads((f / "index.json").read_text()))
        probe = make_probe(next(packs), objects=probe_objects, size=probe_size) if probe_objects else None
        with Progress(*columns, TimeRemainingColumn(), refresh_per_second=0.5) as bars:
            bar = bars.add_task("starting", total=1.0)

            def track(seen: Sequence[View]) -> Iterator[View]:
                for done, view in enumerate(seen):
                    bars.update(bar, completed=done / len(seen), description=f"looking, view {done} of {len(seen)}")
                    yield view

            def report(row: dict[str, Any]) -> None:
                if row.get("event") == "probe":
                    shown = ("miou@1", "miou@3", "miou@5")
                    bars.console.print(f"step {row['step']}: " + ", ".join(f"{k} {row[k]:.1f}" for k in shown))
                elif "mse" in row:
                    text = f"encoder step {row['step']}: error {row['mse']:.3f}"
                    bars.update(bar, completed=min(1.0, row["progress"]), description=text)
                elif "progress" in row:
                    text = f"clicks step {row['step']}: loss {row['loss']:.3f}, IoU {row.get('iou', 0):.2f}"
                    bars.update(bar, completed=min(1.0, row["progress"]), description=text)

            path = distill(
                large, pack, out, settings, student, device=where, resume=resume, probe=probe, track=track,
                report=report,
            )  # fmt: skip
    except (Inter2FormerError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"wrote {path}")
