"""Kills: a killed server or training loses nothing and leaves nothing half written (R18, R24), a server that is told to
stop finishes first (R19), a model is swapped whole (R23)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from doors import ROOT, ImageServer, Picture, References, begin, children, finish, mask_in, running
from synthetic import make_tiny_model

from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.segmenter import load_segmenter
from tests.unit.train_pack import write_pack

pytestmark = pytest.mark.soak
Note = Callable[[str, float], None]
Times = Callable[..., int]


@pytest.mark.parametrize("kind", ["label_studio", "cvat"])
def test_r18_a_killed_worker_loses_nothing(
    kind: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    images: ImageServer,
    shown: list[Picture],
    right: References,
    times: Times,
    note: Note,
) -> None:
    """R18: kill -9 of the worker at a random moment of fetching, encoding, clicking or starting, 75 times a door. The
    next answers are right, and nothing is left behind."""
    rng = random.Random(0)
    kills = times(75, 3)
    memory = {"I2F_MEMORY_FILE": str(tmp_path / "memory")} if kind == "label_studio" else {}
    with running(kind, tiny_checkpoint, tmp_path, images, environment={"I2F_CACHE_MB": "1", **memory}) as door:
        stop = threading.Event()
        wrong, broken, answered = [], [], []

        def work(seed: int) -> None:
            chosen = random.Random(seed)
            while not stop.is_set():
                picture = shown[chosen.randrange(len(shown))]
                clicks = picture.clicks(6, chosen.randrange(3))[: chosen.randint(1, 6)]
                try:
                    answer = door.post(door.body(picture, clicks))
                except httpx.TransportError:
                    broken.append(1)
                    time.sleep(0.05)
                    continue
                if answer.status_code == 503:
                    continue
                answered.append(answer.status_code)
                if answer.status_code != 200 or not np.array_equal(
                    mask_in(kind, answer.json(), picture), right(picture, clicks)
                ):
                    wrong.append(answer.text)

        with ThreadPoolExecutor(3) as threads:
            running_work = [threads.submit(work, seed) for seed in range(3)]
            try:
                for _ in range(kills):
                    time.sleep(rng.uniform(0.0, 0.5))
                    victim = children(door.process.pid)
                    for pid in victim:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    seen, end = len(answered), time.monotonic() + 60
                    if rng.random() < 0.7:  # else: killed again before anything was answered
                        while len(answered) == seen:
                            assert time.monotonic() < end, door.text()
                            time.sleep(0.01)
            finally:
                stop.set()
            for done in running_work:
                done.result()
        door.wait()
        for picture in shown:
            clicks = picture.clicks(4, 0)
            assert np.array_equal(door.ask(picture, clicks, patience_s=60), right(picture, clicks))
        note(f"R18 kills of the worker, {kind}", kills)
        note(f"R18 answers between them, {kind}", len(answered))
        note(f"R18 connections broken by them, {kind}", len(broken))
        note(f"R18 wrong answers, {kind}", len(wrong))
        assert not wrong, wrong[0]
        assert answered
    left = {path.name for path in tmp_path.iterdir()} - {door.log.name, "memory"}
    assert {name for name in left if not name.startswith("memory")} == set()


@pytest.mark.parametrize("kind", ["label_studio", "cvat"])
def test_r19_eight_in_flight_are_answered(
    kind: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    images: ImageServer,
    shown: list[Picture],
    right: References,
    times: Times,
    note: Note,
) -> None:
    """R19: SIGTERM with eight requests half sent: eight right answers, exit 0; who comes later gets a 503."""
    rounds = times(10)
    for _ in range(rounds):
        with running(kind, tiny_checkpoint, tmp_path, images) as door:
            clicks = [picture.clicks(4, 1) for picture in shown]
            flights = [begin(door, door.body(p, c)) for p, c in zip(shown, clicks, strict=True)]
            time.sleep(0.5)  # until the server has read what there is
            door.process.send_signal(signal.SIGTERM)
            end = time.monotonic() + 20
            while door.client.get(door.url + "/health").status_code != 503:  # ready turns false first
                assert time.monotonic() < end
            for picture, clicked in zip(shown, clicks, strict=True):
                assert door.post(door.body(picture, clicked)).status_code == 503
            for (connection, rest), picture, clicked in zip(flights, shown, clicks, strict=True):
                status, text = finish(connection, rest)
                assert status == 200, text
                assert np.array_equal(mask_in(kind, json.loads(text), picture), right(picture, clicked))
            assert door.process.wait(60) == 0
            assert "Traceback" not in door.text()
    note(f"R19 rounds of 8 in flight, all answered, {kind}", rounds)


def test_r23_a_model_is_swapped_whole(
    tiny_checkpoint: Path, tmp_path: Path, images: ImageServer, shown: list[Picture], times: Times, note: Note
) -> None:
    """R23: the checkpoint is replaced by a rename and the server told to reload (SIGHUP) under load, ten times to and
    fro: every answer is the old or the new model's, by the version that it names, and no request is lost."""
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, make_tiny_model(seed=1))
    served = tmp_path / "served.safetensors"
    shutil.copy(tiny_checkpoint, served)
    models = {
        f"inter2former-{load_checkpoint(path).digest[:12]}": References(load_segmenter(path, threads=1))
        for path in (tiny_checkpoint, other)
    }
    assert any(not np.array_equal(*(reference(p, p.clicks(3, 0)) for reference in models.values())) for p in shown)
    with running("label_studio", served, tmp_path, images) as door:
        stop = threading.Event()
        versions: dict[str, int] = dict.fromkeys(models, 0)
        wrong, broken = [], []

        def work(seed: int) -> None:
            chosen = random.Random(seed)
            while not stop.is_set():
                picture = shown[chosen.randrange(len(shown))]
                clicks = picture.clicks(4, chosen.randrange(3))
                try:
                    answer = door.post(door.body(picture, clicks))
                except httpx.TransportError as error:
                    broken.append(repr(error))
                    continue
                if answer.status_code == 503:
                    continue
                assert answer.status_code == 200, answer.text
                version = answer.json()["results"][0]["model_version"]
                versions[version] += 1
                if not np.array_equal(
                    mask_in("label_studio", answer.json(), picture), models[version](picture, clicks)
                ):
                    wrong.append(version)

        with ThreadPoolExecutor(3) as threads:
            done = [threads.submit(work, seed) for seed in range(3)]
            try:
                swaps = times(10, 2)
                for n in range(swaps):
                    new = other if n % 2 == 0 else tiny_checkpoint
                    shutil.copy(new, tmp_path / "beside")
                    os.replace(tmp_path / "beside", served)
                    door.process.send_signal(signal.SIGHUP)
                    wanted, end = f"inter2former-{load_checkpoint(new).digest[:12]}", time.monotonic() + 60
                    while door.client.get(door.url + "/health").json()["model_version"] != wanted:
                        assert time.monotonic() < end, door.text()
                        time.sleep(0.05)
                    time.sleep(1.0)
            finally:
                stop.set()
            for one in done:
                one.result()
        note("R23 swaps under load", swaps)
        note("R23 answers", sum(versions.values()))
        note("R23 answers of the wrong model", len(wrong))
        note("R23 connections broken", len(broken))
        assert not wrong
        assert all(versions.values())
        assert door.process.poll() is None


