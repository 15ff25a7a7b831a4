"""Grouped experts alone (the paper's Figure 3c), kept in benchmarks/results/ with a picture.

    python -m benchmarks.hmoe --threads 2                 # a few minutes
    python -m benchmarks.hmoe --threads 1 --clock cpu     # on a busy machine

Tokens x 256 -> 64 -> 256, SwiGLU with an inner norm, routed at random. Contenders compute the same: the routed expert
of every token and the shared network, blended by the gates; agreement is checked first. Each timed run follows five
milliseconds of others that are not timed, as experts come in the middle of a click: after a pause, waking up would be a
third of ours.

    loop      the plain network: a pass an expert
    sorted    tokens sorted by expert, one product an expert and layer, w1 and w2 joined
    grouped   the same with PyTorch's grouped product, where this PyTorch has one for CPUs
    packed    as sorted, with oneDNN's packed weights
    ours      the native operation; its share of the peak is of what oneDNN reaches on a large product
    bfloat16  the native operation in bfloat16; not the same
    dense     not the same: all tokens through one expert and the shared network, what the work would cost unrouted
"""

from __future__ import annotations

import dataclasses
import io
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.decoder import timed, use_threads
from benchmarks.results import write_result
from inter2former.config import base
from inter2former.files import write_atomically
from inter2former.nn.experts import HybridExperts
from inter2former.runtime import native
from inter2former.runtime.packing import PackedLinear, packed_linear_works
from inter2former.terminal import print_rows

EXPERTS = (4, 8, 16, 32, 64)
TOKENS = (64, 256, 1024, 4096)
TOLERANCE = 1e-4


def make_experts(count: int) -> HybridExperts:
    return HybridExperts(dataclasses.replace(base(), n_experts=count)).eval().requires_grad_(False)


def sorted_experts(module: HybridExperts) -> Callable[[Tensor, Tensor], Tensor]:
    w12, b12 = torch.cat([module.w1, module.w2], 1), torch.cat([module.b1, module.b2], 1)

    return _an_expert_at_a_time(
        module,
        lambda e, rows: F.linear(rows, w12[e], b12[e]),
        lambda e, hidden: F.linear(hidden, module.w3[e], module.b3[e]),
    )


