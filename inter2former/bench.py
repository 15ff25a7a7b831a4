"""Stage times on this machine: what `inter2former bench` prints and benchmarks/ keeps.

Pictures are made here from a seed, and so are the weights unless a checkpoint is given. The work of a click depends on
sizes, on the object's area and, for the box that is upsampled, on the weights: random ones take most of it.

Contenders: `ours` is what users get, the Segmenter over packed weights, from pixels to mask; `ours_pytorch` is the same
work by the plain network in PyTorch, without native code.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch

from inter2former import reference_mask
from inter2former.config import PRESETS
from inter2former.errors import ConfigError
from inter2former.images import Frame
from inter2former.nn.canny import canny
from inter2former.nn.model import ImageEncoding, Inter2Former
from inter2former.prompts import Click
from inter2former.runtime.packing import pack
from inter2former.segmenter import Segmenter

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

SESSION_CLICKS = 20


def machine() -> dict[str, Any]:
    """CPU, cores and the versions that decide speed."""
    packages = ("inter2former", "torch", "numpy", "opencv-python-headless")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def version(package: str) -> str | None:
    """The installed version of a distribution; None when it runs from a source tree."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@dataclasses.dataclass(frozen=True)
class Case:
    """The last of some clicks on an image; the ones before are known."""

    image: Image
    clicks: tuple[Click, ...]
    initial_mask: Mask | None = None


class Contender(Protocol):
    """Something that encodes images and answers clicks on the image that it encoded last."""

    name: str

    def encode(self, image: Image) -> object: ...

    def click(self, case: Case) -> object: ...


_AnyContender = TypeVar("_AnyContender", bound=Contender)


class _Ours:
    """The Segmenter; every image and prompt is new to its caches but for what the row calls known."""

    name = "ours"

    def __init__(self, model: Inter2Former, size: int) -> None:
        self._segmenter = Segmenter(pack(copy.deepcopy(model)), model_size=size)

    def encode(self, image: Image) -> None:
        self._segmenter.prefetch(image)

    def click(self, case: Case) -> None:
        self._segmenter.segment(case.image, case.clicks, initial_mask=case.initial_mask)


class _Plain:
    """The network alone, with the reference mask kept click by click. The last image's encoding is known."""

    name = "ours_pytorch"

    def __init__(self, model: Inter2Former, size: int) -> None:
        self._model, self._size = model, size
        self._encoding: ImageEncoding | None = None
        self._state: tuple[tuple[Click, ...], reference_mask.State] = ((), np.empty(0, np.uint8))

    def _frame(self, image: Image) -> Frame:
        return Frame(image.shape[0], image.shape[1], self._size, self._model.config.input_convention)

    def encode(self, image: Image) -> None:
        self._encoding = self._model.encode(self._frame(image).prepare(image))

    def edges(self, image: Image) -> None:
        """Canny and CannyNet, the part of `encode` beside the encoder."""
        pixels = self._frame(image).prepare(image).unsqueeze(0)
        with torch.inference_mode():
            self._model.canny_net(canny(pixels), pixels)

    def click(self, case: Case) -> None:
        assert self._encoding is not None
        frame = self._frame(case.image)
        known, state = self._state
        if not known or known != case.clicks[:-1]:
            start = case.initial_mask
            state = (
                reference_mask.initial(self._size, self._model.config.initial_reference)
                if start is None
                else reference_mask.from_mask(frame.mask_to_model(start))
            )
        new = case.clicks[-1]
        point = (*frame.model_pixel(new.x, new.y), new.positive)
        state = reference_mask.paint_clicks(state, [point], self._model.config.click_radius)
        logits = self._model.decode(self._encoding, state).logits
        self._state = case.clicks, reference_mask.apply_prediction(state, (logits > 0).numpy())
        frame.mask_from_logits(logits)


