"""How long the soak tests run, and their report.

SOAK_SCALE (`make soak SCALE=0.02`) multiplies every number of repetitions: 1 takes about an hour, 0.02 three minutes.
The report is a table of figures beside the last run's: printed, and written to out/soak.json.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doors import ImageServer, Picture, References, pictures

from inter2former.files import write_atomically
from inter2former.segmenter import load_segmenter

SCALE = float(os.environ.get("SOAK_SCALE", "1"))
REPORT = Path(os.environ.get("SOAK_REPORT", "out/soak.json"))
_figures: dict[str, float] = {}

Note = Callable[[str, float], None]


@pytest.fixture(scope="session")
def times() -> Callable[[int, int], int]:
    """times(count, at_least): a number of repetitions by the scale."""
    return lambda count, at_least=1: max(at_least, math.ceil(count * SCALE))


@pytest.fixture
def note() -> Note:
    """note("R10 p95 at 5x, ms", 12.3): a line of the report."""

    def write(name: str, value: float) -> None:
        _figures[name] = round(float(value), 4)

    return write


@pytest.fixture(scope="session")
def shown() -> list[Picture]:
    """Eight pictures of different sizes."""
    return pictures()


@pytest.fixture
def images(shown: list[Picture]) -> Iterator[ImageServer]:
    with ImageServer(shown) as server:
        yield server


@pytest.fixture(scope="session")
def right(tiny_checkpoint: Path) -> References:
    """right(picture, clicks): the mask that every process has to give."""
    return References(load_segmenter(tiny_checkpoint, threads=1))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _figures:
        return
    before: dict[str, float] = {}
    if REPORT.exists():
        last = json.loads(REPORT.read_text())
        before = last["figures"] if last["scale"] == SCALE else {}
    terminalreporter.section(f"soak, scale {SCALE:g}: figure, last run")
    width = max(map(len, _figures))
    for name, value in sorted(_figures.items(), key=lambda figure: (int(figure[0][1:].split()[0]), figure[0])):
        terminalreporter.line(f"{name:{width}}  {value:>12g}  {before.get(name, math.nan):>12g}")
    report = {
        "scale": SCALE,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "figures": _figures,
    }
    write_atomically(REPORT, (json.dumps(report, indent=1) + "\n").encode())
    terminalreporter.line(f"wrote {REPORT}")