def _an_expert_at_a_time(
    module: HybridExperts, up: Callable[[int, Tensor], Tensor], down: Callable[[int, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Tokens sorted by their expert; `up` and `down` are an expert's two products, of all its tokens at once."""

    def forward(x: Tensor, edge: Tensor) -> Tensor:
        shared = module.shared(x)
        chosen, share = module.route(x)
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=len(module.w1)).cumsum(0).tolist()
        rows = x[order]
        routed = torch.empty_like(rows)
        start = 0
        for e, end in enumerate(ends):
            if end > start:
                a, b = up(e, rows[start:end]).chunk(2, -1)
                routed[start:end] = down(e, module.norm(F.silu(a) * b))
            start = end
        back = torch.empty_like(routed)
        back[order] = routed
        return torch.lerp(back, shared, share[:, None])

    return forward


def grouped_experts(module: HybridExperts) -> Callable[[Tensor, Tensor], Tensor] | None:
    """None where torch.nn.functional.grouped_mm is missing or does not run on CPUs."""
    product: Any = getattr(F, "grouped_mm", None)
    if product is None:
        return None
    w12, b12 = torch.cat([module.w1, module.w2], 1).transpose(1, 2), torch.cat([module.b1, module.b2], 1)
    w3 = module.w3.transpose(1, 2)

    def forward(x: Tensor, edge: Tensor) -> Tensor:
        shared = module.shared(x)
        chosen, share = module.route(x)
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=len(w12)).cumsum(0).to(torch.int32)
        expert = chosen[order]
        a, b = (product(x[order], w12, offs=ends) + b12[expert]).chunk(2, -1)
        routed = product(module.norm(F.silu(a) * b), w3, offs=ends) + module.b3[expert]
        back = torch.empty_like(routed)
        back[order] = routed
        return torch.lerp(back, shared, share[:, None])

    try:
        with torch.inference_mode():
            forward(torch.randn(8, w12.shape[1]), torch.ones(8, dtype=torch.bool))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        print(f"no grouped product on this CPU: {str(error).splitlines()[0]}")
        return None
    return forward


def packed_experts(module: HybridExperts) -> Callable[[Tensor, Tensor], Tensor] | None:
    """None where oneDNN's private operators are missing."""
    if not packed_linear_works():
        return None

    def layer(weight: Tensor, bias: Tensor) -> PackedLinear:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = weight, bias
        return PackedLinear(linear)

    count = len(module.w1)
    up = [layer(torch.cat([module.w1[e], module.w2[e]]), torch.cat([module.b1[e], module.b2[e]])) for e in range(count)]
    down = [layer(w, b) for w, b in zip(module.w3, module.b3, strict=True)]

    return _an_expert_at_a_time(module, lambda e, rows: up[e](rows), lambda e, hidden: down[e](hidden))


def peak(clock: Callable[[], float]) -> float:
    """Multiply-adds a second of the fastest large product at hand, the best of some."""
    x, linear = torch.randn(2048, 1024), torch.nn.Linear(1024, 1024)
    product = PackedLinear(linear) if packed_linear_works() else linear
    best = float("inf")
    with torch.inference_mode():
        for _ in range(8):
            began = clock()
            product(x)
            best = min(best, clock() - began)
    return 2048 * 1024 * 1024 / best


def dense(module: HybridExperts) -> Callable[[Tensor, Tensor], Tensor]:
    def forward(x: Tensor, edge: Tensor) -> Tensor:
        return module.shared(x) + module.expert(x, 0)

    return forward


def plot(result: dict[str, Any]) -> bytes:
    """PNG: time over that of the plain loop, by tokens, a panel an expert count."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(EXPERTS), sharey=True)
    for axes, count in zip(panels, EXPERTS, strict=True):
        rows = [row for row in result["rows"] if row["experts"] == count]
        for name in ("loop", "sorted", "ours", "dense"):
            axes.plot([row["tokens"] for row in rows], [row[f"{name}_over_loop"] for row in rows], "o-", label=name)
        axes.set(xscale="log", xticks=TOKENS, xlabel="tokens", title=f"{count} experts", ylim=(0, 1.3))
        axes.set_xticklabels(map(str, TOKENS), fontsize=7)
        axes.minorticks_off()
    panels[0].set_ylabel("time / plain loop")
    panels[0].legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    picture = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(picture)
    return picture.getvalue()


def measure(runs: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    rows = []
    fastest = peak(clock)
    generator = torch.Generator().manual_seed(0)
    for count in EXPERTS:
        torch.manual_seed(count)
        module = make_experts(count)
        contenders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "loop": module,
            "sorted": sorted_experts(module),
            "ours": native.experts(module),
            "bfloat16": native.experts(module, precision="bfloat16"),
            "dense": dense(module),
        }
        for name, forward in (("grouped", grouped_experts(module)), ("packed", packed_experts(module))):
            if forward is not None:
                contenders[name] = forward
        for n in TOKENS:
            x, edge = torch.randn(n, 256, generator=generator), torch.ones(n, dtype=torch.bool)
            with torch.inference_mode():
                want = module(x, edge)
                for name in contenders.keys() - {"loop", "bfloat16", "dense"}:
                    if not torch.allclose(contenders[name](x, edge), want, atol=TOLERANCE):
                        raise SystemExit(f"{name} does not agree with the plain network.")
                actions = {name: partial(forward, x, edge) for name, forward in contenders.items()}
                seconds = timed(actions, runs, clock, awake=True)
            row: dict[str, Any] = {"experts": count, "tokens": n}
            for name, values in seconds.items():
                row[f"{name}_ms"] = round(1000 * statistics.median(values), 3)
                ratios = np.divide(values, seconds["loop"])
                row[f"{name}_over_loop"] = round(float(np.median(ratios)), 3)
            row["ours_over_dense"] = round(float(np.median(np.divide(seconds["ours"], seconds["dense"]))), 2)
            work = 2 * n * 3 * 256 * 64 + n * 256 * (count + 1)  # multiply-adds: shared and routed network, gates
            row["ours_of_peak"] = round(work / statistics.median(seconds["ours"]) / fastest, 2)
            rows.append(row)
    return rows


def main(
    runs: int = 15,
    threads: int = 2,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this thread's own time, for one thread")] = "wall",
) -> None:
    """Time the experts and keep the ratios."""
    rows = measure(runs, use_threads(threads, clock))
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    result = {"clock": clock, "load": load, "rows": rows}
    shown = [{key: row[key] for key in row if not key.endswith("_ms")} for row in rows]
    print_rows(f"{threads} threads, {clock} time, load {load}", shown)
    path = write_result(f"hmoe_{threads}", result, threads=threads)
    write_atomically(path.with_suffix(".png"), plot(result))
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
