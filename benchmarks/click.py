"""Milliseconds of a click by object area, kept in benchmarks/results/ with a picture.

    python -m benchmarks.click --preset small --runs 20 --threads 2

The measurement itself is `inter2former bench`; see inter2former/bench.py for what the rows mean.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import cv2
import torch
import typer

from benchmarks.results import write_result
from inter2former.bench import run
from inter2former.checkpoints import load_checkpoint
from inter2former.files import write_atomically
from inter2former.terminal import print_rows

AREAS = (0.01, 0.05, 0.10, 0.25, 0.50)


def plot(result: dict[str, Any]) -> bytes:
    """PNG: median click by area, a line for each contender and size, whiskers up to the 90 % point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in result["rows"] if row["what"] == "click"]
    for size, contender in sorted({(row["size"], row["contender"]) for row in rows}):
        line = [row for row in rows if (row["size"], row["contender"]) == (size, contender)]
        medians = [row["median_ms"] for row in line]
        spread = [row["p90_ms"] - row["median_ms"] for row in line]
        areas = [100 * row["area"] for row in line]
        axes.errorbar(areas, medians, yerr=[[0] * len(line), spread], marker="o", label=f"{contender}, T = {size}")
    axes.set(xlabel="object, % of the picture", ylabel="ms a click", ylim=(0, None))
    axes.set_title(f"{result['machine']['cpu']}, {result['threads']} threads", fontsize=9)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(picture)
    return picture.getvalue()


def main(
    preset: str = "small",
    size: Annotated[list[int] | None, typer.Option(help="Model sizes; may be repeated.")] = None,
    runs: int = 20,
    threads: int = 1,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to time [random].")] = None,
) -> None:
    """Time clicks by area and keep the figures."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    model = load_checkpoint(checkpoint).model if checkpoint is not None else None
    result = run(preset, size, AREAS, runs=runs, model=model)
    result["weights"] = "random" if checkpoint is None else checkpoint.name
    print_rows(f"{result['machine']['cpu']}, {result['threads']} threads", result["rows"])
    path = write_result(f"click_{preset}", result, threads=threads)
    write_atomically(path.with_suffix(".png"), plot(result))
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
