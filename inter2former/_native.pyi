"""Types of the compiled module (csrc/bindings.cpp). Use it through inter2former.runtime.native."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

INTERFACE: int

def instruction_sets(precision: str = "float32") -> list[tuple[str, str, str]]:
    """(name, what it is, why it cannot run here or "") of every path, best first."""

def bfloat16_pays() -> bool: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def limit_threads(count: int) -> None:
    """Of calls from this thread, from now on; 0 for no limit but the setting."""

def edge_tokens(
    reference: npt.NDArray[np.uint8],
    box: tuple[int, int, int, int],
    constant_is_edge: bool = False,
    patch: int = 16,
    isa: str = "auto",
) -> npt.NDArray[np.bool_]: ...
def apply_prediction(
    state: npt.NDArray[np.uint8], prediction: npt.NDArray[np.bool_], isa: str = "auto"
) -> npt.NDArray[np.uint8]: ...
def flip_small_parts(
    logits: npt.NDArray[np.float32], spoken: npt.NDArray[np.bool_], share: float, inside: bool, least: float
) -> npt.NDArray[np.float32] | None: ...
def describe(
    logits: npt.NDArray[np.float32],
    clicks: npt.NDArray[np.int64],
    previous: npt.NDArray[np.bool_] | None,
    levels: Sequence[float],
    links: npt.NDArray[np.float32] | None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]: ...
def random_walk(
    links: npt.NDArray[np.float32],
    inside: npt.NDArray[np.float32],
    box: tuple[int, int, int, int],
    state: npt.NDArray[np.uint8],
    trust: float,
    softness: float,
    sure: float,
    nearly: float,
    iterations: int,
) -> npt.NDArray[np.float32]: ...

class HybridExperts:
    def __init__(self, weights: dict[str, npt.NDArray[Any]], isa: str = "auto", precision: str = "float32") -> None: ...
    def forward(
        self, x: npt.NDArray[np.float32], edge: npt.NDArray[np.bool_], out: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]: ...
    def route(self, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]: ...
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

class Decoder:
    def __init__(
        self,
        weights: dict[str, npt.NDArray[Any]],
        sizes: dict[str, int | float],
        isa: str = "auto",
        precision: str = "float32",
    ) -> None: ...
    def decode(
        self,
        tokens: npt.NDArray[np.float32],
        edges: list[npt.NDArray[Any]],
        units: list[npt.NDArray[np.uint16]],
        middles: list[npt.NDArray[np.float32]],
        cosines: npt.NDArray[np.float32],
        sines: npt.NDArray[np.float32],
        state: npt.NDArray[np.uint8],
        box: tuple[int, int, int, int] | None = None,
    ) -> tuple[npt.NDArray[np.float32], tuple[int, int, int, int], npt.NDArray[np.float32]]: ...
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

class Convolution:
    def __init__(self, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], isa: str = "auto") -> None: ...
    def forward(
        self,
        x: npt.NDArray[np.float32],
        scale: npt.NDArray[np.float32] | None = None,
        shift: npt.NDArray[np.float32] | None = None,
        add: npt.NDArray[np.float32] | None = None,
        silu: bool = False,
    ) -> tuple[npt.NDArray[np.float32], float, float]:
        """Result [H, W, D], its sum, the sum of its squares."""
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

class EncoderBlock:
    def __init__(
        self, weights: dict[str, npt.NDArray[np.float32]], isa: str = "auto", precision: str = "float32"
    ) -> None: ...
    def project(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """x [rows, C] -> [rows, 3C]."""
    def finish(self, x: npt.NDArray[np.float32], attended: npt.NDArray[np.float32]) -> None:
        """Both [rows, C]; x is changed."""
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

class WindowAttention:
    def __init__(
        self,
        side: int,
        heads: int,
        cosines: npt.NDArray[np.float32],
        sines: npt.NDArray[np.float32],
        isa: str = "auto",
        precision: str = "float32",
    ) -> None:
        """cosines, sines [side * side, a / 2]."""
    def forward(
        self, qkv: npt.NDArray[np.float32], padding: npt.NDArray[np.float32], shape: tuple[int, int], lead: int
    ) -> npt.NDArray[np.float32]:
        """qkv [height * width, 3 heads a], padding [3 heads a] -> [height * width, heads a]."""
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

class Outline:
    def __init__(
        self,
        layers: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
        down: Sequence[int],
        up: Sequence[int],
        isa: str = "auto",
    ) -> None:
        """Weight and bias of each convolution, in the order of csrc/outline.h; units at each stride."""
    def forward(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """x [C, h, w] -> [h, w]."""
    def draw(
        self,
        logits: npt.NDArray[np.float32],
        before: npt.NDArray[np.float32] | None,
        picture: npt.NDArray[np.uint8],
        shape: tuple[int, int],
        shown: tuple[int, int],
        clicks: npt.NDArray[np.float32],
        sure: float,
        scale: float,
        blob: float,
        far: float,
        mean: Sequence[float],
        deviation: Sequence[float],
    ) -> tuple[npt.NDArray[np.float32], bool]:
        """Logits and before [H, W], picture [.., .., 3], clicks [n, 3] of (y, x, positive) in the crop [h, w] ->
        logits with what is added to them, and whether that is finite."""
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
