"""The objects that a model fails on, as pictures: photo with the true outline beside the answer with its clicks.

    python -m benchmarks.failures PACK --out FOLDER --worst 12

For the model card, and for whoever wants to see what to annotate more of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
import typer

from inter2former.evaluation import Image, Pack, Target, iou, next_click
from inter2former.files import write_atomically
from inter2former.masks import overlay, rgb_to_png
from inter2former.prompts import Click
from inter2former.segmenter import Segmenter, load_segmenter
from inter2former.terminal import print_rows

SIDE = 320  # pixels of the longer side of a photo on the sheet
_LINE = 22  # pixels of a line of text


class Failure(NamedTuple):
    """One object after its clicks."""

    target: Target
    clicks: tuple[Click, ...]
    mask: np.ndarray
    iou: float
    predicted: float  # what the model itself expected


def click_through(segmenter: Segmenter, target: Target, n: int) -> Failure:
    """The answer after at most n simulated clicks."""
    mask = np.zeros_like(target.mask)
    made: list[Click] = []
    predicted = 0.0
    while len(made) < n and (click := next_click(mask, target.mask, made)) is not None:
        made.append(click)
        result = segmenter.segment(target.image, tuple(made))
        mask, predicted = result.mask, result.score
    return Failure(target, tuple(made), mask, iou(mask, target.mask), predicted)


def worst(failures: Sequence[Failure], n: int, a_source: int) -> list[Failure]:
    """The n lowest IoUs, lowest first, at most `a_source` of one source: a hard source would fill the sheet."""
    chosen: list[Failure] = []
    for failure in sorted(failures, key=lambda f: (f.iou, f.target.name)):
        if len(chosen) < n and sum(c.target.source == failure.target.source for c in chosen) < a_source:
            chosen.append(failure)
    return chosen


def picture(failure: Failure) -> Image:
    """Truth on the left, answer on the right, a line of text below; uint8 RGB."""
    target = failure.target
    sides = [overlay(target.image, target.mask), overlay(target.image, failure.mask, failure.clicks)]
    scale = SIDE / max(target.mask.shape)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    sides = [np.asarray(cv2.resize(side, None, fx=scale, fy=scale, interpolation=how)) for side in sides]
    gap = np.full((sides[0].shape[0], 4, 3), 255, np.uint8)
    row = np.hstack([sides[0], gap, sides[1]])
    text = np.full((_LINE, row.shape[1], 3), 255, np.uint8)
    words = (
        f"{target.source}: IoU {failure.iou:.2f} after {len(failure.clicks)} clicks, expected {failure.predicted:.2f}"
    )
    cv2.putText(text, words, (4, _LINE - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([row, text])


def sheet(pictures: Sequence[Image], columns: int = 2) -> Image:
    """All pictures on one white page."""
    width = max(p.shape[1] for p in pictures)
    rows = []
    for start in range(0, len(pictures), columns):
        line = pictures[start : start + columns]
        height = max(p.shape[0] for p in line)
        page = np.full((height + 8, columns * (width + 8), 3), 255, np.uint8)
        for index, one in enumerate(line):
            page[: one.shape[0], index * (width + 8) : index * (width + 8) + one.shape[1]] = one
        rows.append(page)
    return np.vstack(rows)


def main(
    pack: Annotated[Path, typer.Argument(help="Folder of a pack.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights [starter].")] = None,
    split: str = "val",
    limit: Annotated[int, typer.Option(help="Objects a source that are looked at.")] = 20,
    n: Annotated[int, typer.Option("--worst", help="Objects that are shown.")] = 12,
    a_source: Annotated[int, typer.Option(help="Of one source at most.")] = 2,
    clicks: int = 5,
    size: Annotated[int | None, typer.Option(help="Model size T [what the checkpoint chooses].")] = None,
    threads: int = 1,
) -> None:
    """Write a PNG of each of the worst objects, one sheet of all, and a list."""
    segmenter = load_segmenter(checkpoint, model_size=size or "auto", threads=threads)
    with Pack(pack) as opened:
        shown: list[Failure] = []
        for target in opened.targets(opened.choose(split, limit)):
            # Photos are dropped on the way: only what may still be shown is kept.
            shown = worst([*shown, click_through(segmenter, target, clicks)], n, a_source)
    pictures = [picture(failure) for failure in shown]
    rows: list[dict[str, Any]] = []
    for index, (failure, image) in enumerate(zip(shown, pictures, strict=True), 1):
        write_atomically(out / f"{index:02d}.png", rgb_to_png(image))
        facts = {"source": failure.target.source, "object": failure.target.name, "clicks": len(failure.clicks)}
        rows.append({**facts, "iou": round(failure.iou, 3), "score": round(failure.predicted, 3)})
    done, jpeg = cv2.imencode(".jpg", sheet(pictures)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done
    write_atomically(out / "failures.jpg", jpeg.tobytes())
    write_atomically(
        out / "failures.json", (json.dumps({"checkpoint": segmenter.digest, "rows": rows}, indent=1) + "\n").encode()
    )
    print_rows("worst objects", rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
