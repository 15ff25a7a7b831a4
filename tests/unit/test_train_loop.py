"""The loop, its resumable state and the pretrain command (train.loop, train.pretrain, train.__main__)."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from inter2former.checkpoints import load_checkpoint
from inter2former.config import tiny
from inter2former.nn.model import Inter2Former
from tests.unit.train_pack import write_cutouts, write_pack
from train import loop
from train.__main__ import app
from train.data import DrawConfig, Pack, Sampler, read_pack

ROOT = Path(__file__).parents[2]
CONFIG = loop.TrainConfig(
    max_steps=6, batch=2, sizes=(64, 96), dense_share=0.3, warmup_steps=2, workers=0,
    draw=DrawConfig(scale=(0.25, 4.0)),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("data") / "pack")


@pytest.fixture(scope="module")
def pack(folder: Path) -> Pack:
    return read_pack([folder])


def trainer(config: loop.TrainConfig = CONFIG) -> loop.Trainer:
    torch.manual_seed(config.seed)
    return loop.Trainer(Inter2Former(tiny()), config, torch.device("cpu"))


def losses(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def train(pack: Pack, out: Path, config: loop.TrainConfig = CONFIG, **options: Any) -> loop.Trainer:
    out.mkdir(exist_ok=True)
    trained = trainer(config)
    if (out / "state.pt").exists():
        trained.load(out / "state.pt")
    loop.run(trained, pack, out, **options)
    return trained


def test_two_runs_with_one_seed_give_one_curve_and_another_seed_another(pack: Pack, tmp_path: Path) -> None:
    first, again = train(pack, tmp_path / "a"), train(pack, tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert len(losses(tmp_path / "a")) == 6
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    train(pack, tmp_path / "c", dataclasses.replace(CONFIG, seed=1))
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_killed_run_continues_as_if_nothing_had_happened(pack: Pack, tmp_path: Path) -> None:
    whole = train(pack, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 4 and "loss" in row:
            raise Killed

    config = dataclasses.replace(CONFIG, save_every_s=0.0)
    with pytest.raises(Killed):
        train(pack, tmp_path / "cut", config, report=kill)
    resumed = train(pack, tmp_path / "cut", config)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 6 + 3  # a phase is named again on resuming
    for one, other in zip(
        whole.average.model.state_dict().values(), resumed.average.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


def test_the_log_names_phases_and_parts(pack: Pack, tmp_path: Path) -> None:
    train(pack, tmp_path / "run", probe=lambda model: {"miou@5": 1.0})
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    phases = [r["name"] for r in rows if r.get("event") == "phase"]
    assert phases == ["dense", "clicks"]
    assert {r["size"] for r in rows if "loss" in r} == {64, 96}
    assert [r["step"] for r in rows if r.get("event") == "probe"] == [0, 6]
    assert all(math.isfinite(r["loss"]) and math.isfinite(r["grad"]) for r in rows if "loss" in r)
    assert "iou" not in rows[2]
    assert {"iou", "nfl", "low", "overlap", "commitment", "boundary"} <= set(rows[-2])


def test_dense_targets_are_learnt(pack: Pack, tmp_path: Path) -> None:
    """Bright shapes on a dark ground: a tiny network finds their outlines within seconds."""
    config = dataclasses.replace(CONFIG, max_steps=24, batch=4, dense_share=1.0, amp=False, lr=3e-3)
    train(pack, tmp_path / "run", config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    boundary = [row["boundary"] for row in rows if "boundary" in row]
    assert sum(boundary[-6:]) < 0.95 * sum(boundary[:6])


def test_state_of_another_model_is_refused(pack: Pack, tmp_path: Path) -> None:
    trainer().save(tmp_path / "state.pt")
    other = loop.Trainer(Inter2Former(dataclasses.replace(tiny(), encoder_depth=3)), CONFIG, torch.device("cpu"))
    with pytest.raises(ValueError, match="another model configuration"):
        other.load(tmp_path / "state.pt")


def test_steps_with_infinite_gradients_are_skipped(pack: Pack) -> None:
    trained = trainer()
    batch = {k: torch.from_numpy(v) for k, v in Sampler(pack, DrawConfig(size=64), 0).batch(0, 2).items()}
    trained.head.maps.weight.data.fill_(float("inf"))
    before = [p.clone() for p in trained.model.parameters()]
    trained.train_step(batch, loop.Phase("dense", False))
    assert trained.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))


def test_rate_warms_up_and_falls() -> None:
    config = loop.TrainConfig(lr=1.0, warmup_steps=10)
    assert loop.rate_at(0.0, 0, config) == pytest.approx(0.1)
    assert loop.rate_at(0.0, 9, config) == pytest.approx(1.0)
    assert loop.rate_at(0.5, 500, config) == pytest.approx(0.505)
    assert loop.rate_at(1.0, 900, config) == pytest.approx(0.01)


def test_normalise_leaves_padding_at_zero() -> None:
    image = torch.full((1, 32, 32, 3), 200, dtype=torch.uint8)
    x = loop.normalise(image, torch.tensor([[20, 32]], dtype=torch.int32))
    assert x.shape == (1, 3, 32, 32)
    assert (x[:, :, 20:] == 0).all()
    assert x[0, 0, 0, 0].item() == pytest.approx((200 - 123.675) / 58.395)


def test_average_ramps_up_and_follows_buffers() -> None:
    model = torch.nn.BatchNorm1d(1)
    average = loop.Average(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(11.0)
        model.running_mean.fill_(10.0)  # type: ignore[union-attr]
    average.update(model, 0)
    assert average.model.weight.item() == pytest.approx(10.0)  # decay 0.1 at first
    assert average.model.running_mean.item() == pytest.approx(9.0)


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    small = ["--config", "tiny", "--max-steps", "3", "--batch", "2", "--size", "64", "--workers", "0"]
    probe = ["--probe-objects", "1", "--probe-size", "256"]
    return ["pretrain", "--data", str(folder), "--out", str(out), *small, *probe, *more]


def test_pretrain_writes_a_checkpoint_a_log_and_a_curve(folder: Path, tmp_path: Path) -> None:
    cutouts, out = write_cutouts(tmp_path / "composites"), tmp_path / "run"
    result = CliRunner().invoke(app, arguments(folder, out, "--data", str(cutouts)))
    assert result.exit_code == 0, result.output
    loaded = load_checkpoint(out / "model.safetensors")
    assert loaded.model.config == tiny()
    assert loaded.provenance["steps"] == 3
    assert loaded.provenance["data"]["photos"] == {"human290": 3, "other": 3}
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.part"))

    again = CliRunner().invoke(app, arguments(folder, out))
    assert again.exit_code == 1
    assert "give --resume" in again.output
    more = CliRunner().invoke(app, [*arguments(folder, out), "--resume", "--max-steps", "4"])
    assert more.exit_code == 0, more.output
    assert load_checkpoint(out / "model.safetensors").provenance["steps"] == 4


@pytest.mark.parametrize(("option", "value"), [("--config", "huge"), ("--stage", "later")])
def test_pretrain_names_wrong_options(folder: Path, tmp_path: Path, option: str, value: str) -> None:
    result = CliRunner().invoke(app, arguments(folder, tmp_path / "run", option, value))
    assert result.exit_code == 2
    assert f"'{value}' is not one of" in result.output


def test_pretrain_says_what_is_no_pack(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, arguments(tmp_path, tmp_path / "run"))
    assert result.exit_code == 1
    assert "has no index.json" in result.output


def test_processes_of_one_run_stay_equal(folder: Path, tmp_path: Path) -> None:
    """Two processes: the first one writes, gradients and statistics are averaged."""
    options = ("--probe-objects", "0", "--processes", "2")
    subprocess.run(
        [sys.executable, "-m", "train", *arguments(folder, tmp_path / "run", *options)],
        cwd=ROOT, check=True, timeout=300,
    )  # fmt: skip
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]
    assert load_checkpoint(tmp_path / "run" / "model.safetensors").provenance["steps"] == 3


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the children of a process")
def test_processes_end_with_the_command_that_started_them(folder: Path, tmp_path: Path) -> None:
    """Killed without a chance to clean up: nobody is left who trains on, or writes to the folder."""
    options = ("--probe-objects", "0", "--processes", "2", "--max-steps", "100000", "--workers", "0")
    command = subprocess.Popen(
        [sys.executable, "-m", "train", *arguments(folder, tmp_path / "run", *options)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: (tmp_path / "run" / "log.jsonl").is_file())
        children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
        assert len(children) >= 2
    finally:
        command.kill()
        command.wait()
    wait_for(lambda: not any(alive(int(child)) for child in children))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(happened: Callable[[], bool], patience_s: float = 120.0) -> None:
    end = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_first_failure_of_several_processes_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, arguments(tmp_path, tmp_path / "run", "--processes", "2"))
    assert result.exit_code == 1
    assert "has no index.json" in result.output
