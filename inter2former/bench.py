"""Stage times on this machine: what `inter2former bench` prints and benchmarks/ keeps.

Pictures are made here from a seed, and so are the weights unless a checkpoint is given. The work of a click depends on
sizes, on the object's area and on the box that is upsampled: that of the object with random weights, which would find
anything, and what the weights of a checkpoint find.

Contenders: `ours` is what users get, the Segmenter over packed weights, from pixels to mask, `ours_bfloat16` the same
in that precision, where the CPU has it; `ours_pytorch` is the same work by the plain network in PyTorch, without native
code. With `transformers` installed (the extra "bench") clicks are also made by the decoders of SAM ViT-B and SAM 2.1
tiny with random weights: always at 1024 pixels, whatever the row's size, on one known image embedding, from a point to
a mask.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
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
from torch.nn import functional as F

from inter2former import reference_mask
from inter2former.config import PRESETS
from inter2former.errors import ConfigError
from inter2former.images import Frame
from inter2former.nn.canny import canny
from inter2former.nn.model import ImageEncoding, Inter2Former
from inter2former.nn.upsampling import TokenBox
from inter2former.prompts import Click
from inter2former.runtime import native
from inter2former.runtime.decoder import FusedDecoder
from inter2former.runtime.packing import pack
from inter2former.segmenter import Segmenter

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

Action = Callable[[], object]

SESSION_CLICKS = 20
PAUSE_S = (
    0.01  # before each timed action: threads of the contender before still look for work on their cores for a while
)
SESSION_AREA = 0.10  # of the object of a first click and a session


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
    """The last of some clicks on an image; the ones before are known. `box`: what is upsampled, in tokens."""

    image: Image
    clicks: tuple[Click, ...]
    initial_mask: Mask | None = None
    box: TokenBox | None = None


class Contender(Protocol):
    """Something that encodes images and answers clicks on the image that it encoded last, `case.image`."""

    name: str

    def encode(self, image: Image) -> object: ...

    def click(self, case: Case) -> object: ...


_AnyContender = TypeVar("_AnyContender", bound=Contender)


class _Ours:
    """The Segmenter; every image and prompt is new to its caches but for what the row calls known.

    It knows the image that it encoded last by name, as servers do. The object of a `click` row is a given mask, so that
    some of the time is that mask's way into the model's frame.
    """

    def __init__(
        self, model: Inter2Former, size: int, precision: native.Precision = "float32", name: str = "ours"
    ) -> None:
        self.name = name
        self._model = pack(copy.deepcopy(model), precision)
        self._segmenter = Segmenter(self._model, model_size=size)

    def encode(self, image: Image) -> None:
        self._image = self._segmenter.known(image)
        self._segmenter.prefetch(self._image)

    def click(self, case: Case) -> None:
        upsample_in(self._model, case.box)
        self._segmenter.segment(self._image, case.clicks, initial_mask=case.initial_mask)


class _Plain:
    """The network alone, with the reference mask kept click by click. The last image's encoding is known."""

    name = "ours_pytorch"

    def __init__(self, model: Inter2Former, size: int) -> None:
        self._model, self._size = copy.deepcopy(model), size
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
        upsample_in(self._model, case.box)
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


class _Sam:
    """A decoder of SAM's family; it has one image, and its clicks cost the same wherever they are."""

    def __init__(self, name: str, click: Action) -> None:
        self.name, self._click = name, click

    def encode(self, image: Image) -> None:
        """Nothing: its encoder is not measured here."""

    def click(self, case: Case) -> object:
        return self._click()


def upsample_in(model: Inter2Former, box: TokenBox | None) -> None:
    """Let a model (packed or not) upsample that box of tokens from now on, whatever it finds; None: what it finds."""
    decoder = getattr(model.decode, "__self__", None)
    for owner, name in ((decoder, "click"), (model.upsampling, "box")):
        vars(owner).pop(name, None)
    if box is not None and isinstance(decoder, FusedDecoder):
        decoder.click = partial(decoder.click, box=box)  # type: ignore[method-assign]
    elif box is not None:
        model.upsampling.box = lambda low: box  # type: ignore[method-assign]


