"""The decoder of a click beside that of SAM ViT-B, kept in benchmarks/results/.

    python -m benchmarks.decoder --threads 2                 # a minute or two
    python -m benchmarks.decoder --threads 1 --clock cpu     # on a busy machine

A click of ours is everything after the image: the click painted into the reference mask, the decoder, the mask in the
image, the reference mask after the prediction. One of SAM's is prompt encoder, mask decoder, logits brought to the
image's size, threshold; its image embedding is known, its weights are random (`transformers`).

Protocol: random weights and features. The object is a centred disc, possible foreground in the reference mask; one new
click in its middle; the part that is upsampled is the disc's box (10 % at the first click), whatever the random weights
find. Contenders take turns in one process; first it is checked that ours agrees with the plain network.
"""

from __future__ import annotations

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
from torch.nn import functional as F

from benchmarks.results import write_result
from inter2former import reference_mask
from inter2former.bench import disc
from inter2former.config import PRESETS
from inter2former.images import Frame
from inter2former.nn.model import Features, Inter2Former
from inter2former.runtime import native
from inter2former.runtime.decoder import FusedDecoder
from inter2former.terminal import print_rows

AREAS = (0.01, 0.05, 0.10, 0.25, 0.50)
FIRST_CLICK_AREA = 0.10
TOLERANCE = 1e-4  # of logits, against the plain network

Box = tuple[int, int, int, int]
Reference = npt.NDArray[np.uint8]
Action = Callable[[], object]