# -- training --------------------------------------------------------------------------------------------------------

TRAINING = """
import dataclasses, sys, torch
from pathlib import Path
from inter2former.checkpoints import save_checkpoint
from inter2former.config import tiny
from inter2former.nn.model import Inter2Former
from train import loop
from train.data import DrawConfig, read_pack
torch.set_num_threads(1)
pack, out, steps = read_pack([Path(sys.argv[1])]), Path(sys.argv[2]), int(sys.argv[3])
config = loop.TrainConfig(max_steps=steps, batch=2, sizes=(64, 96), dense_share=0.3, warmup_steps=2, workers=0,
                          save_every_s=0.0, draw=DrawConfig(scale=(0.25, 4.0)))
out.mkdir(exist_ok=True)
torch.manual_seed(0)
trainer = loop.Trainer(Inter2Former(tiny()), config, torch.device("cpu"))
if (out / "state.pt").exists():
    trainer.load(out / "state.pt")
print("begins", trainer.step, flush=True)
loop.run(trainer, pack, out, checkpoint=lambda model, facts: save_checkpoint(out / "model.safetensors", model))
print("done", flush=True)
"""


def test_r24_r18_training_that_is_killed_anywhere(tmp_path: Path, times: Times, note: Note) -> None:
    """R24 and R18: a run that saves after every step is killed at random moments, 50 times, and ends with the weights
    of a run that was left alone, bit for bit; at every kill the checkpoint beside it is whole."""
    steps = times(200, 8)
    pack = write_pack(tmp_path / "pack")
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(pack), str(out), str(steps)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    with start(tmp_path / "alone") as alone:
        assert "done" in alone.communicate()[0]
    rng, kills, moments = random.Random(0), times(50, 3), []
    while len(moments) < kills:
        with start(tmp_path / "killed") as run:
            begins = run.stdout.readline()
            moments.append(int(begins.split()[1]))
            time.sleep(rng.uniform(0.0, 0.6))
            run.kill()
        if (tmp_path / "killed" / "model.safetensors").exists():
            load_checkpoint(tmp_path / "killed" / "model.safetensors")
    with start(tmp_path / "killed") as run:
        assert "done" in run.communicate()[0]
        assert run.returncode == 0
    one, other = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("alone", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    note("R24 kills of a training", kills)
    note("R24 different steps at which it was resumed", len(set(moments)))
