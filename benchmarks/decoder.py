"""The decoder of a click beside those of SAM ViT-B and SAM 2.1 tiny, kept in benchmarks/results/ with a picture.

    python -m benchmarks.decoder --threads 2                 # a minute or two
    python -m benchmarks.decoder --threads 1 --clock cpu     # on a busy machine
    python -m benchmarks.decoder --size 512 --size 768 --size 1024 --size 1536 --size 2048 --runs 5     # cost by size

A click of ours is everything after the image: the click painted into the reference mask, the decoder, the mask in the
image, the reference mask after the prediction. One of SAM's is prompt encoder, mask decoder, logits brought to the
image's size, threshold; its image embedding is known, its weights are random (`transformers`).

Protocol: random weights and features. The object is a centred disc, possible foreground in the reference mask; one new
click in its middle; the part that is upsampled is the disc's box (10 % at the first click), whatever the random weights
find. Contenders take turns in one process; first it is checked that ours agrees with the plain network, and how many
pixels bfloat16 moves. From T = 1536 on there are the first click and 10 % alone, without the plain network.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
import typer

from benchmarks.results import write_result
from inter2former import reference_mask
from inter2former.bench import PAUSE_S, Action, box_of, disc, sam2_tiny, sam_vit_b, upsample_in
from inter2former.config import PRESETS
from inter2former.files import write_atomically
from inter2former.images import Frame
from inter2former.nn.model import Features, Inter2Former
from inter2former.runtime import native
from inter2former.runtime.decoder import FusedDecoder
from inter2former.terminal import print_rows

AREAS = (0.01, 0.05, 0.10, 0.25, 0.50)
FIRST_CLICK_AREA = 0.10
TOLERANCE = 1e-4  # of logits, against the plain network
LARGE = 1536  # pixels; from here on fewer rows
WAKE_S = 0.005  # of work, after which threads and clock are where a click has them

Box = tuple[int, int, int, int]
Reference = npt.NDArray[np.uint8]


def make_features(model: Inter2Former, size: int) -> Features:
    side, channels = size // 16, model.config.up_channels
    edges = [torch.randn(1, c, size // by, size // by) for c, by in zip(channels, (8, 4, 2, 1), strict=True)]
    return Features(torch.randn(1, model.config.embed_dim, side, side), edges)


def scene(size: int, area: float | None, initial: int = reference_mask.UNKNOWN) -> tuple[Reference, Box]:
    """The reference mask before the click, and the object's box in tokens. None: the first click, which finds every
    pixel at `initial`."""
    inside = disc(size, FIRST_CLICK_AREA if area is None else area)
    if area is None:
        reference = reference_mask.initial(size, initial)
    else:
        reference = np.where(
            inside, np.uint8(reference_mask.POSSIBLE_FOREGROUND), np.uint8(reference_mask.POSSIBLE_BACKGROUND)
        )
    return reference, box_of(inside)


def ours(
    decoder: FusedDecoder, encoding: Any, frame: Frame, reference: Reference, box: Box, *, trust: float = 0.0
) -> Action:
    """`trust`: of the random walk that follows, for an encoding with links; 0 for none."""
    middle = frame.size // 2
    left, top, right, bottom = (16 * side for side in box)

    def click() -> object:
        state = reference_mask.paint_clicks(reference, [(middle, middle, True)], 5)
        inside = decoder.click(encoding, state, box).inside
        if trust:
            inside = native.walk(encoding.links.numpy(), inside, box, state, trust)
        prediction = np.zeros(state.shape, np.bool_)
        np.greater(inside, 0, out=prediction[top:bottom, left:right])
        native.apply_prediction(state, prediction)
        return prediction if frame.height == frame.size else frame.mask_from_logits(torch.from_numpy(inside), box)

    return click


def ours_pytorch(model: Inter2Former, features: Features, reference: Reference, box: Box) -> Action:
    middle = reference.shape[0] // 2

    def click() -> object:
        state = reference_mask.paint_clicks(reference, [(middle, middle, True)], 5)
        upsample_in(model, box)
        logits = model.decode(features, state).logits
        return reference_mask.apply_prediction(state, (logits > 0).numpy())

    return click


def check_agreement(model: Inter2Former, decoder: FusedDecoder, features: Features) -> float:
    """Largest difference of a logit from the plain network's; raises when it is above TOLERANCE."""
    worst = 0.0
    for area in (None, FIRST_CLICK_AREA):
        reference, box = scene(features.tokens.shape[-1] * 16, area)
        upsample_in(model, box)
        left, top, right, bottom = (16 * side for side in box)
        want = model.decode(features, reference).logits.numpy()[top:bottom, left:right]
        worst = max(worst, float(np.abs(decoder.click(features, reference, box).inside - want).max()))
    if not worst <= TOLERANCE:
        raise SystemExit(f"The fused decoder is {worst:g} away from the plain network.")
    return worst


def tokens_of(reference: Reference, box: Box, size: int) -> dict[str, int]:
    """Tokens with full attention, and tokens that are upsampled."""
    edge = native.edge_tokens(reference, (0, 0, size, size))
    left, top, right, bottom = box
    return {"edge_tokens": int(edge.sum()), "object_tokens": (right - left) * (bottom - top)}


def use_threads(threads: int, clock: str) -> Callable[[], float]:
    """Give every library that many threads; returns the clock to time with, seconds.

    clock   wall, or cpu: this thread's own time
    raises  SystemExit for another clock, or cpu with more than one thread
    """
    if clock not in ("wall", "cpu") or (clock == "cpu" and threads != 1):
        raise SystemExit("--clock is wall or cpu; cpu counts one thread only, so give --threads 1.")
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    native.set_threads(threads)
    return time.perf_counter if clock == "wall" else time.thread_time


