"""The sparse parts of a click one by one (the paper's Figure 3 a, b and d; c is hmoe.py), kept with a picture.

    python -m benchmarks.parts --threads 2                 # two minutes
    python -m benchmarks.parts --threads 1 --clock cpu     # on a busy machine

Each panel changes one share and holds the rest as small as it can be, so that the slope is what that part costs:

    prompt      the share of the picture in the box where something is told: dynamic prompt embedding (a)
    attention   the share of tokens with full attention; the others attend through binary codes (b)
    upsampling  the share of the picture in the box that is upsampled (d)

Contenders: `ours`; `ours_pytorch`, the same work by the plain network; `dense`, the plain network without that
shortcut, which does the part for the whole picture whatever the share. For attention also `codes`, without full
attention at all. Random weights and features; first it is checked that ours agrees with the plain network, then
contenders take turns.
"""

from __future__ import annotations

import io
import os
import statistics
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from benchmarks.ablation import Switches, Variant
from benchmarks.decoder import check_agreement, random_model, timed, use_threads
from benchmarks.results import write_result
from inter2former import reference_mask
from inter2former.bench import Action, upsample_in
from inter2former.files import write_atomically
from inter2former.nn.model import Features, Inter2Former
from inter2former.nn.upsampling import TokenBox
from inter2former.runtime import native
from inter2former.runtime.decoder import FusedDecoder
from inter2former.terminal import print_rows

PARTS = ("prompt", "attention", "upsampling")
SHARES = (0.02, 0.10, 0.25, 0.50, 1.0)
DENSE = {
    "prompt": {"dense": Switches("dense", full_prompt=True)},
    "attention": {"dense": Switches("dense", attention="full"), "codes": Switches("codes", attention="bsq")},
    "upsampling": {"dense": Switches("dense", full_upsampling=True)},
}

Reference = npt.NDArray[np.uint8]


def square(size: int, share: float) -> TokenBox:
    """A box of about that share of the tokens, from the middle outwards."""
    tokens = size // 16
    side = max(1, round(tokens * share**0.5))
    first = (tokens - side) // 2
    return first, first, first + side, first + side


def scene(part: str, size: int, share: float) -> tuple[Reference, TokenBox]:
    """The reference mask and the box that is upsampled."""
    reference = reference_mask.initial(size, reference_mask.POSSIBLE_BACKGROUND)
    middle = size // 2
    reference = reference_mask.paint_clicks(reference, [(middle, middle, True)], 5)
    left, top, right, bottom = square(size, share)
    if part == "prompt":  # a frame of points, so that the box is large and little of it an edge
        for row in np.linspace(16 * top + 24, 16 * bottom - 25, 4).astype(int):
            for column in np.linspace(16 * left + 24, 16 * right - 25, 4).astype(int):
                reference = reference_mask.paint_clicks(reference, [(int(row), int(column), True)], 5)
    elif part == "attention":
        reference[16 * top : 16 * bottom, 16 * left : 16 * right] = reference_mask.UNKNOWN
    return reference, (left, top, right, bottom) if part == "upsampling" else square(size, SHARES[0])


def native_click(decoder: FusedDecoder, encoding: Any, reference: Reference, box: TokenBox) -> Action:
    return lambda: decoder.click(encoding, reference, box)


def plain_click(model: Inter2Former, features: Features, reference: Reference, box: TokenBox | None) -> Action:
    def click() -> object:
        upsample_in(model, box)
        return model.decode(features, reference)

    return click


def measure(preset: str, size: int, runs: int, clock: Any, shares: Sequence[float]) -> list[dict[str, Any]]:
    model, features, compiled = random_model(preset, size)
    decoder = FusedDecoder(model, compiled)
    encoding = decoder.compact(features)
    check_agreement(model, decoder, features)
    plain = Variant(model, Switches("plain"))
    rows = []
    for part in PARTS:
        dense = {name: Variant(model, switches) for name, switches in DENSE[part].items()}
        for share in shares:
            reference, box = scene(part, size, share)
            actions = {
                "ours": native_click(decoder, encoding, reference, box),
                "ours_pytorch": plain_click(plain, features, reference, box),
            }
            for name, variant in dense.items():
                actions[name] = plain_click(variant, features, reference, None if part == "upsampling" else box)
            for name, values in timed(actions, runs, clock).items():
                rows.append(
                    {
                        "part": part,
                        "share": share,
                        "contender": name,
                        "edge_tokens": int(native.edge_tokens(reference, (0, 0, size, size)).sum()),
                        "median_ms": round(1000 * statistics.median(values), 2),
                    }
                )
    return rows


def plot(result: dict[str, Any]) -> bytes:
    """PNG: time of a click by share, a panel a part."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(PARTS), sharey=True)
    labels = ("of the picture in the prompt's box", "of the tokens with full attention", "of the picture upsampled")
    for axes, part, label, letter in zip(panels, PARTS, labels, "abd", strict=True):
        rows = [row for row in result["rows"] if row["part"] == part]
        for name in dict.fromkeys(row["contender"] for row in rows):
            line = [row for row in rows if row["contender"] == name]
            axes.plot([100 * row["share"] for row in line], [row["median_ms"] for row in line], "o-", label=name)
        axes.set(xlabel=f"% {label}", yscale="log", title=f"({letter}) {part}")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("ms a click")
    picture = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(picture)
    return picture.getvalue()


def main(
    preset: str = "base",
    size: int = 1024,
    runs: int = 5,
    threads: int = 2,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this thread's own time, for one thread")] = "wall",
) -> None:
    """Time the parts and keep the figures."""
    rows = measure(preset, size, runs, use_threads(threads, clock), SHARES)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    print_rows(f"{preset}, T = {size}, {threads} threads, {clock} time, load {load}", rows)
    result = {"clock": clock, "load": load, "preset": preset, "size": size, "rows": rows}
    path = write_result(f"parts_{preset}_{threads}", result, threads=threads)
    write_atomically(path.with_suffix(".png"), plot(result))
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
