"""Bounds: memory (R12), threads (R13), what clients that go away leave behind (R14)."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doors import ROOT, ImageServer, Picture, References, abort, open_files, resident_bytes, running

from inter2former.segmenter import Segmenter, load_segmenter

pytestmark = pytest.mark.soak
Note = Callable[[str, float], None]
Times = Callable[..., int]
MB = 2**20


def real_bytes(segmenter: Segmenter) -> int:
    """What the entries of the cache hold: every buffer behind an array or tensor, in whole and once."""
    buffers: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            buffers[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            if isinstance(value.base, torch.Tensor):
                look(value.base)
            else:
                buffers[value.ctypes.data] = value.nbytes
        elif isinstance(value, list | tuple):
            for part in value:
                look(part)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                look(getattr(value, field.name))

    for entry in list(segmenter._cache._entries.values()):
        look(entry)
    return sum(buffers.values())


def test_r12_the_cache_counts_real_bytes(tiny_checkpoint: Path, times: Times, note: Note) -> None:
    """R12: after requests of 8 threads over many images, the bytes that the cache says it holds are those of the
    buffers in it within 5 %, and within the budget."""
    budget = 24 * MB
    segmenter = load_segmenter(tiny_checkpoint, model_size=512, cache_bytes=budget, threads=1)
    shown = [Picture(number, 60 + 7 * (number % 30), 80 + 11 * (number % 20)) for number in range(times(500, 16))]

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(times(1250, 12)):
            picture = shown[int(rng.integers(len(shown)))]
            segmenter.segment(picture.png, picture.clicks(5, int(rng.integers(3)))[: int(rng.integers(1, 6))])
            assert segmenter.cache_info().nbytes <= budget

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    told, real = segmenter.cache_info(), real_bytes(segmenter)
    note("R12 cache, bytes told, MB", told.nbytes / MB)
    note("R12 cache, real bytes by told", real / told.nbytes)
    note("R12 cache, evictions", told.evictions)
    assert abs(real / told.nbytes - 1) < 0.05


@pytest.mark.parametrize("kind", ["label_studio", "cvat"])
def test_r12_memory_does_not_grow(
    kind: str, tiny_checkpoint: Path, tmp_path: Path, right: References, times: Times, note: Note
) -> None:
    """R12: 10 000 clicks of 8 clients on 500 images of mixed size. Once the caches are full, memory stays: less than
    16 MB from the first half to the second, and less than a stated overhead above the budget in all."""
    shown = [Picture(number, 60 + 7 * (number % 90), 80 + 11 * (number % 70)) for number in range(times(500, 24))]
    clicks = times(5000, 100)
    with (
        ImageServer(shown) as images,
        running(kind, tiny_checkpoint, tmp_path, images, environment={"I2F_CACHE_MB": "16"}) as door,
    ):
        started = resident_bytes(door.worker)
        seen: list[tuple[float, float]] = []

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for n in range(clicks // 8):
                picture = shown[int(rng.integers(len(shown)))]
                door.ask(picture, picture.clicks(5, int(rng.integers(3)))[: int(rng.integers(1, 6))], patience_s=120)
                if seed == 0:
                    seen.append((n * 8, resident_bytes(door.worker)))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
        n, bytes_ = np.array(seen).T
        late = n >= n[-1] / 2
        slope = np.polyfit(n[late], bytes_[late], 1)[0]
        first, second = np.median(bytes_[len(bytes_) // 4 : len(bytes_) // 2]), np.median(bytes_[late])
        note(f"R12 {kind}, resident at start, MB", started / MB)
        note(f"R12 {kind}, resident at the end, MB", bytes_[-1] / MB)
        note(f"R12 {kind}, growth from second to last quarters, MB", (second - first) / MB)
        note(f"R12 {kind}, slope of the second half, bytes a click", slope)
        note(f"R12 {kind}, cache, MB", door.metric("inter2former_cache_bytes") / MB)
        assert door.metric("inter2former_cache_bytes") <= 16 * MB
        if clicks >= 1000:  # before that the allocator has not settled
            assert second - first < 16 * MB
        assert bytes_[-1] - started < 256 * MB


THREADS = """
import json, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
import cv2, torch
from inter2former import Click
from inter2former.segmenter import load_segmenter
from doors import pictures
def native_threads():
    return len(os.listdir("/proc/self/task")) - threading.active_count()
