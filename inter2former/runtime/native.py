"""The compiled module, or its PyTorch twins where it is absent: one answer either way, only the time differs.

Each function here has the signature and the result of its twin in `inter2former.nn` or `inter2former.reference_mask`.
Nothing is loaded at import; the first use loads the module and, where that fails, says so in one line of the log.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inter2former import level, random_walk, reference_mask, score, small_parts
from inter2former.config import EdgeRule
from inter2former.nn import attention
from inter2former.nn.experts import HybridExperts
from inter2former.nn.prompt_embedding import PixelBox

INTERFACE = 11  # of csrc/bindings.cpp; a module of another version is not used

log = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16"]  # of the operands of the large products; sums are float32


@dataclasses.dataclass(frozen=True)
class NativeStatus:
    """What `inter2former info` and the servers' metrics report."""

    available: bool
    instruction_set: str  # "" without the module
    refused: dict[str, str]  # instruction sets that are not used here, and why
    threads: int
    error: str  # why the module is not there; "" when it is


_lock = threading.Lock()
_loaded: list[tuple[ModuleType | None, str]] = []  # at most one: (module, error)


def _load() -> tuple[ModuleType | None, str]:
    with _lock:
        if not _loaded:
            _loaded.append(_try_import())
            if _loaded[0][0] is None:
                log.warning("Native module not usable (%s); PyTorch does its work, more slowly.", _loaded[0][1])
        return _loaded[0]


def _try_import() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("inter2former._native")
    except ImportError as error:
        return None, str(error)
    if module.INTERFACE != INTERFACE:
        return None, f"it has interface {module.INTERFACE}, this package needs {INTERFACE}; build it again"
    module.set_threads(torch.get_num_threads())  # of this machine, or what OMP_NUM_THREADS asks for
    return module, ""


def forget() -> None:
    """Load again at the next use; for tests."""
    with _lock:
        _loaded.clear()


def status() -> NativeStatus:
    """Which instruction set runs, and why not a better one."""
    module, error = _load()
    if module is None:
        return NativeStatus(False, "", {}, torch.get_num_threads(), error)
    rows = module.instruction_sets()
    chosen = next(name for name, _, reason in rows if not reason)
    return NativeStatus(True, chosen, {name: reason for name, _, reason in rows if reason}, module.threads(), "")


def choose_precision(wanted: Precision | Literal["auto"]) -> Precision:
    """The precision that runs: "auto" is bfloat16 where the CPU has instructions that make it faster.

    raises  ValueError for another name
    """
    if wanted not in ("float32", "bfloat16", "auto"):
        raise ValueError(f"precision is {wanted!r}; choose float32, bfloat16 or auto.")
    if wanted != "auto":
        return wanted
    module, _ = _load()
    return "bfloat16" if module is not None and module.bfloat16_pays() else "float32"


def vectors(precision: Precision = "float32") -> bool:
    """Whether a path with wide vectors runs; PyTorch's products are faster than the others'."""
    module, _ = _load()
    paths = [] if module is None else module.instruction_sets(precision)
    return any(name not in ("portable", "scalar") and not reason for name, _, reason in paths)


def set_threads(count: int) -> None:
    """Threads of one native call, from the one setting; until it is made, as many as PyTorch's. Results do not depend
    on it. ValueError outside 1..1024."""
    module, _ = _load()
    if module is not None:
        module.set_threads(count)