def box_of(inside: Mask) -> TokenBox:
    """(left, top, right, bottom) in tokens of what is inside, bool [T, T]."""
    size = inside.shape[0]
    tokens = np.argwhere(inside.reshape(size // 16, 16, size // 16, 16).any((1, 3)))
    (top, left), (bottom, right) = tokens.min(0), tokens.max(0) + 1
    return int(left), int(top), int(right), int(bottom)


def sam_vit_b() -> Action:
    """One click on a known embedding; of the image encoder only a layer is made, and not used."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded from anywhere
    from transformers import SamConfig, SamModel

    config = SamConfig(vision_config={"num_hidden_layers": 1, "global_attn_indexes": [0]})
    model: Any = SamModel(config)
    model.eval()
    return _click_of_sam(model, torch.randn(1, 256, 64, 64))


def sam2_tiny() -> Action:
    """The same for SAM 2.1 tiny, whose decoder also reads two finer maps."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import Sam2Config, Sam2Model

    model: Any = Sam2Model(Sam2Config())
    model.eval()
    maps = [torch.randn(1, 32, 256, 256), torch.randn(1, 64, 128, 128), torch.randn(1, 256, 64, 64)]
    return _click_of_sam(model, maps)


def _click_of_sam(model: Any, embeddings: Any) -> Action:
    points, labels = torch.full((1, 1, 1, 2), 512.0), torch.ones(1, 1, 1, dtype=torch.int)

    def click() -> object:
        with torch.inference_mode():
            low = model(
                image_embeddings=embeddings, input_points=points, input_labels=labels, multimask_output=False
            ).pred_masks
            return F.interpolate(low[0], (1024, 1024), mode="bilinear", align_corners=False) > 0

    return click


OTHERS = {"sam_vit_b": sam_vit_b, "sam2_tiny": sam2_tiny}


def _others() -> list[Contender]:
    if importlib.util.find_spec("transformers") is None:
        return []
    with torch.random.fork_rng():
        return [_Sam(name, make()) for name, make in OTHERS.items()]


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
    """20 clicks on a disc of SESSION_AREA: inside and just outside by turns, at other places in each run."""
    rng = np.random.default_rng(1000 + run)
    radius = size * np.sqrt(SESSION_AREA / np.pi)
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
    areas: Sequence[float] = (0.01, 0.05, 0.10, 0.25, 0.50),
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
    random = model is None
    if model is None:
        # With random weights nothing is found whose outline could be drawn: the network itself, at the row's size.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Inter2Former(dataclasses.replace(config, coarse_size=0)).eval()
    native.set_threads(torch.get_num_threads())
    rows: list[dict[str, Any]] = []
    others = _others()
    for size in sizes:
        for what, area, contender, seconds in _measure(model, others, size, areas, runs, random):
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


def _measure(
    model: Inter2Former, others: Sequence[Contender], size: int, areas: Sequence[float], runs: int, random: bool
) -> Iterator[_Sample]:
    """(what, area, contender, seconds of each run)."""
    plain = _Plain(model, size)
    contenders: list[Contender] = [_Ours(model, size), plain]
    if native.choose_precision("auto") == "bfloat16":
        contenders.insert(1, _Ours(model, size, "bfloat16", "ours_bfloat16"))
    yield from _rows("encode", None, contenders, runs, lambda c, i: partial(c.encode, picture(size, 7 + i)))
    # The Segmenter has no such stage of its own.
    yield from _rows("edges", None, [plain], runs, lambda c, i: partial(c.edges, picture(size, 7 + i)))

    image = picture(size, 0)
    for contender in contenders:
        contender.encode(image)

    def boxed(area: float) -> TokenBox | None:
        return box_of(disc(size, area)) if random else None

    def one_click(contender: Contender, index: int, area: float | None = None) -> Action:
        spot = Click(size / 2 + index, size / 2 - index)  # another one each time: a repeated prompt is a cache hit
        if area is None:
            case = Case(image, (spot,), box=boxed(SESSION_AREA))
        else:
            case = Case(image, (spot,), disc(size, area), boxed(area))
        return partial(contender.click, case)

    def session(contender: Contender, index: int) -> Action:
        clicks = _session(size, index)
        cases = [Case(image, tuple(clicks[: k + 1]), box=boxed(SESSION_AREA)) for k in range(len(clicks))]
        return lambda: [contender.click(case) for case in cases]

    yield from _rows("first_click", None, [*contenders, *others], runs, one_click)
    for area in areas:
        yield from _rows("click", area, [*contenders, *others], runs, partial(one_click, area=area))
    yield from _rows("session20", None, contenders, runs, session)


def _rows(
    what: str,
    area: float | None,
    contenders: Sequence[_AnyContender],
    runs: int,
    action_of: Callable[[_AnyContender, int], Action],
) -> Iterator[_Sample]:
    """Time the actions; contenders take turns within a run, after one warm-up run that is not counted."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for index in range(runs + 1):
        for contender in contenders:
            action = action_of(contender, index)
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            action()
            if index > 0:
                seconds[contender.name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        yield what, area, name, values
