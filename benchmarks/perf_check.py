"""Has the native click become slower? Builds the base commit beside the installed module and times both in one process.

    make perf-check [BASE=...]     # default: the commit before; brings the installed module up to date first

Both builds answer the same clicks by turns, on random weights. The figure is the median over the turns of
time here / time of the base; above LIMIT the command fails. Machine load moves both alike.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typer

from benchmarks.decoder import make_features, ours, scene
from inter2former import _native
from inter2former.config import PRESETS
from inter2former.images import Frame
from inter2former.nn.model import Inter2Former
from inter2former.runtime.decoder import FusedDecoder

ROOT = Path(__file__).parents[1]
LIMIT = 1.10
SIZE = 512
CASES: dict[str, float | None] = {"first click": None, "click, 1 %": 0.01, "click, 10 %": 0.10, "click, 50 %": 0.50}


def build(source: Path, folder: Path) -> Path:
    """The native module of a source tree, built in `folder`."""
    cmake = Path(sys.executable).parent / "cmake"
    pybind = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    configure = [cmake, "-S", source, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    configure += [
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={cmake.with_name('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind}",
    ]
    for command in (configure, [cmake, "--build", folder, "--parallel", "2"]):
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("_native*"))


def load(path: Path, name: str) -> ModuleType:
    """A build under a name of its own, so that two can be loaded."""
    spec = importlib.util.spec_from_file_location(f"{name}._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(here: ModuleType, base: ModuleType, runs: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median of time here / time of the base, for each case."""
    torch.manual_seed(0)
    model = Inter2Former(PRESETS["base"]()).eval()
    features = make_features(model, SIZE)
    frame = Frame(SIZE, SIZE, SIZE, model.config.input_convention)
    decoders = [FusedDecoder(model, module) for module in (here, base)]
    image: Any = decoders[0].compact(features)
    out = {}
    for name, area in CASES.items():
        reference, box = scene(SIZE, area)
        actions = [ours(decoder, image, frame, reference, box) for decoder in decoders]
        ratios = []
        for index in range(runs + 2):
            seconds = []
            for action in actions if index % 2 else actions[::-1]:
                began = clock()
                action()
                seconds.append(clock() - began)
            mine, other = seconds if index % 2 else seconds[::-1]
            if index > 1:
                ratios.append(mine / other)
        out[name] = statistics.median(ratios)
    return out


def main(base: str = typer.Argument("HEAD~1"), runs: int = 40) -> None:
    """Fail when the installed native click is a tenth slower than that of BASE."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "base"
        tree.mkdir()
        archive = subprocess.run(["git", "archive", base], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
        other = load(build(tree, Path(scratch) / "build"), "base")
        if _native.INTERFACE != other.INTERFACE:
            print(f"{base} has another native interface; there is nothing to compare.")
            return
        ratios = compare(_native, other, runs, time.thread_time)
    for name, ratio in ratios.items():
        print(f"{name:12}  {ratio:.3f} of {base}'s time")
    slower = [name for name, ratio in ratios.items() if ratio > LIMIT]
    if slower:
        raise SystemExit(f"Slower by more than {LIMIT - 1:.0%}: {', '.join(slower)}.")


if __name__ == "__main__":
    typer.run(main)