def sam_vit_b() -> Action:
    """One click on a known embedding; of the image encoder only a layer is made, and not used."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded from anywhere
    from transformers import SamConfig, SamModel

    config = SamConfig(vision_config={"num_hidden_layers": 1, "global_attn_indexes": [0]})
    model: Any = SamModel(config)
    model.eval()
    embedding = torch.randn(1, 256, 64, 64)
    points, labels = torch.full((1, 1, 1, 2), 512.0), torch.ones(1, 1, 1, dtype=torch.int)

    def click() -> object:
        with torch.inference_mode():
            low = model(
                image_embeddings=embedding, input_points=points, input_labels=labels, multimask_output=False
            ).pred_masks
            return F.interpolate(low[0], (1024, 1024), mode="bilinear", align_corners=False) > 0

    return click


def make_features(model: Inter2Former, size: int) -> Features:
    side, channels = size // 16, model.config.up_channels
    edges = [torch.randn(1, c, size // by, size // by) for c, by in zip(channels, (8, 4, 2, 1), strict=True)]
    return Features(torch.randn(1, model.config.embed_dim, side, side), edges)


def scene(size: int, area: float | None) -> tuple[Reference, Box]:
    """The reference mask before the click, and the object's box in tokens. None: the first click."""
    inside = disc(size, FIRST_CLICK_AREA if area is None else area)
    tokens = np.argwhere(inside.reshape(size // 16, 16, size // 16, 16).any((1, 3)))
    (top, left), (bottom, right) = tokens.min(0), tokens.max(0) + 1
    if area is None:
        reference = reference_mask.initial(size)
    else:
        reference = np.where(
            inside, np.uint8(reference_mask.POSSIBLE_FOREGROUND), np.uint8(reference_mask.POSSIBLE_BACKGROUND)
        )
    return reference, (int(left), int(top), int(right), int(bottom))


def ours(decoder: FusedDecoder, encoding: Any, frame: Frame, reference: Reference, box: Box) -> Action:
    middle = frame.size // 2
    left, top, right, bottom = (16 * side for side in box)

    def click() -> object:
        state = reference_mask.paint_clicks(reference, [(middle, middle, True)], 5)
        inside = decoder.click(encoding, state, box).inside
        prediction = np.zeros(state.shape, np.bool_)
        np.greater(inside, 0, out=prediction[top:bottom, left:right])
        native.apply_prediction(state, prediction)
        return prediction if frame.height == frame.size else frame.mask_from_logits(torch.from_numpy(inside))

    return click


def ours_pytorch(model: Inter2Former, features: Features, reference: Reference, box: Box) -> Action:
    middle = reference.shape[0] // 2

    def click() -> object:
        state = reference_mask.paint_clicks(reference, [(middle, middle, True)], 5)
        model.upsampling.box = lambda low: box  # type: ignore[method-assign]
        logits = model.decode(features, state).logits
        return reference_mask.apply_prediction(state, (logits > 0).numpy())

    return click


def check_agreement(model: Inter2Former, decoder: FusedDecoder, features: Features) -> float:
    """Largest difference of a logit from the plain network's; raises when it is above TOLERANCE."""
    worst = 0.0
    for area in (None, FIRST_CLICK_AREA):
        reference, box = scene(features.tokens.shape[-1] * 16, area)
        model.upsampling.box = lambda low, box=box: box  # type: ignore[method-assign, misc]
        left, top, right, bottom = (16 * side for side in box)
        want = model.decode(features, reference).logits.numpy()[top:bottom, left:right]
        worst = max(worst, float(np.abs(decoder.click(features, reference, box).inside - want).max()))
    if not worst <= TOLERANCE:
        raise SystemExit(f"The fused decoder is {worst:g} away from the plain network.")
    return worst


def measure(
    preset: str, size: int, areas: tuple[float, ...], runs: int, clock: Callable[[], float], sam: Action, twin: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Inter2Former(PRESETS[preset]()).eval()
    features = make_features(model, size)
    compiled = native.module()
    if compiled is None:
        raise SystemExit("The native module is not there.")
    decoder = FusedDecoder(model, compiled)
    encoding = decoder.compact(features)
    difference = check_agreement(model, decoder, features)
    frame = Frame(size, size, size, model.config.input_convention)
    rows = []
    for area in (None, *areas):
        reference, box = scene(size, area)
        actions = {"sam_vit_b": sam, "ours": ours(decoder, encoding, frame, reference, box)}
        if twin:
            actions["ours_pytorch"] = ours_pytorch(model, features, reference, box)
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for index in range(runs + 1):
            for name, action in actions.items():
                began = clock()
                action()
                if index > 0:
                    seconds[name].append(clock() - began)
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
                    "median_ms": round(1000 * statistics.median(values), 2),
                    "sam_ms": round(1000 * statistics.median(seconds["sam_vit_b"]), 2),
                    "sam_over_this": round(statistics.median(ratios), 2),
                    "runs": runs,
                }
            )
    return {"rows": rows, "largest_logit_difference": difference, "encoded_image_bytes": encoding.nbytes}


def main(
    preset: str = "base",
    size: Annotated[list[int] | None, typer.Option(help="Model sizes [1024]; may be repeated.")] = None,
    runs: int = 11,
    threads: int = 2,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this thread's own time, for one thread")] = "wall",
    twin: Annotated[bool, typer.Option(help="Time the plain network too.")] = True,
) -> None:
    """Time clicks beside SAM's and keep the ratios."""
    if clock not in ("wall", "cpu") or (clock == "cpu" and threads != 1):
        raise SystemExit("--clock is wall or cpu; cpu counts one thread only, so give --threads 1.")
    kind: Literal["wall", "cpu"] = "wall" if clock == "wall" else "cpu"
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    native.set_threads(threads)
    now = time.perf_counter if kind == "wall" else time.thread_time
    sam = sam_vit_b()
    parts = {str(T): measure(preset, T, AREAS, runs, now, sam, twin) for T in size or [1024]}
    rows = [row for part in parts.values() for row in part.pop("rows")]
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    result = {"clock": kind, "load": load, "rows": rows, "sizes": parts}
    print_rows(f"{threads} threads, {kind} time, load {load}", rows)
    print(f"wrote {write_result(f'decoder_{preset}_{threads}', result, threads=threads)}")


if __name__ == "__main__":
    typer.run(main)
