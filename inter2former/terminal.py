"""How figures look in a terminal: tables for people, progress on standard error. No figures are made here."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from inter2former.evaluation import Score

_SCORE_HEADS = {"objects": "objects", "nof90": "NoF90"}


def print_scores(summary: dict[str, Any]) -> None:
    """A table of `evaluation.summarise`: a row a source and the mean, IoU in percent."""
    keys = list(summary["mean"])
    table = Table("source", *(_score_head(key) for key in keys), box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, figures in [*summary["sources"].items(), ("mean", summary["mean"])]:
        cells = [f"{figures[key]:.0f}" if key in _SCORE_HEADS else f"{figures[key]:.1f}" for key in keys]
        table.add_row(name, *cells, style="bold" if name == "mean" else None)
    console = _console()
    console.print(table)
    console.print(
        f"{summary['seconds_per_click'] * 1000:.1f} ms a click with encoding, "
        f"{summary['seconds_per_click_online'] * 1000:.1f} ms without."
    )


def _score_head(key: str) -> str:
    for start, head in (
        ("miou@", "mIoU@"),
        ("biou@", "BIoU@"),
        ("noc", "NoC"),
        ("grown@", "grown@"),
        ("score_mae@", "score error@"),
    ):
        if key.startswith(start):
            return head + key.removeprefix(start)
    return _SCORE_HEADS[key]


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """A table of equal-keyed rows; numbers to the right."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for key in rows[0] if rows else ():
        table.add_column(key, justify="right" if isinstance(rows[0][key], int | float) else "left")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    _console().print(table)


def _console() -> Console:
    # A pipe has no width: rich would assume 80 columns there and shorten the heads.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


@contextlib.contextmanager
def score_progress(total: int, title: str) -> Iterator[Callable[[Score], None]]:
    """A bar on standard error with the running mIoU@5; quiet where standard error is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[running]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    at_five: list[float] = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total, running="")

        def advance(score: Score) -> None:
            at_five.append(score.ious[min(5, len(score.ious)) - 1])
            progress.update(task, advance=1, running=f"IoU@5 {100 * sum(at_five) / len(at_five):.1f}")

        yield advance
