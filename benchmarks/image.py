"""What an image costs once, and twenty clicks with it (20-SPC), beside SAM ViT-B; kept in benchmarks/results/.

    python -m benchmarks.image --threads 2                                    # base at T = 1024: a few minutes
    python -m benchmarks.image --preset tiny --size 256 --layers 1 --runs 1   # does it run at all

Rows, in both precisions where the CPU multiplies bfloat16: our encoder with the edge features (packed, as served; and
with the links of the random walk for a preset that walks, as its clicks do), Canny and CannyNet alone; SAM ViT-B's
encoder; then a session: encode once and click twenty times on an object of 10 %. A preset with a coarse size is encoded
and clicked at both, as it is served. Weights are random, contenders take turns. The small model's cold first mask and
later click are given in clicks of SAM's decoder.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.decoder import ours, scene, timed, use_threads
from benchmarks.results import write_result
from inter2former import random_walk, refinement
from inter2former.bench import Action, disc, picture, sam_vit_b
from inter2former.config import PRESETS
from inter2former.images import Frame
from inter2former.nn.affinity import WIDTH
from inter2former.nn.canny import canny
from inter2former.nn.model import Inter2Former
from inter2former.nn.outline import WIDTHS
from inter2former.runtime import native
from inter2former.runtime.decoder import FusedDecoder
from inter2former.runtime.memory import keep_freed_memory
from inter2former.runtime.outline import NativeOutline
from inter2former.runtime.packing import pack
from inter2former.terminal import print_rows

CLICKS = 20
AREA = 0.10


def sam_encoder(layers: int) -> Action:
    """SAM ViT-B's image encoder at 1024 pixels, or its first layers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import SamVisionConfig, SamVisionModel

    wide = [index for index in (2, 5, 8, 11) if index < layers]
    model: Any = SamVisionModel(SamVisionConfig(num_hidden_layers=layers, global_attn_indexes=wide))
    model.eval()
    pixels = torch.randn(1, 3, 1024, 1024)

    def encode() -> object:
        with torch.inference_mode():
            return model(pixels)

    return encode


def our_actions(preset: str, size: int, precision: native.Precision = "float32") -> dict[str, Action]:
    """encode, edges, click (10 %, at the object's box) and first_click; agreement with the plain encoder is checked."""
    torch.manual_seed(0)
    config = PRESETS[preset]()
    if config.walk_trust:  # as the starter has them
        config = dataclasses.replace(config, affinity_width=WIDTH, outline_widths=WIDTHS)
    plain = Inter2Former(config).eval()
    packed = pack(copy.deepcopy(plain), precision)
    frame = Frame(size, size, size, plain.config.input_convention)
    image = frame.prepare(picture(size, 7))
    small = Frame(256, 256, 256, plain.config.input_convention).prepare(picture(256, 7))
    want = plain.encode(small).tokens[0].permute(1, 2, 0)
    off = (packed.encode(small).tokens - want).norm() / want.norm()
    assert off < (1e-4 if precision == "float32" else 3e-2), f"the packed encoder is {off:.1g} off"
    trust = plain.config.walk_trust
    # Where masks are found; their outlines are drawn at T.
    found_at = min(size, plain.config.coarse_size or size)
    coarse = Frame(size, size, found_at, plain.config.input_convention)
    coarse_image = coarse.prepare(picture(size, 7))

    def encode() -> Any:
        encoding: Any = packed.encode(coarse_image)
        if not trust:
            return encoding
        return encoding._replace(
            links=torch.from_numpy(random_walk.within(encoding.links.numpy(), coarse.valid, found_at))
        )

    encoding = encode()
    compiled = native.module()
    if compiled is None:
        raise SystemExit("The native module is not there.")
    decoder = FusedDecoder(plain, compiled, precision=precision)
    pixels = image.unsqueeze(0)

    def edges() -> object:
        with torch.inference_mode():
            return packed.canny_net(canny(pixels), pixels)

    def click(area: float | None) -> Action:
        found = ours(decoder, encoding, coarse, *scene(found_at, area, plain.config.initial_reference), trust=trust)
        if packed.outline is None:
            return found
        drawn = redrawing(packed, coarse, frame)
        return lambda: (found(), drawn())

    return {"encode": encode, "edges": edges, "click": click(AREA), "first_click": click(None)}


