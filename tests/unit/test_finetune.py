"""Fine-tuning from end to end with the tiny model: a few pictures, a handful of steps, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from inter2former import Click, brush_rle, load_segmenter
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import tiny
from inter2former.nn.model import Inter2Former
from train import finetune, loop
from train.exports import ObjectMask, Record, read_label_studio, split_by_content

H, W = 72, 96
QUICK = ["--max-steps", "2", "--size", "64", "--batch", "2", "--lr", "0.001", "--workers", "0"]
QUICK += ["--clicks", "3", "--objects", "1"]

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(finetune.finetune)


@app.callback()
def _commands() -> None:
    """With a callback there are commands, as in `python -m train`."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with four pictures of a bright disc, their export, and a tiny parent."""
    (tmp_path / "images").mkdir()
    tasks = []
    rows, columns = np.mgrid[:H, :W] + 0.5
    for number in range(1, 5):
        rng = np.random.default_rng(number)
        disc = (rows - rng.uniform(25, 45)) ** 2 + (columns - rng.uniform(30, 60)) ** 2 < 18**2
        picture = rng.integers(0, 90, (H, W, 3), dtype=np.uint8)
        picture[disc] += 140
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), picture)
        value = {"format": "rle", "rle": brush_rle.encode(disc), "brushlabels": ["Disc"]}
        region = {"id": "r", "type": "brushlabels", "to_name": "image", "value": value}
        region |= {"original_width": W, "original_height": H, "image_rotation": 0}
        tasks.append({"id": number, "data": {"image": f"/data/upload/1/{number}.png"}})
        tasks[-1]["annotations"] = [{"id": number, "result": [region], "was_cancelled": False}]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "parent.safetensors", Inter2Former(tiny()), provenance={"licence": "CC0"})
    return tmp_path


Run = Callable[..., Any]


