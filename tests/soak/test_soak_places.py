"""Places: odd machines (R21), fork, spawn and gunicorn's preload (R22), failing image sources under load (R20)."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doors import ROOT, ImageServer, Picture, References, children, label_studio_body, running, send

from tests.unit.train_pack import write_pack

pytestmark = pytest.mark.soak
Note = Callable[[str, float], None]
Times = Callable[..., int]


def nothing_can_be_written() -> None:
    """A full disk for this process: every write into a file fails. Pipes and memory still work."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


NO_HOME: dict[str, str | None] = {"HOME": None, "USER": None, "LOGNAME": None, "XDG_CACHE_HOME": None}
PLACES: dict[str, dict[str, Any]] = {
    "no home folder": {"environment": NO_HOME},
    "home that is not there": {"environment": {"HOME": "/nonexistent", "TMPDIR": "/nonexistent"}},
    "umask 077": {"preexec_fn": lambda: os.umask(0o077) and None},
    "locale C": {"environment": {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0"}},
    "odd locale": {"environment": {"LC_ALL": "tr_TR.ISO-8859-9", "TZ": "Pacific/Kiritimati"}},
    "full disk": {"preexec_fn": nothing_can_be_written, "stderr": subprocess.DEVNULL},
    "a working folder where nobody can write": {"cwd": Path("/proc")},
    "few files": {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))},
}


@pytest.mark.parametrize(("place", "kind"), [*((place, "label_studio") for place in PLACES), ("full disk", "cvat")])
def test_r21_odd_places(
    kind: str, place: str, tiny_checkpoint: Path, tmp_path: Path, images: ImageServer, shown: list[Picture],
    right: References, note: Note,
) -> None:  # fmt: skip
    """R21: the same answers without a home, a disk to write to, a usual locale or umask."""
    with running(kind, tiny_checkpoint, tmp_path, images, **PLACES[place]) as door:
        for picture in shown:
            assert np.array_equal(door.ask(picture, picture.clicks(3, 0)), right(picture, picture.clicks(3, 0)))
        assert "Traceback" not in door.text()
    note(f"R21 {place}, {kind}: wrong answers", 0)


