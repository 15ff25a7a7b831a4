"""The training loop: one step, the schedule, resumable state, the log. Device-agnostic; knows no command line.

Time decides the schedule (a fraction of the budget), unless a number of steps is given: then every number is a
function of the seed alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from inter2former import random_walk
from inter2former.config import ModelConfig
from inter2former.files import write_atomically
from inter2former.nn.canny import MEAN, STD
from inter2former.nn.model import Features, Inter2Former
from inter2former.runtime import native
from train import fast, losses, simulate
from train.data import DrawConfig, Pack, Sampler

M = TypeVar("M", bound=torch.nn.Module)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run. Each default with its reason."""

    seed: int = 0
    minutes: float = 60.0  # of training, all sittings of the run together; the schedule is a fraction of it
    max_steps: int | None = None  # instead of minutes: for tests and exact repetition
    batch: int = 16  # crops; many sources in one batch, and two cores still make a step in seconds
    # Sides of crops in pixels; each step draws one. Weights trained at one size fall apart at others (measured), so
    # every size of use is here, small ones more often. `batch` is for the first; others hold as many pixels.
    sizes: tuple[int, ...] = (256,) * 3 + (384,) * 3 + (512,) * 4 + (768,)
    dense_share: float = 0.25  # dense targets alone at first: clicks are a weak signal for an untrained encoder
    dense_weight: float = 0.3  # of the dense losses beside the clicks, falling to a tenth
    lr: float = 1e-3  # small models from scratch bear a large one
    warmup_steps: int = 50
    weight_decay: float = 0.05
    clip: float = 1.0  # gradient norm
    ema: float = 0.998  # of the shipped weights, some 500 steps; ramps up from 0.1: early checkpoints are useful
    amp: bool = True  # bfloat16 where the device multiplies it faster
    freeze_norms: bool = False  # batch norms keep their statistics: when the weights to start from have good ones
    workers: int = 1  # data processes; one feeds two cores
    save_every_s: float = 120.0  # at most this much is lost to a kill
    probe_every_s: float = 1500.0  # of training; a probe costs a minute or two
    draw: DrawConfig = dataclasses.field(default_factory=DrawConfig)
    clicks: simulate.ClickConfig = dataclasses.field(default_factory=simulate.ClickConfig)
    dense: losses.DenseConfig = dataclasses.field(default_factory=losses.DenseConfig)


@dataclasses.dataclass
class Phase:
    """What a stretch of the run looks like."""

    name: str
    clicks: bool


def phase_at(progress: float, config: TrainConfig) -> Phase:
    """dense -> clicks, by progress 0..1."""
    return Phase("dense", False) if progress < config.dense_share else Phase("clicks", True)


def rate_at(progress: float, step: int, config: TrainConfig) -> float:
    """Learning rate: linear warm-up over steps, cosine over progress down to a hundredth."""
    cosine = 0.5 * (1 + np.cos(np.pi * min(1.0, progress)))
    return float(config.lr * min(1.0, (step + 1) / config.warmup_steps) * (0.01 + 0.99 * cosine))


