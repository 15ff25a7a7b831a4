"""`make demo`: three clicks on a photo, the IoU after each of them, and a picture of the answer.

    python -m benchmarks.demo --out out

The clicks are those of the evaluation protocol: each goes to the deepest point of the larger error, so a person
would have clicked much the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from inter2former import Segmenter, load_segmenter
from inter2former.evaluation import Image, Mask, Target, evaluate
from inter2former.files import write_atomically
from inter2former.images import decode_image
from inter2former.masks import overlay, png_to_mask, rgb_to_png
from inter2former.prompts import Click

DATA = Path(__file__).parent / "demo_data"
CLICKS = 3


def demo(segmenter: Segmenter, image: Image, truth: Mask) -> tuple[list[Click], tuple[float, ...], Mask]:
    """Simulate the clicks: (clicks, IoU after each, last mask)."""
    made: list[Click] = []
    mask = np.zeros_like(truth)

    def segment(_: Image, clicks: Sequence[Click]) -> Mask:
        nonlocal made, mask
        made, mask = list(clicks), segmenter.segment(image, clicks).mask
        return mask

    (score,) = evaluate([Target("demo", "coffee", image, truth)], segment, clicks=CLICKS)
    return made, score.ious, mask


def main(
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("out"),
    checkpoint: Annotated[Path | None, typer.Option(help="A .safetensors file [starter weights].")] = None,
) -> None:
    """Three clicks on the demo photo."""
    image = decode_image((DATA / "coffee.jpg").read_bytes())
    truth = png_to_mask((DATA / "coffee_mask.png").read_bytes())
    clicks, ious, mask = demo(load_segmenter(checkpoint), image, truth)
    for number, (click, iou) in enumerate(zip(clicks, ious, strict=False), start=1):
        sign = "+" if click.positive else "-"
        print(f"click {number} ({sign}) at {click.x:.0f}, {click.y:.0f}: IoU {100 * iou:.1f} %")
    path = out / "demo.png"
    write_atomically(path, rgb_to_png(overlay(image, mask, clicks)))
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
