"""Classical methods under the same simulated clicks and on the same objects as `inter2former evaluate`.

    python -m benchmarks.baselines PACK --method grabcut --limit 10

They are the yardstick that a small model must beat: none has learnt anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer

from benchmarks.results import write_result
from inter2former.evaluation import Image, Mask, Pack, evaluate, summarise
from inter2former.prompts import Click
from inter2former.terminal import print_scores, score_progress

# All work at a reduced size, as classical methods slow down with pixels; masks are enlarged bilinearly, which costs
# outline accuracy and is part of what is measured.
GRABCUT_SIDE, GRABCUT_ITERATIONS = 200, 3
WALKER_SIDE, WALKER_BETA = 200, 130
GEODESIC_SIDE = 320
SEED_RADIUS = 0.008  # of the short side
PROBABLE_RADIUS = 0.10  # GrabCut: probable foreground around a positive click


def shrink(image: Image, side: int) -> tuple[Image, float]:
    """The image with its longer side at most `side`, and the factor that was used."""
    scale = min(1.0, side / max(image.shape[:2]))
    size_wh = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return np.asarray(cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA)), scale


def enlarge(probability: np.ndarray, image: Image) -> Mask:
    """float32 [h, w] in 0..1 as a mask of the image's size."""
    height, width = image.shape[:2]
    full: Mask = cv2.resize(probability.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
    return full


def discs(shape_hw: tuple[int, int], clicks: Sequence[Click], scale: float, radius: float, *, positive: bool) -> Mask:
    """Union of the discs around the clicks of one sign, in the reduced frame."""
    painted = np.zeros(shape_hw, np.uint8)
    for click in clicks:
        if click.positive == positive:
            centre = min(int(click.x * scale), shape_hw[1] - 1), min(int(click.y * scale), shape_hw[0] - 1)
            cv2.circle(painted, centre, max(1, round(radius)), 1, -1)
    return painted.astype(bool)


def seeds(shape_hw: tuple[int, int], clicks: Sequence[Click], scale: float) -> tuple[Mask, Mask]:
    """Positive and negative seed pixels; where they meet, the later click wins."""
    radius = SEED_RADIUS * min(shape_hw)
    inside, outside = np.zeros(shape_hw, bool), np.zeros(shape_hw, bool)
    for click in clicks:
        disc = discs(shape_hw, [click], scale, radius, positive=click.positive)
        (inside if click.positive else outside)[disc] = True
        (outside if click.positive else inside)[disc] = False
    return inside, outside


def with_border(inside: Mask, outside: Mask) -> Mask:
    """Negative seeds plus the photo's border, but for the border near positive seeds."""
    border = np.ones_like(inside)
    border[1:-1, 1:-1] = False
    reach = 2 * round(PROBABLE_RADIUS * min(inside.shape)) + 1
    near = cv2.dilate(inside.astype(np.uint8), np.ones((reach, reach), np.uint8)) > 0
    return outside | (border & ~near)


def grabcut(image: Image, clicks: Sequence[Click]) -> Mask:
    """OpenCV's GrabCut from click seeds; only components that hold a positive click are kept."""
    small, scale = shrink(image, GRABCUT_SIDE)
    shape = small.shape[:2]
    inside, outside = seeds(shape, clicks, scale)
    labels = np.full(shape, cv2.GC_PR_BGD, np.uint8)
    labels[discs(shape, clicks, scale, PROBABLE_RADIUS * min(shape), positive=True)] = cv2.GC_PR_FGD
    labels[inside], labels[outside] = cv2.GC_FGD, cv2.GC_BGD
    if not outside.any() and not (labels == cv2.GC_PR_BGD).any():
        return np.ones(image.shape[:2], bool)
    cv2.setRNGSeed(0)
    try:
        nowhere = (0, 0, 0, 0)  # the mask says where
        cv2.grabCut(
            small, labels, nowhere, np.zeros((1, 65)), np.zeros((1, 65)), GRABCUT_ITERATIONS, cv2.GC_INIT_WITH_MASK
        )
    except cv2.error:  # a colour model without samples, as on a blank picture
        return enlarge(inside.astype(np.float32), image)
    found = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    _, components = cv2.connectedComponents(found.astype(np.uint8), connectivity=8)
    clicked = np.setdiff1d(components[inside], [0])
    return enlarge(np.isin(components, clicked).astype(np.float32), image)


def random_walker(image: Image, clicks: Sequence[Click]) -> Mask:
    """scikit-image's random walker; the photo's border is a background seed except near positive clicks."""
    from skimage.segmentation import random_walker as walk

    small, scale = shrink(image, WALKER_SIDE)
    inside, outside = seeds(small.shape[:2], clicks, scale)
    outside = with_border(inside, outside)
    if not inside.any() or not outside.any() or small.min() == small.max():  # a blank picture never converges
        return enlarge(inside.astype(np.float32), image)
    labels = np.zeros(small.shape[:2], np.int32)
    labels[outside], labels[inside] = 1, 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # solvers that are not installed, isolated pixels
        probability = walk(
            small, labels, beta=WALKER_BETA, mode="cg_j", tol=1e-3, channel_axis=-1, return_full_prob=True
        )
    return enlarge(np.asarray(probability)[1], image)


def geodesic(image: Image, clicks: Sequence[Click]) -> Mask:
    """Nearest seed along paths that pay for colour changes."""
    from skimage.graph import MCP_Geometric

    small, scale = shrink(image, GEODESIC_SIDE)
    inside, outside = seeds(small.shape[:2], clicks, scale)
    outside = with_border(inside, outside)
    if not inside.any() or not outside.any():
        return enlarge(inside.astype(np.float32), image)
    lab = cv2.GaussianBlur(cv2.cvtColor(small, cv2.COLOR_RGB2LAB), (0, 0), 1.0).astype(np.float32)
    gradient = np.sqrt(sum((np.gradient(lab[..., c], axis=a) ** 2 for c in range(3) for a in (0, 1)), np.float32(0)))
    cost = 0.02 + gradient / max(float(gradient.max()), 1e-6)
    near, far = (MCP_Geometric(cost).find_costs(np.argwhere(seed))[0] for seed in (inside, outside))
    return enlarge(far / np.maximum(near + far, 1e-9), image)


METHODS: dict[str, Callable[[Image, Sequence[Click]], Mask]] = {
    "grabcut": grabcut,
    "random_walker": random_walker,
    "geodesic": geodesic,
}


def main(
    pack: Annotated[Path, typer.Argument(help="Folder of a pack.")],
    method: Annotated[list[str], typer.Option(help=f"One of {', '.join(METHODS)}; may be repeated.")] = [*METHODS],  # noqa: B006
    split: str = "val",
    limit: Annotated[int, typer.Option(help="Objects a source.")] = 10,
    clicks: int = 20,
    write: Annotated[bool, typer.Option(help="Keep the figures in benchmarks/results/.")] = False,
) -> None:
    """Evaluate classical methods and print a table for each."""
    if unknown := sorted(set(method) - set(METHODS)):
        raise typer.BadParameter(f"unknown method {', '.join(unknown)}; choose from {', '.join(METHODS)}.")
    cv2.setNumThreads(1)
    for name in method:
        with Pack(pack) as opened:
            refs = opened.choose(split, limit)
            with score_progress(len(refs), name) as advance:
                scores = evaluate(opened.targets(refs), METHODS[name], clicks=clicks, on_score=advance)
        summary = summarise(scores)
        summary["config"] = {"method": name, "split": split, "limit": limit, "clicks": clicks}
        print_scores(summary)
        if write:
            print(write_result(f"baseline_{name}", summary, threads=1))


if __name__ == "__main__":
    typer.run(main)
