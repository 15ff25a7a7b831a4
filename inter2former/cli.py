"""The command line: inter2former segment | evaluate | bench | convert | info.

Reads arguments and files, asks the core, writes results. Standard output carries the answer (with --json one object,
its fields stable), standard error everything else. Exit status: 0 done, 1 it could not be done, 2 wrong arguments
(and a shell's 130 after Ctrl-C).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import torch
import typer

from inter2former import bench as benchmark
from inter2former import evaluation, masks
from inter2former.checkpoints import STARTER, convert_released, load_checkpoint
from inter2former.config import PRESETS
from inter2former.errors import ImageError, Inter2FormerError, PromptError
from inter2former.files import write_atomically
from inter2former.images import as_rgb
from inter2former.prompts import Box, Click
from inter2former.runtime import native
from inter2former.runtime.memory import keep_freed_memory
from inter2former.segmenter import ModelSize, Segmentation, load_segmenter
from inter2former.terminal import print_rows, print_scores, score_progress

app = typer.Typer(
    name="inter2former",
    help="Interactive segmentation on a CPU: clicks on a photo become a mask.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130

# typer brings its own copy of click or uses the installed one, depending on its version; its public exception tells.
_WRONG_ARGUMENTS: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


# -- arguments -------------------------------------------------------------------------------------------------------


def _numbers(text: str, count: int, form: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count:
        raise typer.BadParameter(f"{text!r} is not of the form {form}.")
    return values


def parse_click(text: str) -> Click:
    """ "X,Y", "X,Y,+" (on the object) or "X,Y,-" (off it), in image pixels."""
    form = "X,Y or X,Y,+ or X,Y,-"
    body, comma, sign = text.rpartition(",")
    if comma and sign.strip() in ("+", "-"):
        text, positive = body, sign.strip() == "+"
    else:
        positive = True
    x, y = _numbers(text, 2, form)
    try:
        return Click(x, y, positive)
    except PromptError as error:
        raise typer.BadParameter(str(error)) from error


def parse_box(text: str) -> Box:
    """ "X0,Y0,X1,Y1", two opposite corners in image pixels."""
    try:
        return Box(*_numbers(text, 4, "X0,Y0,X1,Y1"))
    except PromptError as error:
        raise typer.BadParameter(str(error)) from error


def parse_model_size(text: str) -> ModelSize:
    """ "auto" or a whole number."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not 'auto' or a multiple of 256.") from error


def _parse_list(text: str | None, kind: type[int] | type[float]) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 1,2.") from error


CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="FILE", help="A .safetensors checkpoint [starter weights].")
]
ModelSizeOption = Annotated[
    str, typer.Option("--model-size", metavar="N|auto", help="Side of the model's frame, a multiple of 256.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Compute threads [all cores].")]
PrecisionOption = Annotated[
    Literal["float32", "bfloat16", "auto"],
    typer.Option("--precision", help="Of a click's large products; auto: bfloat16 where the CPU has it."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}.") from error


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, allow_nan=False))


# -- commands --------------------------------------------------------------------------------------------------------