def redrawing(packed: Inter2Former, coarse: Frame, frame: Frame) -> Action:
    """What follows a click: the outline of the object is drawn in the picture."""
    box = scene(coarse.size, AREA)[1]
    left, top, right, bottom = (16 * side for side in box)
    inside = np.where(disc(coarse.size, AREA), np.float32(3), np.float32(-3))[top:bottom, left:right].copy()
    seen = frame.picture(picture(frame.size, 7))
    middle = frame.size // 2
    draw: Any = packed.draw
    assert isinstance(draw, NativeOutline)  # where the native module is

    def redraw() -> object:
        spread = refinement.spread(inside, box, coarse, frame)
        assert spread is not None
        view = refinement.view(spread, spread, seen, [(middle, middle, True)])
        logits, _ = draw.drawn(view)
        return frame.mask_from_logits(torch.from_numpy(logits), view.box)

    return redraw


def medians(actions: dict[str, Action], runs: int, clock: Callable[[], float]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in timed(actions, runs, clock).items()}


def main(
    preset: str = "base",
    size: int = 1024,
    runs: int = 3,
    threads: int = 2,
    layers: Annotated[int, typer.Option(help="Of SAM's encoder; fewer for a trial.")] = 12,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this thread's own time, for one thread")] = "wall",
) -> None:
    """Time encoders and sessions and keep the ratios."""
    now = use_threads(threads, clock)
    keep_freed_memory()  # as servers do; all contenders live with it
    sam_click = sam_vit_b()
    auto = native.choose_precision("auto")
    precisions: list[native.Precision] = ["float32"] if auto == "float32" else ["float32", auto]

    def all_of_ours(preset: str) -> dict[str, Action]:
        return {
            f"{precision}_{name}": action
            for precision in precisions
            for name, action in our_actions(preset, size, precision).items()
        }

    seconds = medians({"sam_encode": sam_encoder(layers), "sam_click": sam_click, **all_of_ours(preset)}, runs, now)
    quick = {"sam_click": sam_click, **all_of_ours("small" if preset == "base" else preset)}
    small = medians(quick, 3 * runs, now)

    sam_session = seconds["sam_encode"] + CLICKS * seconds["sam_click"]
    summary = {
        precision: {
            "session20_over_sam": round(
                (seconds[f"{precision}_encode"] + CLICKS * seconds[f"{precision}_click"]) / sam_session, 3
            ),
            "encode_over_sam": round(seconds[f"{precision}_encode"] / seconds["sam_encode"], 3),
            "small_cold_first_mask_in_sam_clicks": round(
                (small[f"{precision}_encode"] + small[f"{precision}_first_click"]) / small["sam_click"], 2
            ),
            "small_click_in_sam_clicks": round(small[f"{precision}_click"] / small["sam_click"], 2),
        }
        for precision in precisions
    }
    rows = [{"what": name, "median_ms": round(1000 * value, 2)} for name, value in seconds.items()]
    rows += [{"what": f"small_{name}", "median_ms": round(1000 * value, 2)} for name, value in small.items()]
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    print_rows(f"{preset}, T = {size}, {threads} threads, {clock} time, load {load}", rows)
    for precision, ratios in summary.items():
        for name, ratio in ratios.items():
            print(f"{precision:10} {name:40} {ratio}")
    result = {
        "clock": clock,
        "load": load,
        "preset": preset,
        "size": size,
        "sam_layers": layers,
        **summary,
        "rows": rows,
    }
    print(f"wrote {write_result(f'image_{preset}_{threads}', result, threads=threads)}")


if __name__ == "__main__":
    typer.run(main)