imported = native_threads()  # libraries have threads of their own from the import on
count, path = int(sys.argv[1]), sys.argv[2]
segmenter = load_segmenter(path, model_size=512, threads=count)
def ask(picture):
    return segmenter.segment(picture.png, picture.clicks(2, 0)).score
for picture in pictures(2):
    ask(picture)
one = native_threads() - imported
barrier = threading.Barrier(16)
def together(picture):
    barrier.wait()
    ask(picture)
    barrier.wait()  # nobody's thread may end before it was counted
    return native_threads() - imported
with ThreadPoolExecutor(16) as pool:
    many = max(pool.map(together, pictures(16)))
print(json.dumps({"one": one, "many": many, "torch": torch.get_num_threads(), "opencv": cv2.getNumThreads()}))
"""


def test_r13_threads_follow_the_setting(tiny_checkpoint: Path, note: Note) -> None:
    """R13: native threads that are started for THREADS = 1, 2, 4, with one caller and with sixteen at once. PyTorch's
    OpenMP, the native module and OpenCV have a team each, of that size with the thread that asks. PyTorch starts as
    many for the pool of QNNPACK and XNNPACK, which nothing here uses: they sleep from `set_num_threads` on. Callers
    add none. Reading larger weights than these starts one more team of OpenMP, the loading thread's, which sleeps from
    then on.
    """
    for count in (1, 2, 4):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        environment.pop("OMP_NUM_THREADS", None)
        command = [sys.executable, "-c", THREADS, str(count), str(tiny_checkpoint)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        note(f"R13 native threads, THREADS={count}, one caller", found["one"])
        note(f"R13 native threads, THREADS={count}, sixteen callers", found["many"])
        assert found["torch"] == count
        assert found["opencv"] in (count, 0 if count == 1 else count)
        assert found["many"] <= found["one"]
        assert found["one"] <= 4 * (count - 1)


def test_r14_clients_that_go_away(
    tiny_checkpoint: Path, tmp_path: Path, images: ImageServer, shown: list[Picture], right: References, times: Times,
    note: Note,
) -> None:  # fmt: skip
    """R14: 1000 connections a door reset in the middle of the headers, of the body, or while the answer is made. File
    descriptors, places in line and the gauge come back; the next answers are right."""
    count = times(1000, 60)
    for kind in ("label_studio", "cvat"):
        with running(kind, tiny_checkpoint, tmp_path, images) as door:
            picture = shown[0]
            clicks = picture.clicks(3, 0)
            assert np.array_equal(door.ask(picture, clicks), right(picture, clicks))
            before = open_files(door.worker)
            for n in range(count):
                abort(door, door.body(picture, picture.clicks(3, n)), n % 4)
            end = time.monotonic() + 60
            while open_files(door.worker) > before or door.metric("inter2former_queue") > 0:
                assert time.monotonic() < end, f"{open_files(door.worker)} files open, {before} before"
                time.sleep(0.2)
            # More clicks at once than would fit if places had been lost.
            with ThreadPoolExecutor(16) as threads:
                masks = threads.map(lambda p: door.ask(p, p.clicks(3, 1), patience_s=60), shown * 4)
                for asked, mask in zip(shown * 4, masks, strict=True):
                    assert np.array_equal(mask, right(asked, asked.clicks(3, 1)))
            note(f"R14 connections reset, {kind}", count)
            note(f"R14 file descriptors more than before, {kind}", open_files(door.worker) - before)
            assert "Traceback" not in door.text()