class Average(Generic[M]):
    """Exponential moving average of weights and buffers."""

    def __init__(self, model: M, limit: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.limit = limit

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        decay = min(self.limit, (1 + step) / (10 + step))
        for mine, other in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(other, 1 - decay)
            else:
                mine.copy_(other)


def normalise(image: Tensor, valid: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] and valid rows / columns int [B, 2] -> float32 [B, 3, S, S], padding exactly 0."""
    x = (image.float() - image.new_tensor(MEAN, dtype=torch.float32)) / image.new_tensor(STD, dtype=torch.float32)
    index = torch.arange(image.shape[1], device=image.device)
    inside = (index[None, :, None] < valid[:, 0, None, None]) & (index[None, None, :] < valid[:, 1, None, None])
    return (x * inside[..., None]).permute(0, 3, 1, 2)


class Peers:
    """The processes of one run, a torch.distributed group: each draws its own crops, gradients are averaged.

    On a CPU a process a core beats threads: a step is thousands of small operations, and threads wait at each.
    Who starts the processes makes the group: pretrain.in_processes, or torchrun, which says so in the environment.
    """

    def __init__(self) -> None:
        distributed = torch.distributed
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        alone = not distributed.is_initialized()
        self.world, self.rank = (1, 0) if alone else (distributed.get_world_size(), distributed.get_rank())

    @torch.no_grad()
    def average(self, tensors: list[Tensor]) -> None:
        """Replace the tensors, in place, by their means over the processes; one message."""
        if self.world == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.world
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


class Trainer:
    """Model, average, optimiser and their state on disk."""

    def __init__(self, model: Inter2Former, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device, self.peers = config, device, Peers()
        self.model = model.to(device)
        if self.model.affinity is not None:
            self.model.affinity.requires_grad_(False)  # has a fit of its own: train affinity
        if self.model.outline is not None:
            self.model.outline.requires_grad_(False)  # and so has this: train outline
        torch.manual_seed(config.seed + 1)
        self.head = losses.DenseHead(model.config).to(device)
        self.average = Average(self.model, config.ema)
        if device.type == "cpu":
            fast.speed_up(self.model)
            self.head.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        decayed = [p for p in self._parameters() if p.ndim >= 2]
        plain = [p for p in self._parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.99),  # short memory: a run has thousands of steps, not hundred thousands
        )
        self.step = 0
        self.elapsed_s = 0.0

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in (*self.model.parameters(), *self.head.parameters()) if p.requires_grad]

    @property
    def progress(self) -> float:
        if self.config.max_steps is not None:
            return self.step / max(1, self.config.max_steps)
        return self.elapsed_s / (60 * self.config.minutes)

    def train_step(self, batch: dict[str, Tensor], phase: Phase) -> dict[str, float]:
        """One optimiser step; returns what goes to the log."""
        config, progress = self.config, self.progress
        torch.manual_seed((config.seed * 1_000_003 + self.step) * self.peers.world + self.peers.rank)
        self._train_mode()
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        image = normalise(batch["image"], batch["valid"])
        with self._autocast():
            features = self.model.encode_batch(image)
            loss, log = torch.zeros((), device=self.device), dict[str, float]()
            share = (progress - config.dense_share) / max(1e-6, 1 - config.dense_share)
            weight = config.dense_weight * (1 - 0.9 * min(1.0, max(0.0, share))) if phase.clicks else 1.0
            if weight > 0:
                dense, parts = losses.dense_loss(self.head(features), batch, config.dense)
                log |= {name: float(v) for name, v in parts.items()}
                loss = weight * dense
            if phase.clicks:
                clicks, figures = self._click_loss(features, batch)
                log |= figures
                loss = loss + clicks
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(progress, self.step, config)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._agree()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), config.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
            if phase.clicks:
                self.model.balance_experts()
            self.average.update(self.model, self.step)
        self.step += 1
        return {"loss": float(loss.detach()), "grad": float(norm), "lr": self.optimizer.param_groups[0]["lr"], **log}

    def _agree(self) -> None:
        """Average gradients, running statistics and the clock over the processes of the run."""
        if self.peers.world == 1:
            return
        for p in self._parameters():
            if p.grad is None:  # not part of this phase
                p.grad = torch.zeros_like(p)
        clock = torch.tensor([self.elapsed_s], dtype=torch.float32, device=self.device)
        buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        self.peers.average([clock, *buffers, *(p.grad for p in self._parameters() if p.grad is not None)])
        self.elapsed_s = float(clock)

    def _click_loss(self, features: Features, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Rounds of clicks without gradient, then one decoder pass with; the encoder's work is shared by K targets."""
        config, rng = self.config, np.random.default_rng([self.config.seed, self.step, self.peers.rank])
        truth = batch["targets"]  # [B, K, S, S]
        K = truth.shape[1]
        target = truth.flatten(0, 1)
        valid = batch["valid"].repeat_interleave(K, 0).tolist()
        annotators = [
            simulate.Annotator(t, (h, w), self.model.config, config.clicks, rng)
            for t, (h, w) in zip(target.bool().cpu().numpy(), valid, strict=True)
        ]
        edges = features.edges
        if self.device.type != "cpu":  # fast.speed_up shares them
            edges = [e.repeat_interleave(K, 0) for e in edges]
        shared = Features(features.tokens.repeat_interleave(K, 0), edges)
        rounds = simulate.draw_rounds(config.clicks, np.random.default_rng([config.seed, self.step]))
        click = fast.clicks_without_gradient(self.model, features) if self.device.type == "cpu" and rounds else None
        links = self._links(features, batch) if rounds else []
        self.model.eval()
        with torch.no_grad():
            for _ in range(rounds):
                if click is not None:
                    logits = [click(n // K, annotator.state) for n, annotator in enumerate(annotators)]
                else:
                    logits = list(
                        self.model.decode_batch(shared, self._states(annotators)).logits.float().cpu().numpy()
                    )
                for n, annotator in enumerate(annotators):
                    annotator.round(self._walked(logits[n], annotator, links[n // K]) > 0)
        self._train_mode()
        output = self.model.decode_batch(shared, self._states(annotators))
        loss, parts = losses.click_loss(output, target)
        log = {name: float(v) for name, v in parts.items()}
        return loss, log | {"iou": float(losses.mask_iou(output.logits, target).mean())}

    @torch.no_grad()
    def _links(self, features: Features, batch: dict[str, Tensor]) -> list[np.ndarray]:
        """Of the random walk, an image each, as served; empty where nobody walks."""
        if not self.model.config.walk_trust:
            return [np.empty(0, np.float32)] * len(batch["image"])
        images, valid = normalise(batch["image"], batch["valid"]), batch["valid"].tolist()
        size = images.shape[-1]
        if self.model.affinity is None:
            return [random_walk.links(i[:, :h, :w], size) for i, (h, w) in zip(images.cpu(), valid, strict=True)]
        with torch.autocast(self.device.type, enabled=False):
            links = self.model.links(features, images).cpu().numpy()
        return [random_walk.within(own, (h, w), size) for own, (h, w) in zip(links, valid, strict=True)]

    def _walked(self, logits: np.ndarray, annotator: simulate.Annotator, links: np.ndarray) -> np.ndarray:
        """As served: an annotator corrects what the walk left."""
        first, clicks, tokens = self.model.config.walk_trust, int(annotator.clicked.sum()), len(logits) // 16
        if not first or not clicks or random_walk.is_thin(logits, len(logits)):
            return logits
        trust = random_walk.trust(first, annotator.worth + clicks)
        return native.walk(links, logits, (0, 0, tokens, tokens), annotator.state, trust)

    def _train_mode(self) -> None:
        self.model.train()
        if self.config.freeze_norms:
            for module in self.model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()

    def _states(self, annotators: list[simulate.Annotator]) -> Tensor:
        return torch.from_numpy(np.stack([a.state for a in annotators])).to(self.device)

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        """bfloat16 with float32 weights. PyTorch's fused attention is slow in bfloat16 on CPUs, so not there."""
        with contextlib.ExitStack() as stack:
            if self.config.amp:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
                if self.device.type == "cpu":
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    # -- state on disk -----------------------------------------------------------------------------------------
    def save(self, path: Path) -> None:
        """Everything a continuation needs, written whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "model_config": self.model.config.to_json(),
        }
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Continue from `path`; ValueError when it is a run of another model."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if ModelConfig.from_json(state["model_config"]) != self.model.config:
            raise ValueError(f"{path} holds another model configuration; give a new --out, or the same --config.")
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]


class Batches:
    """Map-style view for torch.utils.data.DataLoader(batch_size=None): item `step` is the batch of that step.

    The size of its crops depends on seed and step alone: all processes of a run work on the same size at a time.
    """

    def __init__(self, pack: Pack, config: TrainConfig, rank: int = 0) -> None:
        self.config = config
        draws = {size: dataclasses.replace(config.draw, size=size) for size in config.sizes}
        self.samplers = {s: Sampler(pack, draw, config.seed + 1_000_003 * rank) for s, draw in draws.items()}

    def __getitem__(self, step: int) -> dict[str, Any]:
        cv2.setNumThreads(0)  # the data process shares the cores with the training
        sizes = self.config.sizes
        size = sizes[np.random.default_rng([self.config.seed, step]).integers(len(sizes))]
        return self.samplers[size].batch(step, max(1, round(self.config.batch * (sizes[0] / size) ** 2)))


def batches(pack: Pack, config: TrainConfig, start: int, rank: int = 0) -> Iterator[dict[str, Tensor]]:
    """Endless batches from step `start` on, made by background processes."""
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        Batches(pack, config, rank),  # type: ignore[arg-type]  # only __getitem__ is asked of it
        batch_size=None,
        sampler=range(start, 1 << 40),
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        multiprocessing_context="fork" if config.workers else None,  # the decoded pack is shared, not copied
    )
    return iter(loader)


def run(
    trainer: Trainer,
    pack: Pack,
    out: Path,
    *,
    probe: Callable[[Inter2Former], dict[str, Any]] | None = None,
    checkpoint: Callable[[Inter2Former, dict[str, Any]], None] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:
    """Train until the budget is spent, saving and probing on the way.

    probe        measures the averaged model; its numbers go to the log
    checkpoint   writes the averaged model; gets the facts of the run so far
    report       receives every row of log.jsonl
    """
    config = trainer.config
    log_path, state_path = out / "log.jsonl", out / "state.pt"

    def log(row: dict[str, Any]) -> None:
        if trainer.peers.rank:  # the first process speaks for all
            return
        row = {"step": trainer.step, "elapsed_s": round(trainer.elapsed_s, 1), **row}
        with log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        report(row)

    def save() -> None:
        if trainer.peers.rank:
            return
        trainer.save(state_path)
        if checkpoint is not None:
            checkpoint(trainer.average.model, {"steps": trainer.step, "training_s": round(trainer.elapsed_s)})

    def measure() -> None:
        if probe is not None and not trainer.peers.rank:
            log({"event": "probe", **probe(trainer.average.model)})

    if trainer.step == 0:
        measure()
    elif log_path.exists() and not trainer.peers.rank:
        _forget(log_path, trainer.step)
    phase: Phase | None = None
    source = batches(pack, config, trainer.step, trainer.peers.rank)
    last_save = last_probe = trainer.elapsed_s
    clock = time.perf_counter()
    while trainer.progress < 1:
        wanted = phase_at(trainer.progress, config)
        if wanted != phase:
            phase = wanted
            log({"event": "phase", **dataclasses.asdict(phase)})
        batch = next(source)
        waited = time.perf_counter()
        row = trainer.train_step(batch, phase)
        now = time.perf_counter()
        trainer.elapsed_s += now - clock
        data_s, step_s, clock = waited - clock, now - waited, now
        costs = {"data_s": data_s, "step_s": step_s, "size": batch["image"].shape[1]}
        log({"phase": phase.name, "progress": trainer.progress, **costs, **row})
        if trainer.elapsed_s - last_save > config.save_every_s:
            last_save = trainer.elapsed_s
            save()
        if trainer.elapsed_s - last_probe > config.probe_every_s:
            last_probe = trainer.elapsed_s
            measure()
            clock = time.perf_counter()  # measuring is not training
    save()
    measure()


def _forget(log: Path, step: int) -> None:
    """Drop the rows of steps that happened after the state was saved (they are about to happen again), and a row that a
    kill cut short."""
    kept = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_atomically(log, "".join(kept).encode())