@contextmanager
def among(callers: int) -> Iterator[None]:
    """Inside, this thread's native calls take their part of the threads, as one of so many callers."""
    module, _ = _load()
    if module is None:
        yield
        return
    module.limit_threads(max(module.threads() // callers, 1))
    try:
        yield
    finally:
        module.limit_threads(0)


def experts(
    module: HybridExperts, isa: str = "auto", precision: Precision = "float32"
) -> Callable[[Tensor, Tensor], Tensor]:
    """The same function as the module in evaluation mode, (x [N, d], edge [N]) -> [N, d], with its weights of now.

    isa      name of an instruction set, for tests; ValueError where it cannot run
    returns  a callable for float32 on the CPU without gradients; a row's result depends on that row alone
    """
    native, _ = _load()
    if native is None:
        return module
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        for name, tensor in module.state_dict().items()
    }
    packed = native.HybridExperts(weights, isa, precision)

    def forward(x: Tensor, edge: Tensor) -> Tensor:
        rows = x if x.stride(-1) == 1 else x.contiguous()
        return torch.from_numpy(packed.forward(rows.detach().numpy(), edge.numpy()))

    return forward


def module() -> ModuleType | None:
    """The compiled module; None where it is absent."""
    return _load()[0]


def edge_tokens(
    reference: npt.NDArray[np.uint8], box: PixelBox, rule: EdgeRule = "exact", patch: int = 16
) -> npt.NDArray[np.bool_]:
    """Which tokens get full attention, as attention.edge_tokens."""
    native, _ = _load()
    if native is None:
        return attention.edge_tokens(reference, box, rule, patch)
    edge: npt.NDArray[np.bool_] = native.edge_tokens(reference, box, rule == "released", patch)
    return edge


def apply_prediction(state: reference_mask.State, prediction: reference_mask.Mask) -> reference_mask.State:
    """Fold one prediction into the state, as reference_mask.apply_prediction."""
    native, _ = _load()
    if native is None:
        return reference_mask.apply_prediction(state, prediction)
    moved: reference_mask.State = native.apply_prediction(state, prediction)
    return moved


def walk(
    links: random_walk.Float32,
    inside: random_walk.Float32,
    box: random_walk.TokenBox,
    reference: reference_mask.State,
    trust: float,
) -> random_walk.Float32:
    """Logits that colours and clicks have been asked about, as random_walk.walk."""
    native, _ = _load()
    if native is None:
        return random_walk.walk(links, inside, box, reference, trust)
    walked: random_walk.Float32 = native.random_walk(
        links,
        inside,
        box,
        reference,
        trust,
        random_walk.SOFTNESS,
        random_walk.SURE,
        random_walk.NEARLY,
        random_walk.ITERATIONS,
    )
    return walked


def evidence(
    logits: score.Float32, clicks: Sequence[tuple[int, int, bool]], previous: score.Mask | None
) -> tuple[float, ...] | None:
    """What a pass says about its quality, as score.evidence."""
    native, _ = _load()
    if native is None:
        return score.evidence(logits, clicks, previous)
    return _described(native, logits, clicks, previous, (0.0,), None)[0]


def describe(
    logits: level.Float32, links: level.Float32, clicks: Sequence[tuple[int, int, bool]], previous: level.Mask | None
) -> list[tuple[float, ...] | None]:
    """What masks at each level look like, as level.describe."""
    native, _ = _load()
    if native is None:
        return level.describe(logits, links, clicks, previous)
    described = _described(native, logits, clicks, previous, level.LEVELS, links)
    return [numbers and (*numbers, zero) for numbers, zero in zip(described, level.LEVELS, strict=True)]


def _described(
    native: ModuleType,
    logits: level.Float32,
    clicks: Sequence[tuple[int, int, bool]],
    previous: level.Mask | None,
    levels: Sequence[float],
    links: level.Float32 | None,
) -> list[tuple[float, ...] | None]:
    made = np.asarray(clicks, np.int64).reshape(-1, 3)
    before = None if previous is None else np.ascontiguousarray(previous)
    numbers, found = native.describe(np.ascontiguousarray(logits), made, before, levels, links)
    return [tuple(row) if held else None for row, held in zip(numbers.tolist(), found.tolist(), strict=True)]


def flip_small_parts(
    logits: small_parts.Float32, spoken: small_parts.Mask, share: float, *, inside: bool
) -> small_parts.Float32 | None:
    """Logits after small parts of one side went to the other, as small_parts.flip."""
    native, _ = _load()
    if native is None:
        return small_parts.flip(logits, spoken, share, inside=inside)
    flipped: small_parts.Float32 | None = native.flip_small_parts(logits, spoken, share, inside, small_parts.LEAST)
    return flipped
