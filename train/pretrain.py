"""`python -m train pretrain`: a model from random weights, from packs, within a time budget.

Sets a run up (folder, model, data, probe, progress bar) and draws its curve; the loop itself is in loop.py.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from inter2former import evaluation
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import PRESETS
from inter2former.nn.model import Inter2Former
from inter2former.prompts import Click
from inter2former.segmenter import Segmenter
from train import loop, teacher
from train.data import Pack, read_pack

RESEARCH = "research use only: trained on data whose licences are non-commercial, unclear or not stated"


def device_of(name: str) -> torch.device:
    """ "auto" takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def make_probe(folder: Path, *, objects: int, size: int) -> Callable[[Inter2Former], dict[str, Any]]:
    """A small fixed evaluation (the field's protocol, five clicks) on the val split of a pack.

    Returns {"miou@1", "miou@3", "miou@5", "sources": {name: miou@5}, "model_size"}, IoU in percent.
    """
    with evaluation.Pack(folder) as pack:
        targets = list(pack.targets(pack.choose("val", objects)))

    def probe(model: Inter2Former) -> dict[str, Any]:
        device = next(model.parameters()).device
        segmenter = Segmenter(model.cpu(), model_size=size, cache_bytes=64 << 20)

        def segment(image: np.ndarray, clicks: Sequence[Click]) -> np.ndarray:
            return segmenter.segment(image, clicks).mask

        figures = evaluation.summarise(evaluation.evaluate(targets, segment, clicks=5))
        model.to(device)
        shown = {key: figures["mean"][key] for key in ("miou@1", "miou@3", "miou@5")}
        return {**shown, "sources": {s: f["miou@5"] for s, f in figures["sources"].items()}, "model_size": size}

    return probe


def pretrain(
    folders: Sequence[Path],
    out: Path,
    config: loop.TrainConfig,
    *,
    preset: str = "small",
    start: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    teacher_maps: Path | None = None,
    limit: int | None = None,
    probe_objects: int = 5,
    probe_size: int = 512,
) -> Path:
    """Train and return the path of the checkpoint (averaged weights), out/model.safetensors.

    start          a checkpoint to begin from, instead of random weights of `preset`
    resume         continue out/state.pt when there is one; without it a folder that holds a run is refused
    limit          photos a source, for rehearsals
    probe_objects  a source; 0 measures nothing
    """
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state.pt"
    if state.exists() and not resume:
        raise FileExistsError(f"{out} holds a run already: give --resume to continue it, or another --out.")
    torch.manual_seed(config.seed)
    model = load_checkpoint(start).model if start else Inter2Former(PRESETS[preset]())
    trainer = loop.Trainer(model, config, device_of(device))
    if state.exists():
        trainer.load(state)
    pack = read_pack(folders, limit=limit)
    if teacher_maps is not None:
        pack = dataclasses.replace(pack, teacher=teacher.load(teacher_maps))
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    probe = None
    probed = next((f for f in folders if "samples" in json.loads((f / "index.json").read_text())), None)
    if probe_objects and probed is not None:
        probe = make_probe(probed, objects=probe_objects, size=probe_size)
    checkpoint = out / "model.safetensors"

    def save(average: Inter2Former, facts: dict[str, Any]) -> None:
        last = probes[-1] if probes else {}
        provenance = {
            "recipe": "train pretrain",
            "config": dataclasses.asdict(config),
            "data": _summary(pack),
            "teacher": "HED edge network (training targets only)" if pack.teacher else None,
            "start": str(start.name) if start else None,
            "probe": last,
            "licence": RESEARCH,
            **facts,
        }
        save_checkpoint(checkpoint, average, provenance=provenance)

    probes: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), refresh_per_second=0.5, disable=trainer.peers.rank > 0) as bars:
        bar = bars.add_task("starting", total=1.0)

        def report(row: dict[str, Any]) -> None:
            if row.get("event") == "probe":
                probes.append(row)
                bars.console.print(f"step {row['step']}: " + ", ".join(f"{k} {row[k]:.1f}" for k in _SHOWN))
            elif "progress" in row:
                iou = f", IoU {row['iou']:.2f}" if "iou" in row else ""
                text = f"{row['phase']} step {row['step']}: loss {row['loss']:.3f}{iou}"
                bars.update(bar, completed=min(1.0, row["progress"]), description=text)

        loop.run(trainer, pack, out, probe=probe, checkpoint=save, report=report)
    if trainer.peers.rank == 0:
        plot(out / "log.jsonl", out / "curve.png")
    return checkpoint


def in_processes(n: int, threads: int, work: Callable[[], Path]) -> Path:
    """Call `work` (picklable) in n processes of one machine that train one model together; returns what it returns.

    They meet in a temporary file and talk over the loopback interface: no port has to be chosen, nobody outside can
    join. When one fails, the others are ended; ValueError with the message of the first failure.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting, answer = f"file://{folder}/store", Path(folder) / "answer"
        try:
            spawn(_process, (n, threads, meeting, answer, work), nprocs=n)
        except ProcessRaisedException as error:
            raise ValueError(str(error).strip().splitlines()[-1]) from error
        return Path(answer.read_text())


def _process(rank: int, n: int, threads: int, meeting: str, answer: Path, work: Callable[[], Path]) -> None:
    quiet_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=n)
    try:
        path = work()
        if rank == 0:
            answer.write_text(str(path))
    finally:
        torch.distributed.destroy_process_group()


def _end_with_parent() -> None:
    """A run whose command was killed must not go on unseen: a second one would write to the same folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # at once; the state on disk is whole at any moment


_SHOWN = ("miou@1", "miou@3", "miou@5")


def _summary(pack: Pack) -> dict[str, Any]:
    names, counts = np.unique([photo.source for photo in pack.photos], return_counts=True)
    return {
        "photos": {str(n): int(c) for n, c in zip(names, counts, strict=True)},
        "cutouts": len(pack.cutouts),
        "backgrounds": len(pack.backgrounds),
    }


def plot(log: Path, picture: Path) -> None:
    """Draw loss, training IoU and probe numbers of a log.jsonl over the minutes of training."""
    from matplotlib.figure import Figure  # the `train` extra

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(9, 6), layout="constrained")
    panes = figure.subplots(2, 1, sharex=True)
    for pane, key in ((panes[0], "loss"), (panes[1], "iou")):
        seen = [(row["elapsed_s"] / 60, row[key]) for row in rows if key in row]
        if seen:
            x, y = np.array(seen).T
            width = max(1, len(y) // 60)
            kernel = np.ones(width) / width
            pane.plot(x[width - 1 :], np.convolve(y, kernel, "valid"), label=f"training {key}, mean of {width} steps")
        pane.set_ylabel(key)
    probes = [row for row in rows if row.get("event") == "probe"]
    for key in _SHOWN:
        x_y = [(row["elapsed_s"] / 60, row[key] / 100) for row in probes]
        panes[1].plot(*np.array(x_y).reshape(-1, 2).T, "o-", label=f"val {key}")
    panes[1].set_xlabel("minutes of training")
    for pane in panes:
        pane.grid(alpha=0.3)
        if pane.get_legend_handles_labels()[0]:
            pane.legend()
    part = picture.with_name(f".{picture.name}")
    figure.savefig(part, dpi=110, format="png")
    os.replace(part, picture)


def quiet_threads(threads: int | None) -> None:
    """OpenCV works in the data process, which has one core at most; PyTorch gets `threads`."""
    cv2.setNumThreads(0)
    if threads:
        torch.set_num_threads(threads)