@app.command()
def segment(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="JPEG, PNG, WebP, BMP, TIFF or GIF.")],
    click: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y[,+|-]", help="Image pixels; + on the object (default), - off it. In order."),
    ] = None,
    box: Annotated[str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Around the object, image pixels.")] = None,
    initial_mask: Annotated[Path | None, typer.Option(metavar="PNG", help="A mask to correct.")] = None,
    checkpoint: CheckpointOption = None,
    model_size: ModelSizeOption = "auto",
    threads: ThreadsOption = None,
    precision: PrecisionOption = "float32",
    out: Annotated[Path | None, typer.Option(metavar="PNG", help="Write the mask, 0 and 255.")] = None,
    overlay: Annotated[Path | None, typer.Option(metavar="PNG", help="Write the photo with mask and clicks.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Segment the object under the clicks."""
    if not (out or overlay or as_json):
        raise typer.BadParameter("Nothing to write: give --out, --overlay or --json.")
    clicks = [parse_click(text) for text in click or []]
    frame = parse_box(box) if box is not None else None
    size = parse_model_size(model_size)
    pixels = as_rgb(_read(image))
    start = masks.png_to_mask(_read(initial_mask)) if initial_mask is not None else None
    segmenter = load_segmenter(checkpoint, model_size=size, threads=threads, precision=precision)
    result = segmenter.segment(pixels, clicks, box=frame, initial_mask=start)
    if out is not None:
        write_atomically(out, masks.mask_to_png(result.mask))
    if overlay is not None:
        write_atomically(overlay, masks.rgb_to_png(masks.overlay(pixels, result.mask, clicks, frame)))
    if as_json:
        _print_json(_segmentation_json(result))
        return
    height, width = result.mask.shape
    stages = ", ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in result.timing.items() if seconds > 0)
    print(f"{width} x {height} pixels, {100 * result.mask.mean():.1f} % inside, expected IoU {result.score:.2f}")
    print(stages)
    for path in (out, overlay):
        if path is not None:
            print(f"wrote {path}")


def _segmentation_json(result: Segmentation) -> dict[str, Any]:
    height, width = result.mask.shape
    return {
        "width": width,
        "height": height,
        "score": result.score,
        "clicks": [{"x": click.x, "y": click.y, "positive": click.positive} for click in result.clicks],
        "rle": masks.rle_encode(result.mask),
        "timing": result.timing,
    }


@app.command()
def evaluate(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="Folder of a pack: index.json and zip shards.")],
    split: Annotated[str, typer.Option(help="Split of the pack.")] = "val",
    limit: Annotated[int, typer.Option(min=1, help="Objects a source.")] = 20,
    clicks: Annotated[int, typer.Option(min=1, help="Simulated clicks an object.")] = evaluation.MAX_CLICKS,
    checkpoint: CheckpointOption = None,
    model_size: ModelSizeOption = "auto",
    threads: ThreadsOption = None,
    precision: PrecisionOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Measure mIoU@k and NoC with simulated clicks; IoU in percent."""
    size = parse_model_size(model_size)
    segmenter = load_segmenter(checkpoint, model_size=size, threads=threads, precision=precision)
    with evaluation.Pack(pack) as opened:
        refs = opened.choose(split, limit)
        with score_progress(len(refs), "evaluate") as advance:
            scores = evaluation.evaluate(
                opened.targets(refs),
                lambda image, made: segmenter.segment(image, made).mask,
                clicks=clicks,
                prepare=segmenter.prefetch,
                predict=lambda image, made: segmenter.segment(image, made).score,
                on_score=advance,
            )
    summary = evaluation.summarise(scores)
    summary["config"] = {
        "split": split,
        "limit": limit,
        "clicks": clicks,
        "model_size": size,
        "threads": torch.get_num_threads(),
        "checkpoint": segmenter.digest,
        "model": json.loads(segmenter.config.to_json()),
        "version": benchmark.version("inter2former"),
    }
    if as_json:
        _print_json(summary)
    else:
        print_scores(summary)


@app.command()
def bench(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}; random weights.")] = "small",
    sizes: Annotated[str | None, typer.Option(metavar="N,...", help="Model sizes [the preset's smallest].")] = None,
    areas: Annotated[
        str, typer.Option(metavar="A,...", help="Object areas, shares of the picture.")
    ] = "0.01,0.05,0.1,0.25,0.5",
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each row.")] = 5,
    checkpoint: CheckpointOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time the stages on this machine; milliseconds."""
    size_list, area_list = _parse_list(sizes, int), _parse_list(areas, float)
    if threads is not None:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
    loaded = load_checkpoint(checkpoint) if checkpoint is not None else None
    result = benchmark.run(
        preset if loaded is None else loaded.model.config.name,
        size_list,
        area_list or (),
        runs=runs,
        model=None if loaded is None else loaded.model,
        on_row=lambda row: print(f"{row['what']} {row['contender']}: {row['median_ms']} ms", file=sys.stderr),
    )
    if as_json:
        _print_json(result)
    else:
        print_rows(f"{result['machine']['cpu']}, {result['threads']} threads", result["rows"])


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="RELEASED.pth", help="The released checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="Where to write ours.")],
    edge_rule: Annotated[
        Literal["exact", "released"],
        typer.Option(help="exact: the paper's Eq. 4; released: what its float32 test amounts to."),
    ] = "exact",
    as_json: JsonOption = False,
) -> None:
    """Convert a released checkpoint; every key must be known and fit."""
    digest = convert_released(source, target, edge_rule)
    if as_json:
        _print_json({"out": str(target), "sha256": digest, "edge_rule": edge_rule})
    else:
        print(f"wrote {target}, SHA-256 {digest}")


@app.command()
def info(checkpoint: CheckpointOption = None, as_json: JsonOption = False) -> None:
    """Show versions, native module and checkpoint."""
    path = STARTER if checkpoint is None else checkpoint
    loaded = load_checkpoint(path)
    content = {
        "version": benchmark.version("inter2former"),
        "native": dataclasses.asdict(native.status()),
        "torch": torch.__version__,
        "machine": benchmark.machine(),
        "checkpoint": {
            "file": str(path),
            "sha256": loaded.digest,
            "config": json.loads(loaded.model.config.to_json()),
            "provenance": loaded.provenance,
        },
    }
    if as_json:
        _print_json(content)
    else:
        print(_indented(content))


def _indented(content: dict[str, Any], depth: int = 0) -> str:
    lines = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            lines += [f"{'  ' * depth}{key}", _indented(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{key}: {'-' if value is None else value}")
    return "\n".join(lines)


# -- the process -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Expected errors become one sentence on standard error."""
    keep_freed_memory()
    try:
        status = app(
            args=None if arguments is None else list(arguments), prog_name="inter2former", standalone_mode=False
        )
        return status if isinstance(status, int) else 0
    except Inter2FormerError as error:
        return _failed(str(error), 1)
    except OSError as error:
        return _failed(f"{error.filename or 'A file'}: {error.strerror or error}.", 1)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except _WRONG_ARGUMENTS as error:
        return _failed(f"{error.format_message().rstrip('.')}. See inter2former --help.", error.exit_code)


def _failed(sentence: str, status: int) -> int:
    print(f"inter2former: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
