"""Many threads, each clicking on its own known image: answers and throughput, kept in benchmarks/results/.

    python -m benchmarks.threads                # small model, random weights, T = 512: seconds
    python -m benchmarks.threads --preset base --size 1024 --clicks 10      # two minutes, most of it encodes

A session is clicks on one image through the Segmenter, from the image's name to the mask. First one thread answers the
sessions one after the other, then all at once; every mask is compared bit for bit. The caches are emptied of clicks in
between, the images stay encoded. One compute thread a click, so that callers share the cores.
"""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import typer

from benchmarks.results import write_result
from inter2former.bench import picture
from inter2former.config import PRESETS
from inter2former.nn.model import Inter2Former
from inter2former.prompts import Click
from inter2former.runtime import native
from inter2former.runtime.packing import pack
from inter2former.segmenter import Segmenter

Masks = list[npt.NDArray[np.bool_]]


def sessions(count: int, clicks: int, size: int, round_: int) -> list[list[Click]]:
    """Other places in each round, so that no click is known already."""
    places = np.random.default_rng(round_).uniform(0.2 * size, 0.8 * size, (count, clicks, 2))
    return [[Click(float(x), float(y), index % 3 != 2) for index, (x, y) in enumerate(one)] for one in places]


def main(preset: str = "small", size: int = 512, threads: int = 8, clicks: int = 5, rounds: int = 3) -> None:
    """Compare one caller with many."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    native.set_threads(1)
    torch.manual_seed(0)
    model = pack(Inter2Former(PRESETS[preset]()).eval())
    segmenter = Segmenter(model, model_size=size, cache_bytes=2**31, digest=f"random{preset}")
    images = [segmenter.known(picture(size, seed)) for seed in range(threads)]

    def forget_clicks() -> None:
        """The images stay encoded: they come back from a folder."""
        segmenter.clear_cache()
        for image in images:
            segmenter.prefetch(image)

    def answer(index: int, session: list[Click]) -> Masks:
        return [segmenter.segment(images[index], session[: k + 1]).mask for k in range(len(session))]

    ratios, different = [], 0
    with ThreadPoolExecutor(threads) as pool, tempfile.TemporaryDirectory() as folder:
        segmenter.keep_encodings(Path(folder), 2**31)
        for round_ in range(rounds):
            forget_clicks()
            work = sessions(threads, clicks, size, round_)
            began = time.perf_counter()
            alone = [answer(index, session) for index, session in enumerate(work)]
            seconds_alone = time.perf_counter() - began
            forget_clicks()
            began = time.perf_counter()
            together = list(pool.map(answer, range(threads), work))
            seconds_together = time.perf_counter() - began
            ratios.append(seconds_alone / seconds_together)
            different += sum(
                not np.array_equal(a, b)
                for one, other in zip(alone, together, strict=True)
                for a, b in zip(one, other, strict=True)
            )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    result: dict[str, Any] = {
        "preset": preset,
        "size": size,
        "callers": threads,
        "clicks": clicks,
        "masks_that_differ": different,
        "throughput_over_one_caller": [round(ratio, 2) for ratio in ratios],
        "of_the_cores": round(float(np.median(ratios)) / min(cores, threads), 2),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    for name, value in result.items():
        print(f"{name:28} {value}")
    print(f"wrote {write_result(f'threads_{preset}', result, threads=1)}")
    if different:
        raise SystemExit("Answers depend on who else asks.")


if __name__ == "__main__":
    typer.run(main)
