"""Where measurements are kept: JSON in benchmarks/results/, each with the circumstances it was made in."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from inter2former.bench import machine
from inter2former.files import write_atomically

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict[str, Any], *, threads: int) -> Path:
    """Write results/NAME.json: the figures, machine, versions, threads, commit and date. Returns its path."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    content = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "threads": threads,
        "machine": machine(),
        **figures,
    }
    path = RESULTS / f"{name}.json"
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path