@pytest.fixture
def run(project: Path) -> Run:
    """Call the command; the result of typer's runner, with `.json` when asked for."""

    def call(*options: str, out: str = "out") -> Any:
        arguments = ["finetune", "--export", str(project / "export.json"), "--images", str(project / "images")]
        arguments += [
            "--out",
            str(project / out),
            "--checkpoint",
            str(project / "parent.safetensors"),
            *QUICK,
            *options,
        ]
        result = CliRunner().invoke(app, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        result.json = json.loads(result.stdout) if "--json" in options and result.exit_code == 0 else None
        return result

    return call


def moved(project: Path) -> set[str]:
    """Names of the tensors that differ from the parent's, running means among them."""
    parent, tuned = load_file(project / "parent.safetensors"), load_file(project / "out" / "model.safetensors")
    return {key for key in parent if not torch.equal(parent[key], tuned[key])}


def encoder_moved(project: Path) -> bool:
    return any(key.startswith("encoder.") for key in moved(project))


def rest_moved(project: Path) -> bool:
    return any(not key.startswith("encoder.") for key in moved(project))


def test_before_and_after_and_a_checkpoint_that_serves(project: Path, run: Run) -> None:
    result = run("--force", "--clicks", "5")
    assert result.exit_code == 0, result.output
    for text in ("4 images with 4 objects", "before", "after", "change", "mIoU@1", "mIoU@5", "NoC90"):
        assert text in result.stdout
    segmenter = load_segmenter(project / "out" / "model.safetensors")
    answer = segmenter.segment((project / "images" / "1.png").read_bytes(), [Click(40, 30)])
    assert answer.mask.shape == (H, W)
    provenance = load_checkpoint(project / "out" / "model.safetensors").provenance
    assert provenance["recipe"] == "finetune"
    assert provenance["parent"] == load_checkpoint(project / "parent.safetensors").digest
    assert provenance["licence"] == "CC0"
    assert provenance["steps"] == 2
    assert provenance["data"]["images"] + provenance["data"]["held_back"] == 4
    assert "miou@1" in provenance["before"]
    assert "miou@1" in provenance["after"]
    assert (encoder_moved(project), rest_moved(project)) == (False, True)


def test_json_goes_to_standard_output_alone(project: Path, run: Run) -> None:
    summary = run("--json").json
    assert set(summary) >= {"before", "after", "accepted", "better", "checkpoint", "digest", "report", "steps"}
    assert set(summary["before"]) == set(summary["after"]) >= {"objects", "miou@1", "miou@3", "noc85", "noc90"}
    assert summary["images"] == {"train": 2, "held_back": 2}
    assert load_checkpoint(summary["checkpoint"]).digest == summary["digest"]


def test_the_encoder_is_trained_when_asked(project: Path, run: Run) -> None:
    assert run("--force", "--train-encoder").exit_code == 0
    assert (encoder_moved(project), rest_moved(project)) == (True, True)


def fall_to(monkeypatch: pytest.MonkeyPatch, after: float) -> None:
    """Give the parent 50 % and the tuned weights `after`."""
    real = finetune.measure

    def measure(checkpoint: Path, *rest: Any) -> dict[str, float]:
        figures = real(checkpoint, *rest)
        value = 50.0 if checkpoint.name == "parent.safetensors" else after
        return {key: value if key.startswith("miou") else figure for key, figure in figures.items()}

    monkeypatch.setattr(finetune, "measure", measure)


def test_a_worse_model_is_refused(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fall_to(monkeypatch, 49.9)
    result = run()
    assert result.exit_code == 0
    assert "worse" in result.stdout
    parent = (project / "parent.safetensors").read_bytes()
    assert (project / "out" / "model.safetensors").read_bytes() == parent
    assert load_checkpoint(project / "out" / "rejected.safetensors").provenance["recipe"] == "finetune"

    forced = run("--resume", "--force", "--json").json
    assert (forced["accepted"], forced["better"]) == (True, False)
    assert (project / "out" / "model.safetensors").read_bytes() != parent
    assert not (project / "out" / "rejected.safetensors").exists()
    assert load_checkpoint(project / "out" / "model.safetensors").provenance["forced"] is True


def test_a_better_model_is_taken(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fall_to(monkeypatch, 50.0)
    summary = run("--json").json
    assert (summary["accepted"], summary["better"]) == (True, True)
    assert summary["digest"] != summary["parent"]


def test_r24_a_stopped_run_resumes_to_the_same_weights(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--force", out="whole").exit_code == 0

    real, steps = loop.Trainer.train_step, []

    def train_step(trainer: loop.Trainer, *rest: Any) -> dict[str, float]:
        if len(steps) == 1:
            raise KeyboardInterrupt
        steps.append(trainer.step)
        row = real(trainer, *rest)
        trainer.save(project / "cut" / "state.pt")
        return row

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", train_step)
        assert run("--force", out="cut").exit_code != 0
    assert not (project / "cut" / "model.safetensors").exists()
    assert run("--force", "--resume", out="cut").exit_code == 0
    whole, cut = (load_file(project / name / "model.safetensors") for name in ("whole", "cut"))
    assert steps == [0]
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_only_the_same_run_is_continued(project: Path, run: Run) -> None:
    assert run().exit_code == 0
    result = run("--resume", "--seed", "3")
    assert result.exit_code == 1
    assert "config changed" in result.stderr
    assert "holds a run already" in run().stderr


def test_r30_strict_stops_before_anything_is_trained(project: Path, run: Run) -> None:
    tasks = json.loads((project / "export.json").read_text())
    tasks[0]["annotations"][0]["result"][0]["value"]["rle"] = [1, 2, 3]
    (project / "export.json").write_text(json.dumps(tasks))
    result = run("--strict")
    assert result.exit_code == 1
    assert "1 x broken mask" in result.stderr
    assert not (project / "out" / "model.safetensors").exists()
    assert "task 1" in (project / "out" / "export_report.txt").read_text()
    loose = run("--json", out="loose").json
    assert loose["report"] == {"broken mask": 1, "no masks": 1}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--minutes", "0"], "minutes must be above 0"),
        (["--size", "100", "--lr", "-1"], "size must be a multiple of 16 from 64 on; lr must be above 0"),
        (["--checkpoint", "gone.safetensors"], "Cannot read the checkpoint"),
        (["--export", "gone.json"], "Cannot read the export"),
        (["--images", "gone"], "not a folder"),
    ],
)
def test_errors_are_one_sentence(run: Run, options: list[str], says: str) -> None:
    result = run(*options)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_the_module_runs_as_a_command(project: Path) -> None:
    root = Path(finetune.__file__).parents[1]
    command = [sys.executable, "-m", "train", "finetune"]
    command += ["--export", str(project / "export.json"), "--images", str(project / "images")]
    command += ["--out", str(project / "out"), "--checkpoint", str(project / "parent.safetensors"), *QUICK]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--workers", "1"], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "change" in done.stdout


# -- data ------------------------------------------------------------------------------------------------------------


def record_of(folder: Path, masks: list[np.ndarray]) -> Record:
    height, width = masks[0].shape
    cv2.imwrite(str(folder / "p.png"), np.zeros((height, width, 3), np.uint8))
    return Record(
        folder / "p.png", "key", (height, width), tuple(ObjectMask.of(m, "", f"r{i}") for i, m in enumerate(masks))
    )


def test_overlapping_objects_keep_all_their_pixels(tmp_path: Path) -> None:
    left, right, apart = (np.zeros((50, 80), bool) for _ in range(3))
    left[5:30, 5:40], right[10:35, 30:70], apart[40:50, 0:20] = True, True, True
    pack, n_lost = finetune.build_pack([record_of(tmp_path, [left, right, apart])])
    (photo,) = pack.photos
    assert n_lost == 0
    assert len(photo.maps) == 2
    for (layer, number, area), mask in zip(photo.objects, (left, right, apart), strict=True):
        assert (photo.maps[layer] == number).sum() == area == mask.sum()
        assert ((photo.maps[layer] == number) == mask).all()


def test_large_photos_are_scaled_down_and_lost_objects_counted(tmp_path: Path) -> None:
    big, speck = np.zeros((1000, 4096), bool), np.zeros((1000, 4096), bool)
    big[200:600, 400:1200], speck[3:6, 3:6] = True, True
    pack, n_lost = finetune.build_pack([record_of(tmp_path, [big, speck])])
    (photo,) = pack.photos
    assert photo.rgb.shape == (250, 1024, 3)
    assert n_lost == 1
    assert photo.objects.tolist() == [[0, 1, 100 * 200]]


def test_the_same_objects_are_measured_each_time_and_no_photo_dominates(project: Path) -> None:
    records, _ = read_label_studio(project / "export.json", project / "images")
    train, _ = split_by_content(records)
    many = [r if n else Record(r.path, r.key, r.size_hw, r.masks * 9) for n, r in enumerate(train)]
    chosen = finetune.choose_objects(many, 4)
    assert len(chosen) == 4
    assert {record.key for record, _ in chosen} == {record.key for record in many}
    again = finetune.choose_objects(many[::-1], 4)
    assert [(r.key, m.bits) for r, m in chosen] == [(r.key, m.bits) for r, m in again]
