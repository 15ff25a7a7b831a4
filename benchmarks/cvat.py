"""The CVAT door measured: what a click costs beyond the core.

    python -m benchmarks.cvat overhead --write

Prints a table and, with --write, keeps the figures in benchmarks/results/.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import gc
import gzip
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt
import typer

from backends.cvat_nuclio.service import Interactor, Reply
from benchmarks.results import write_result
from inter2former.prompts import Click
from inter2former.segmenter import load_segmenter
from inter2former.terminal import print_rows

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "tests" / "fixtures" / "label_studio" / "images"
NAMES = ("coffee.jpg", "chelsea.jpg", "astronaut.jpg", "rocket.jpg")
LIMITS = {"shapes_gzip_kb": 64, "mask_gzip_kb": 300, "overhead_ms": 15}
Mask = npt.NDArray[np.bool_]

app = typer.Typer(add_completion=False, help="The CVAT door measured.")


@app.callback()
def main() -> None:
    """The CVAT door measured."""


def photo(name: str, width: int, height: int) -> bytes:
    """A JPEG as a camera of that size makes it: an enlarged photo with grain, so that its file is not too small."""
    picture = cv2.imread(str(PHOTOS / name))
    assert picture is not None
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 1)).astype(np.float32)
    noisy = np.clip(picture + grain, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def sessions(count: int, clicks: int, width: int, height: int, seed: int = 0) -> list[list[Click]]:
    """Objects that people click on: a positive click, then clicks around it, every third negative and far away."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x, y = (0.2 + 0.6 * rng.random(2)) * (width, height)
        session = [Click(float(x), float(y))]
        for number in range(1, clicks):
            positive = number % 3 != 2
            away, angle = (0.05 if positive else 0.3) * height, rng.random() * 2 * np.pi
            side = np.clip((x + away * np.cos(angle), y + away * np.sin(angle)), 0.5, (width - 0.5, height - 0.5))
            session.append(Click(float(side[0]), float(side[1]), positive))
        made.append(session)
    return made


def in_order(clicks: Sequence[Click]) -> list[Click]:
    """The order that a request of CVAT defines: all positive clicks, then all negative ones."""
    return [click for side in (True, False) for click in clicks if click.positive is side]


def payload(image_base64: str, clicks: Sequence[Click]) -> dict[str, Any]:
    """What CVAT's server sends after the last of these clicks."""
    sides = {side: [[click.x, click.y] for click in clicks if click.positive is side] for side in (True, False)}
    return {"image": image_base64, "pos_points": sides[True], "neg_points": sides[False], "obj_bbox": []}


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": ordered[len(ordered) // 2], "p95": ordered[int(0.95 * (len(ordered) - 1))]}


# -- one click beyond the core ---------------------------------------------------------------------------------------


@app.command()
def overhead(
    objects: Annotated[int, typer.Option(help="objects clicked, each with ten clicks")] = 10,
    width: int = 4000,
    height: int = 3000,
    threads: int = 1,
    write: Annotated[bool, typer.Option("--write", help="keep benchmarks/results/cvat_overhead.json")] = False,
) -> None:
    """Size of the answers, and time of a click beyond the core alone, for a large JPEG that was seen before.

    The core and the door (with a core of its own and equal weights) answer the same clicks by turns. The core gets the
    image by name, so that everything the door does with the request counts: finding and hashing the text, prompts, run
    lengths, JSON, gzip, log line and metrics. CVAT's server accepts gzip, so the sizes on the wire are those with it.
    Exit status 1: a limit is passed, judged by processor time, which a busy machine changes less.
    """
    figures = measure_overhead(objects, width, height, threads)
    print(json.dumps({key: value for key, value in figures.items() if key != "rows"}))
    print_rows(
        f"{width} x {height} JPEG of {figures['jpeg_mb']} MB, {figures['clicks']} clicks, ms beyond the core; "
        f"limits: {LIMITS['overhead_ms']} ms, {LIMITS['shapes_gzip_kb']} kB shapes, {LIMITS['mask_gzip_kb']} kB mask",
        figures["rows"],
    )
    if write:
        print(write_result("cvat_overhead", figures, threads=threads))
    raise typer.Exit(0 if figures["within_limits"] else 1)