def test_r21_a_full_disk_stops_training_and_nothing_else(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """R21 and R18: a disk that fills up while a checkpoint is written leaves the old one whole and no fragments."""
    target = tmp_path / "model.safetensors"
    target.write_bytes(tiny_checkpoint.read_bytes())
    script = f"""
import resource, signal
from inter2former.checkpoints import load_checkpoint, save_checkpoint
model = load_checkpoint({str(target)!r}).model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_checkpoint({str(target)!r}, model, provenance={{"new": True}})
except OSError as error:
    print("refused", error.errno)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "refused" in done.stdout, done.stderr
    assert target.read_bytes() == tiny_checkpoint.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_r42_training_talks_to_nobody(tmp_path: Path) -> None:
    """R42: `train pretrain` and `inter2former info` with every address beyond this machine refused."""
    pack = write_pack(tmp_path / "pack")
    train = [
        "train", "pretrain", "--data", str(pack), "--out", str(tmp_path / "run"), "--config", "tiny", "--size", "64",
        "--max-steps", "2", "--threads", "1", "--workers", "0", "--batch", "2", "--probe-objects", "1",
        "--probe-size", "256",
    ]  # fmt: skip
    for command in (train, ["inter2former.cli", "info"]):
        guarded = [sys.executable, str(ROOT / "tests" / "guarded.py"), *command]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(guarded, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "FORBIDDEN" not in done.stderr


# -- fork and spawn --------------------------------------------------------------------------------------------------

FORK = """
import hashlib, json, multiprocessing, sys, threading
from inter2former.segmenter import load_segmenter
from doors import pictures

# Made before any thread: a cached_property has a lock, which a fork may find taken.
asked = [(p.png, p.clicks(3, 0)) for p in pictures(3)]

def answers(segmenter):
    return [hashlib.sha256(segmenter.segment(*one).mask.tobytes()).hexdigest() for one in asked]

def in_child(segmenter, pipe):
    pipe.send(answers(segmenter))

def spawned(path, threads, pipe):
    pipe.send(answers(load_segmenter(path, model_size=256, threads=threads)))

if __name__ == "__main__":
    path, threads, rounds, method = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    segmenter = load_segmenter(path, model_size=256, threads=threads)
    wanted = answers(segmenter)
    # The pools of every library are in use when a fork comes.
    stop = threading.Event()
    def compute():
        while not stop.is_set():
            segmenter.clear_cache()
            answers(segmenter)
    busy = [threading.Thread(target=compute) for _ in range(2)]
    for thread in busy:
        thread.start()
    context = multiprocessing.get_context(method)
    stuck = wrong = 0
    for _ in range(rounds):
        segmenter.clear_cache()
        here, there = context.Pipe(False)
        if method == "fork":
            child = context.Process(target=in_child, args=(segmenter, there))
        else:
            child = context.Process(target=spawned, args=(path, threads, there))
        child.start()
        if here.poll(float(sys.argv[5])):
            wrong += here.recv() != wanted
        else:
            stuck += 1
            child.kill()
        child.join()
    stop.set()
    for thread in busy:
        thread.join()
    print(json.dumps({"stuck": stuck, "wrong": wrong}))
"""


@pytest.mark.parametrize(("method", "threads"), [("fork", 1), ("fork", 2), ("spawn", 2)])
def test_r22_children_answer_alike(
    method: str, threads: int, tiny_checkpoint: Path, tmp_path: Path, times: Times, note: Note
) -> None:
    """R22: 50 children of a process whose threads compute meanwhile, each with a watchdog (generous, for busy
    machines: a child that is locked up never answers)."""
    rounds = times(50 if method == "fork" else 10, 2)
    script = tmp_path / "children.py"
    script.write_text(FORK)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": str(threads)}
    asked = [str(tiny_checkpoint), str(threads), str(rounds), method, "600" if method == "spawn" else "60"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *asked],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    note(f"R22 {method}, {threads} threads: stuck of {rounds}", found["stuck"])
    note(f"R22 {method}, {threads} threads: wrong of {rounds}", found["wrong"])
    assert found == {"stuck": 0, "wrong": 0}


PRELOAD = """
import sys
from backends.common.server import Server, warm_segmenter
from backends.common.settings import load_settings
from backends.label_studio.app import create_app

settings = load_settings()
app = create_app(settings, warm_segmenter(settings))  # the weights are there, and were used, before the fork
server = Server(lambda: app, "127.0.0.1", int(sys.argv[2]))
server.cfg.set("workers", 2)
server.cfg.set("preload_app", True)
server.run()
"""


def test_r22_gunicorn_with_preload_and_two_workers(
    tiny_checkpoint: Path, tmp_path: Path, images: ImageServer, shown: list[Picture], right: References, times: Times,
    note: Note, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """R22: weights loaded and used in the parent, two workers that answer alike and do not lock up."""
    (tmp_path / "preloaded.py").write_text(PRELOAD)
    monkeypatch.setitem(__import__("doors").DOORS, "label_studio", "preloaded")
    rounds = times(10)
    for _ in range(rounds):
        variables = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "I2F_THREADS": "2", "OMP_NUM_THREADS": "2"}
        with running("label_studio", tiny_checkpoint, tmp_path, images, environment=variables) as door:
            end = time.monotonic() + 30  # the first worker answers before the second is there
            while len(children(door.process.pid)) < 2 and time.monotonic() < end:
                time.sleep(0.05)
            assert len(children(door.process.pid)) == 2
            with ThreadPoolExecutor(8) as threads:
                masks = threads.map(lambda p: door.ask(p, p.clicks(3, 0), patience_s=60), shown * 3)
                wrong = sum(
                    not np.array_equal(mask, right(p, p.clicks(3, 0))) for p, mask in zip(shown * 3, masks, strict=True)
                )
            assert wrong == 0
    note("R22 starts with preload and two workers", rounds)


# -- image sources ---------------------------------------------------------------------------------------------------


def test_r20_failing_sources_do_not_stop_other_clicks(
    tiny_checkpoint: Path, tmp_path: Path, images: ImageServer, shown: list[Picture], right: References, times: Times,
    note: Note,
) -> None:  # fmt: skip
    """R20: ten clients ask for images that hang, drip, break off or are refused, others click on good ones: those are
    answered rightly, and every bad one is told with its cause before the time limit."""

    limit_s = 5  # good images come from this busy process too, and have to be in time
    seconds = times(60, 12)

    def hang(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(3 * limit_s)

    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write(b"x" * 1000)

    bad = {"/data/hang.png": hang, "/data/cut.png": cut, "/data/gone.png": lambda h: send(h, 410, b"")}
    images.faults |= bad
    environment = {"I2F_FETCH_TIMEOUT_S": str(limit_s)}
    with running("label_studio", tiny_checkpoint, tmp_path, images, environment=environment) as door:
        end = time.monotonic() + seconds

        def ask_bad(n: int) -> list[tuple[int, float]]:
            answers = []
            while time.monotonic() < end:
                began = time.monotonic()
                address = list(bad)[n % len(bad)]
                answer = door.post(label_studio_body(shown[0], shown[0].clicks(1, 0), address=address))
                answers.append((answer.status_code, time.monotonic() - began))
            return answers

        with ThreadPoolExecutor(10) as threads:
            asking = [threads.submit(ask_bad, n) for n in range(10)]
            good = []
            while time.monotonic() < end:
                picture = shown[len(good) % len(shown)]
                began = time.monotonic()
                mask = door.ask(picture, picture.clicks(3, 0), patience_s=30)
                good.append(time.monotonic() - began)
                assert np.array_equal(mask, right(picture, picture.clicks(3, 0)))
            told = [answer for one in asking for answer in one.result()]
        assert {status for status, _ in told} <= {502, 503, 504}
        note("R20 answers about bad images", len(told))
        note(f"R20 slowest of them, s (limit {limit_s})", max(spent for _, spent in told))
        note("R20 good clicks meanwhile", len(good))
        note("R20 p95 of good clicks, ms", 1000 * float(np.percentile(good, 95)))
        assert "Traceback" not in door.text()
