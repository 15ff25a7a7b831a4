"""The starter weights in the field's protocol, kept in benchmarks/results/ beside the classical methods.

    python -m benchmarks.starter PACK

Runs `inter2former evaluate PACK --json`; README and model card are written from what it keeps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.results import write_result


def main(
    pack: Annotated[Path, typer.Argument(help="Folder of a pack.")],
    limit: Annotated[int, typer.Option(help="Objects a source.")] = 20,
    clicks: int = 20,
    threads: int = 1,
) -> None:
    """Click through the objects of the val split and keep the figures."""
    options = {"--limit": limit, "--clicks": clicks, "--threads": threads}
    command = [sys.executable, "-m", "inter2former.cli", "evaluate", str(pack), "--json"]
    command += [str(part) for option in options.items() for part in option]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    print(f"wrote {write_result('starter_val', json.loads(answer), threads=threads)}")


if __name__ == "__main__":
    typer.run(main)
