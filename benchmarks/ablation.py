"""What each shortcut of a click costs and brings: the paper's Table 2 and Figure 5, without training again.

    python -m benchmarks.ablation PACK --limit 10 --write

The variants change which tokens attend how, the box that the prompt is embedded in, the box that is upsampled or
whether the photo is asked about the logits, by the random walk and the outline network, and nothing else. All run the
plain PyTorch modules, one after the other on each object, so their times compare with each other; the served model
(packed, native) is the last row.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.results import write_result
from inter2former.checkpoints import STARTER, load_checkpoint
from inter2former.evaluation import Image, Mask, Pack, Target, evaluate, summarise
from inter2former.files import write_atomically
from inter2former.nn.model import Decoded, ImageEncoding, Inter2Former
from inter2former.nn.prompt_embedding import PixelBox
from inter2former.prompts import Click
from inter2former.runtime.packing import pack
from inter2former.segmenter import ModelSize, Segmenter
from inter2former.terminal import print_rows, score_progress

SHOWN = ("miou@1", "miou@3", "miou@5", "noc90")


@dataclasses.dataclass(frozen=True)
class Switches:
    """One row of the table."""

    name: str
    full_prompt: bool = False  # embed the prompt everywhere instead of in the box of what is told
    attention: str = "hybrid"  # full or bsq: that kind for every token; experts are still chosen by edge tokens
    full_upsampling: bool = False  # upsample everywhere instead of where the localisation found something
    walk: bool = True  # the random walk, and with it the choice of levels
    levels: bool = True
    outline: bool = True  # drawn by the outline network
    served: bool = False


VARIANTS = (
    Switches("Inter2Former"),
    Switches("full prompt embedding", full_prompt=True),
    Switches("full attention everywhere", attention="full"),
    Switches("BSQ attention everywhere", attention="bsq"),
    Switches("full upsampling", full_upsampling=True),
    Switches("none of the shortcuts", full_prompt=True, attention="full", full_upsampling=True),
    Switches("outlines as found", outline=False),
    Switches("cut at zero", levels=False),
    Switches("and no random walk", walk=False),
    Switches("as served", served=True),
)


class Variant(Inter2Former):
    """The plain model with switches; its weights are loaded like any other's."""

    def __init__(self, model: Inter2Former, switches: Switches) -> None:
        config = model.config
        if not switches.walk:
            config = dataclasses.replace(config, walk_trust=0.0, affinity_width=0, level_weights=())
        elif not switches.levels:
            config = dataclasses.replace(config, level_weights=())
        if not switches.outline:
            config = dataclasses.replace(config, outline_widths=())
        super().__init__(config)
        kept = self.state_dict().keys()  # what is switched off has no weights
        self.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in kept})
        self.switches = switches
        self.eval().requires_grad_(False)
        self.prompt.fix_background()
        for block in self.blocks:
            block.attention.fix_code_table()  # type: ignore[operator, union-attr]
        if switches.full_upsampling:
            self.upsampling.threshold = -torch.inf

    def prompted(self, encoding: ImageEncoding, labels: np.ndarray, box: PixelBox) -> Tensor:
        full = (0, 0, labels.shape[1], labels.shape[0])
        return super().prompted(encoding, labels, full if self.switches.full_prompt else box)

    def decode_tokens(self, encoding: ImageEncoding, x: Tensor, edge: Tensor) -> Decoded:
        h, w = encoding.tokens.shape[-2:]
        kind = self.switches.attention
        attends = edge if kind == "hybrid" else torch.full_like(edge, kind == "full")
        for block in self.blocks:
            x = x + block.attention.decode(block.norm1(x), (h, w), attends)  # type: ignore[operator, union-attr]
            x = x + block.experts(block.norm2(x), edge)  # type: ignore[operator]
        return Decoded(*self.upsampling.decode(x.t().unflatten(1, (h, w)).unsqueeze(0), encoding.edges))