def measure_overhead(objects: int, width: int, height: int, threads: int) -> dict[str, Any]:
    jpeg = photo("coffee.jpg", width, height)
    text = base64.b64encode(jpeg).decode()
    clicked = [session[:count] for session in sessions(objects, 10, width, height) for count in range(1, 11)]
    core = load_segmenter(threads=threads)
    known = dataclasses.replace(core.known(jpeg), image=jpeg)
    core.prefetch(known)
    rows: list[dict[str, Any]] = []
    core_ms: list[float] = []
    for what, form, as_bytes in (
        ("shapes, body as bytes", "shapes", True),
        ("shapes, body as dict", "shapes", False),
        ("mask, body as bytes", "mask", True),
    ):
        door = Interactor(load_segmenter(threads=threads), form=form)  # type: ignore[arg-type]
        door.answer(payload(text, [Click(5, 5)]))
        wall, cpu, sizes, sent, wrong = [], [], [], [], 0
        core.clear_cache()
        core.prefetch(known)
        gc.collect()
        for number, clicks in enumerate(clicked if form == "shapes" else clicked[::4]):
            fields = payload(text, clicks)
            body: object = json.dumps(fields).encode() if as_bytes else fields
            ordered = in_order(clicks)
            calls: list[Callable[[], Any]] = [
                functools.partial(core.segment, known, ordered),
                functools.partial(door.answer, body, accepts_gzip=True),
            ]
            spent: dict[int, tuple[float, float, Any]] = {}
            for which in ((0, 1), (1, 0))[number % 2]:
                began = time.perf_counter(), time.process_time()
                result = calls[which]()
                spent[which] = time.perf_counter() - began[0], time.process_time() - began[1], result
            wall.append(1000 * (spent[1][0] - spent[0][0]))
            cpu.append(1000 * (spent[1][1] - spent[0][1]))
            core_ms.append(1000 * spent[0][1])
            sizes.append(len(plain(spent[1][2])) / 1000)
            sent.append(len(spent[1][2].body) / 1000)
            if form == "shapes":
                found = shapes_mask(plain(spent[1][2]), height, width)
                wrong += not np.array_equal(found, spent[0][2].mask)
        rows.append(
            {
                "form": what,
                "wall_p50": round(statistics.median(wall), 1),
                "cpu_p50": round(statistics.median(cpu), 1),
                "cpu_p95": round(spread(cpu)["p95"], 1),
                "kb_p50": round(statistics.median(sizes), 1),
                "kb_max": round(max(sizes), 1),
                "gzip_kb_p50": round(statistics.median(sent), 1),
                "gzip_kb_max": round(max(sent), 1),
                "wrong": wrong,
            }
        )
    fits = all(
        row["gzip_kb_max"] <= LIMITS["shapes_gzip_kb" if row["form"].startswith("shapes") else "mask_gzip_kb"]
        and (row["cpu_p50"] <= LIMITS["overhead_ms"] or row["form"].startswith("mask"))
        for row in rows
    )
    return {
        "pixels": [width, height],
        "jpeg_mb": round(len(jpeg) / 1e6, 1),
        "clicks": len(clicked),
        "core_cpu_ms_p50": round(statistics.median(core_ms), 1),
        "limits": LIMITS,
        "within_limits": fits,
        "rows": rows,
    }


def plain(reply: Reply) -> bytes:
    return gzip.decompress(reply.body) if "Content-Encoding" in reply.headers else reply.body


def shapes_mask(body: bytes, height: int, width: int) -> Mask:
    """The mask in a `shapes` answer, as CVAT's page paints it."""
    mask = np.zeros((height, width), np.bool_)
    for shape in json.loads(body)["shapes"]:
        *runs, left, top, right, bottom = shape["points"]
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(bottom - top + 1, right - left + 1)
        mask[top : bottom + 1, left : right + 1] = inside
    return mask


if __name__ == "__main__":
    app()