def picture(size: int, seed: int) -> Image:
    """A photo-like picture uint8 [size, size, 3]: smooth colours, some edges, a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        x, y, radius = (int(v) for v in rng.integers(0, size, 3))
        cv2.circle(smooth, (x, y), max(2, radius // 6), [int(v) for v in rng.integers(0, 256, 3)], -1)
    noise = rng.integers(0, 13, smooth.shape, dtype=np.uint8)
    noisy: Image = np.clip(smooth.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return noisy


def disc(size: int, area: float) -> Mask:
    """A centred disc that covers `area` (a share, 0..1) of [size, size]."""
    offsets = np.arange(size) + 0.5 - size / 2
    inside: Mask = offsets[:, None] ** 2 + offsets**2 <= area * size * size / np.pi
    return inside


def _session(size: int, run: int) -> list[Click]:
    """20 clicks on a disc of 10 %: inside and just outside by turns, at other places in each run."""
    rng = np.random.default_rng(1000 + run)
    radius = size * np.sqrt(0.10 / np.pi)
    clicks = []
    for index in range(SESSION_CLICKS):
        positive = index % 2 == 0
        angle = rng.uniform(0, 2 * np.pi)
        distance = rng.uniform(0.0, 0.8 if positive else 0.3) * radius + (0 if positive else 1.1 * radius)
        clicks.append(Click(size / 2 + distance * np.cos(angle), size / 2 + distance * np.sin(angle), positive))
    return clicks


def run(
    preset: str,
    sizes: Sequence[int] | None = None,
    areas: Sequence[float] = (0.01, 0.10, 0.50),
    *,
    runs: int = 5,
    model: Inter2Former | None = None,
    on_row: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Time every stage; {"machine", "threads", "rows"}, medians and 90 % points in milliseconds.

    preset   a name of config.PRESETS; its weights are random unless `model` is given
    sizes    model sizes T; default the preset's smallest automatic size
    areas    shares of the picture that the object of a `click` row covers
    raises   ConfigError for an unknown preset, an impossible size, area or number of runs
    """
    if preset not in PRESETS:
        raise ConfigError(f"Preset {preset!r} is unknown; choose from {', '.join(PRESETS)}.")
    config = model.config if model is not None else PRESETS[preset]()
    sizes = list(sizes or config.auto_sizes[:1])
    if runs < 1 or any(size < 256 or size % 256 for size in sizes) or any(not 0 < area < 1 for area in areas):
        raise ConfigError("bench wants runs >= 1, sizes in multiples of 256 and areas between 0 and 1.")
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Inter2Former(config).eval()
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for what, area, contender, seconds in _measure(model, size, areas, runs):
            ms = sorted(1000 * value for value in seconds)
            row = {
                "what": what,
                "preset": preset,
                "size": size,
                "area": area,
                "edge_rule": config.edge_rule,
                "contender": contender,
                "median_ms": round(statistics.median(ms), 3),
                "p90_ms": round(ms[min(len(ms) - 1, int(0.9 * len(ms)))], 3),
                "runs": len(ms),
            }
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return {"machine": machine(), "threads": torch.get_num_threads(), "rows": rows}


_Sample = tuple[str, float | None, str, list[float]]


def _measure(model: Inter2Former, size: int, areas: Sequence[float], runs: int) -> Iterator[_Sample]:
    """(what, area, contender, seconds of each run)."""
    contenders: list[Contender] = [_Ours(model, size), _Plain(model, size)]
    yield from _rows("encode", None, contenders, runs, lambda c, i: partial(c.encode, picture(size, 7 + i)))
    plain = [_Plain(model, size)]  # the Segmenter has no such stage of its own
    yield from _rows("edges", None, plain, runs, lambda c, i: partial(c.edges, picture(size, 7 + i)))

    image = picture(size, 0)
    for contender in contenders:
        contender.encode(image)

    def one_click(contender: Contender, index: int, start: Mask | None = None) -> Callable[[], object]:
        spot = Click(size / 2 + index, size / 2 - index)  # another one each time: a repeated prompt is a cache hit
        return partial(contender.click, Case(image, (spot,), start))

    def session(contender: Contender, index: int) -> Callable[[], object]:
        clicks = _session(size, index)
        cases = [Case(image, tuple(clicks[: k + 1])) for k in range(len(clicks))]
        return lambda: [contender.click(case) for case in cases]

    yield from _rows("first_click", None, contenders, runs, one_click)
    for area in areas:
        yield from _rows("click", area, contenders, runs, partial(one_click, start=disc(size, area)))
    yield from _rows("session20", None, contenders, runs, session)


def _rows(
    what: str,
    area: float | None,
    contenders: Sequence[_AnyContender],
    runs: int,
    action_of: Callable[[_AnyContender, int], Callable[[], object]],
) -> Iterator[_Sample]:
    """Time the actions; contenders take turns within a run, after one warm-up run that is not counted."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for index in range(runs + 1):
        for contender in contenders:
            action = action_of(contender, index)
            start = time.perf_counter()
            action()
            if index > 0:
                seconds[contender.name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        yield what, area, name, values