def build(model: Inter2Former, switches: Switches) -> Inter2Former:
    """A model of its own: packing changes models in place."""
    variant = Variant(model, switches)
    if not switches.served:
        return variant
    plain = Inter2Former(model.config)
    plain.load_state_dict(model.state_dict())
    return pack(plain)


def run(
    model: Inter2Former,
    targets: Sequence[Target],
    variants: Sequence[Switches] = VARIANTS,
    *,
    size: ModelSize = "auto",
    clicks: int = 20,
    on_score: Any = None,
) -> list[dict[str, Any]]:
    """Click every variant through every target; a row a variant: IoU in percent, median milliseconds of a click."""
    segmenters = {v.name: Segmenter(build(model, v), model_size=size, cache_bytes=256 << 20) for v in variants}
    scores: dict[str, list[Any]] = {v.name: [] for v in variants}
    first: dict[str, list[float]] = {v.name: [] for v in variants}
    later: dict[str, list[float]] = {v.name: [] for v in variants}
    for n, target in enumerate(targets):
        turn = n % len(variants)  # nobody is always first
        for variant in (*variants[turn:], *variants[:turn]):
            name, segmenter = variant.name, segmenters[variant.name]

            def segment(image: Image, made: Sequence[Click], name: str = name, s: Segmenter = segmenter) -> Mask:
                result = s.segment(image, made)
                (first if len(made) == 1 else later)[name].append(1000 * result.timing["click"])
                return result.mask

            scores[name] += evaluate([target], segment, clicks=clicks, prepare=segmenter.prefetch)
            segmenter.clear_cache()
        if on_score is not None:
            on_score(scores[variants[0].name][-1])
    rows = []
    for variant in variants:
        mean = summarise(scores[variant.name])["mean"]
        figures = {key: mean[key] for key in SHOWN if key in mean}
        times = {
            "first_click_ms": round(statistics.median(first[variant.name]), 2),
            "click_ms": round(statistics.median(later[variant.name] or first[variant.name]), 2),
        }
        rows.append({"variant": variant.name, **figures, **times})
    return rows


def plot(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """PNG: what is reached against what a click costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    key = next(k for k in ("miou@5", "miou@3", "miou@1") if k in rows[0])
    markers = "osD^vP*X"
    for row, marker in zip(rows, markers, strict=False):
        axes.plot(row["click_ms"], row[key], marker, markersize=9, label=row["variant"])
    axes.set(xlabel="median ms of a click after the first", ylabel=f"mIoU@{key[-1]}, %", xlim=(0, None))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.margins(y=0.2)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def main(
    pack_folder: Annotated[Path, typer.Argument(metavar="PACK", help="Folder of a pack.")],
    checkpoint: Annotated[Path, typer.Option(help="Weights [starter].")] = STARTER,
    split: str = "val",
    limit: Annotated[int, typer.Option(help="Objects a source.")] = 10,
    size: Annotated[int | None, typer.Option(help="Model size T [what the checkpoint chooses].")] = None,
    clicks: int = 20,
    threads: int = 1,
    write: Annotated[bool, typer.Option(help="Keep table and picture in benchmarks/results/.")] = False,
) -> None:
    """Measure every variant and print a table."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    loaded = load_checkpoint(checkpoint)
    with Pack(pack_folder) as opened:
        refs = opened.choose(split, limit)
        with score_progress(len(refs), "ablation") as advance:
            rows = run(loaded.model, list(opened.targets(refs)), size=size or "auto", clicks=clicks, on_score=advance)
    settings = {"split": split, "limit": limit, "size": size or "auto", "clicks": clicks}
    title = (
        f"{loaded.model.config.name}, T = {settings['size']}, {limit} objects a source of {split}, {threads} threads"
    )
    print_rows(title, rows)
    if write:
        path = write_result("ablation", {"checkpoint": loaded.digest, **settings, "rows": rows}, threads=threads)
        write_atomically(path.with_suffix(".png"), plot(rows, title))
        print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