def random_model(preset: str, size: int) -> tuple[Inter2Former, Features, Any]:
    """A model with random weights, the features of an image for it, and the native module; SystemExit without one."""
    torch.manual_seed(0)
    model = Inter2Former(PRESETS[preset]()).eval()
    compiled = native.module()
    if compiled is None:
        raise SystemExit("The native module is not there.")
    return model, make_features(model, size), compiled


def timed(
    actions: dict[str, Action], runs: int, clock: Callable[[], float], *, awake: bool = False
) -> dict[str, list[float]]:
    """Seconds of each, a run each; contenders take turns, after one turn that is not counted.

    awake  each run follows others at once, for WAKE_S, which are not counted: for what comes in the middle of a click
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(runs + 1):
        for name, action in actions.items():
            time.sleep(PAUSE_S)
            if awake:
                action()
                waking = time.perf_counter() + WAKE_S
                while time.perf_counter() < waking:
                    action()
            began = clock()
            action()
            if index > 0:
                seconds[name].append(clock() - began)
    return seconds


def plot(result: dict[str, Any]) -> bytes:
    """PNG: clicks by the object's area in units of SAM's, and our time by what a click has to look at."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    by_area, by_tokens = figure.subplots(1, 2)
    smallest = min(row["size"] for row in result["rows"])
    for contender in sorted({row["contender"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["contender"] == contender]
        line = [row for row in rows if row["what"] == "click" and row["size"] == smallest]
        by_area.plot([100 * r["area"] for r in line], [1 / r["sam_over_this"] for r in line], "o-", label=contender)
        if contender in ("ours", "ours_bfloat16"):
            seen = sorted((r["edge_tokens"] + r["object_tokens"], r["median_ms"], r["size"]) for r in rows)
            by_tokens.plot([n for n, _, _ in seen], [ms for _, ms, _ in seen], "o", label=contender)
    by_area.axhline(1.0, color="grey", linewidth=0.8)
    by_area.set(xlabel="object, % of the picture", ylabel="clicks of SAM ViT-B's decoder", ylim=(0, None))
    by_area.set_title(f"T = {smallest}", fontsize=9)
    by_area.legend(frameon=False, fontsize=8)
    by_tokens.set(xlabel="edge tokens + upsampled tokens", ylabel="ms a click", xscale="log", yscale="log")
    by_tokens.set_title("T = " + ", ".join(str(n) for n in sorted({r["size"] for r in result["rows"]})), fontsize=9)
    by_tokens.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(picture)
    return picture.getvalue()


def measure(
    preset: str,
    size: int,
    runs: int,
    clock: Callable[[], float],
    others: dict[str, Action],
    twin: bool,
) -> dict[str, Any]:
    model, features, compiled = random_model(preset, size)
    decoder = FusedDecoder(model, compiled)
    rounding = FusedDecoder(model, compiled, precision="bfloat16")
    encoding = decoder.compact(features)
    large = size >= LARGE
    difference = None if large else check_agreement(model, decoder, features)
    frame = Frame(size, size, size, model.config.input_convention)
    rows = []
    moved = []
    for area in (None, 0.10) if large else (None, *AREAS):
        reference, box = scene(size, area, model.config.initial_reference)
        exact, near = (one.click(encoding, reference, box).inside > 0 for one in (decoder, rounding))
        moved.append(float((exact != near).mean()))
        actions = {
            **others,
            "ours": ours(decoder, encoding, frame, reference, box),
            "ours_bfloat16": ours(rounding, encoding, frame, reference, box),
        }
        if twin and not large:
            actions["ours_pytorch"] = ours_pytorch(model, features, reference, box)
        seconds = timed(actions, runs, clock)
        for name, values in seconds.items():
            if name == "sam_vit_b":
                continue
            ratios = [sam / value for sam, value in zip(seconds["sam_vit_b"], values, strict=True)]
            rows.append(
                {
                    "what": "first_click" if area is None else "click",
                    "preset": preset,
                    "size": size,
                    "area": area,
                    "contender": name,
                    **tokens_of(reference, box, size),
                    "median_ms": round(1000 * statistics.median(values), 2),
                    "sam_ms": round(1000 * statistics.median(seconds["sam_vit_b"]), 2),
                    "sam_over_this": round(statistics.median(ratios), 2),
                    "runs": runs,
                }
            )
    return {
        "rows": rows,
        "largest_logit_difference": difference,
        "pixels_moved_by_bfloat16": max(moved),
        "encoded_image_bytes": encoding.nbytes,
    }


def main(
    preset: str = "base",
    size: Annotated[list[int] | None, typer.Option(help="Model sizes [1024]; may be repeated.")] = None,
    runs: int = 11,
    threads: int = 2,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this thread's own time, for one thread")] = "wall",
    twin: Annotated[bool, typer.Option(help="Time the plain network too.")] = True,
) -> None:
    """Time clicks beside SAM's and keep the ratios."""
    now = use_threads(threads, clock)
    kind: Literal["wall", "cpu"] = "wall" if clock == "wall" else "cpu"
    others = {"sam_vit_b": sam_vit_b(), "sam2_tiny": sam2_tiny()}
    parts = {str(T): measure(preset, T, runs, now, others, twin) for T in size or [1024]}
    rows = [row for part in parts.values() for row in part.pop("rows")]
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    result = {"clock": kind, "load": load, "rows": rows, "sizes": parts}
    print_rows(f"{threads} threads, {kind} time, load {load}", rows)
    name = f"decoder_{preset}_{threads}" + ("_sizes" if len(parts) > 1 else "")
    path = write_result(name, result, threads=threads)
    write_atomically(path.with_suffix(".png"), plot(result))
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
