"""R1 and R2: the mask is a function of pixels, ordered prompts, weights and T. Everything here compares bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_image, make_tiny_model

from inter2former import Box, Click, Segmenter, level
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import tiny
from inter2former.nn.model import Inter2Former
from inter2former.runtime.packing import pack

SIZES = [(120, 160), (97, 61), (300, 200), (256, 256)]  # of the images 0, 1, 2, 3
picture = functools.cache(make_image)


@pytest.fixture(scope="module")
def tiny_model() -> Inter2Former:
    """With all that the shipped weights do after a pass."""
    numbers = len(level.FEATURES)
    weights = tuple(np.random.default_rng(0).normal(0, 1, 3 * (numbers + 2)).tolist())
    return make_tiny_model(dataclasses.replace(tiny(), island_share=0.1, walk_trust=0.05, level_weights=weights))


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Inter2Former) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, tiny_model)
    return path


@dataclasses.dataclass(frozen=True)
class Request:
    """One call of `segment`, as plain data: fractions of the image, so that it can be told to another process."""

    image: int
    clicks: tuple[tuple[float, float, bool], ...]  # x, y in [0, 1)
    box: tuple[float, float, float, float] | None = None
    mask: tuple[float, float, float, float] | None = None  # an initial mask that is a rectangle
    model_size: int = 256

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Request:
        clicks = tuple((x, y, positive) for x, y, positive in fields.pop("clicks"))
        return Request(clicks=clicks, **fields)


def answer(segmenter: Segmenter, request: Request) -> str:
    """A digest over mask, logits and score."""
    height, width = SIZES[request.image]
    initial_mask = None
    if request.mask is not None:
        x0, y0, x1, y1 = request.mask
        initial_mask = np.zeros((height, width), np.bool_)
        initial_mask[int(y0 * height) : int(y1 * height) + 1, int(x0 * width) : int(x1 * width) + 1] = True
    box = None
    if request.box is not None:
        x0, y0, x1, y1 = request.box
        box = Box(x0 * width, y0 * height, x1 * width, y1 * height)
    result = segmenter.segment(
        picture(height, width, request.image),
        [Click(x * width, y * height, positive) for x, y, positive in request.clicks],
        box=box,
        initial_mask=initial_mask,
        model_size=request.model_size,
    )
    digest = hashlib.sha256(result.mask.tobytes())
    digest.update(result.logits().tobytes())
    digest.update(repr(result.score).encode())
    return digest.hexdigest()


def random_requests(n_requests: int, seed: int) -> list[Request]:
    """Histories that grow, are undone and branch, on several images, some with a box or a mask."""
    rng = np.random.default_rng(seed)
    requests = []
    clicks: list[tuple[float, float, bool]] = []
    image, box, mask = 0, None, None
    for _ in range(n_requests):
        dice = rng.random()
        if dice < 0.15 or len(clicks) >= 5:
            image, clicks = int(rng.integers(len(SIZES))), []
            box = _rectangle(rng) if rng.random() < 0.3 else None
            mask = _rectangle(rng) if rng.random() < 0.3 else None
        elif dice < 0.35 and len(clicks) > 1:
            clicks = clicks[: int(rng.integers(1, len(clicks)))]
        x, y = rng.random(2)
        clicks = [*clicks, (float(x), float(y), bool(len(clicks) == 0 or rng.random() < 0.7))]
        requests.append(Request(image, tuple(clicks), box, mask))
    return requests


def _rectangle(rng: np.random.Generator) -> tuple[float, float, float, float]:
    (x0, x1), (y0, y1) = np.sort(rng.random(2)), np.sort(rng.random(2))
    return float(x0), float(y0), float(x1) + 0.05, float(y1) + 0.05


# Six clicks, with an undo and a changed mind in between: what was asked, one after the other.
_SIX = [(0.5, 0.5, True), (0.25, 0.25, True), (0.75, 0.7, True), (0.5, 0.5, False), (0.1, 0.8, True), (0.9, 0.1, False)]
SESSION = [
    Request(0, tuple(_SIX[:1])),
    Request(0, tuple(_SIX[:2])),
    Request(0, tuple(_SIX[:3])),
    Request(0, (*_SIX[:3], (0.6, 0.2, True))),
    Request(0, tuple(_SIX[:3])),  # undone
    Request(0, tuple(_SIX[:4])),
    Request(0, tuple(_SIX[:5])),
    Request(0, tuple(_SIX[:6])),
]


def cold(model: Inter2Former, request: Request) -> str:
    return answer(Segmenter(model, cache_bytes=0), request)


def in_another_process(checkpoint: Path, requests: list[Request], folder: Path) -> list[str]:
    """The answers of a fresh interpreter that loads the same weights."""
    asked = folder / "requests.json"
    asked.write_text(json.dumps([dataclasses.asdict(request) for request in requests]))
    done = subprocess.run(
        [sys.executable, __file__, str(checkpoint), str(asked)],
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_six_clicks_with_an_undo(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """R1: cold = warm = forgetting = other process, with a model as it is served."""
    served = pack(load_checkpoint(tiny_checkpoint).model)
    expected = [cold(served, request) for request in SESSION]
    assert expected[2] == expected[4]
    assert len(set(expected)) == len(SESSION) - 1

    warm = Segmenter(served)
    assert [answer(warm, request) for request in SESSION] == expected
    assert [answer(warm, request) for request in reversed(SESSION)] == expected[::-1]
    assert warm.encodes == 1

    forgetting = Segmenter(served)
    for request, wanted in zip(SESSION, expected, strict=True):
        assert answer(forgetting, request) == wanted
        forgetting.clear_cache()

    # The other process is also asked other things, in another order.
    others = random_requests(12, seed=1)
    expected_others = [answer(warm, request) for request in others]
    asked, wanted = [*others, *SESSION][::-1], [*expected_others, *expected][::-1]
    assert in_another_process(tiny_checkpoint, asked, tmp_path) == wanted


@pytest.mark.parametrize("cache_bytes", [0, 200_000, 2_000_000, 4_000_000])
def test_no_budget_changes_a_mask(tiny_model: Inter2Former, cache_bytes: int) -> None:
    """R1: at 200 kB states stay and encodings leave, at 2 MB one image fits, at 4 MB two do."""
    requests = random_requests(12, seed=2)
    plenty, tight = Segmenter(tiny_model), Segmenter(tiny_model, cache_bytes=cache_bytes)
    for request in requests:
        assert answer(tight, request) == answer(plenty, request)


def test_a_hundred_other_requests_change_nothing(tiny_model: Inter2Former) -> None:
    """R1"""
    segmenter = Segmenter(tiny_model, cache_bytes=6_000_000)
    before = [answer(segmenter, request) for request in SESSION]
    for request in random_requests(100, seed=3):
        answer(segmenter, request)
    assert [answer(segmenter, request) for request in SESSION] == before


clicks = st.tuples(
    st.floats(0, 1, exclude_max=True, width=32), st.floats(0, 1, exclude_max=True, width=32), st.booleans()
)
rectangles = st.tuples(*[st.floats(0, 0.875, width=16)] * 2, *[st.floats(0.9375, 1, width=16)] * 2)
requests = st.builds(
    Request,
    image=st.integers(0, len(SIZES) - 1),
    clicks=st.lists(clicks, min_size=1, max_size=3).map(tuple),
    box=st.none() | rectangles,
    mask=st.none() | rectangles,
    model_size=st.sampled_from([256, 256, 256, 512]),
)


@settings(max_examples=10)
@given(st.lists(requests, min_size=1, max_size=3))
def test_any_history_is_pure(tiny_model: Inter2Former, asked: list[Request]) -> None:
    """R1: warm, after each other and again, against a Segmenter that remembers nothing."""
    segmenter = Segmenter(tiny_model)
    first = [answer(segmenter, request) for request in asked]
    assert [answer(segmenter, request) for request in asked] == first
    assert [cold(tiny_model, request) for request in asked] == first


@pytest.mark.parametrize("cache_bytes", [3_000_000, 2**30])
def test_nobody_gets_the_mask_of_another(tiny_model: Inter2Former, cache_bytes: int) -> None:
    """R2: eight threads, four images of different size, interleaved; with and without entries leaving."""
    serial = Segmenter(tiny_model)
    asked = random_requests(25, seed=4)
    expected = {request: answer(serial, request) for request in asked}

    shared = Segmenter(tiny_model, cache_bytes=cache_bytes)

    def work(thread: int) -> bool:
        order = np.random.default_rng(thread).permutation(len(asked))
        return all(answer(shared, asked[index]) == expected[asked[index]] for index in order[:12])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert shared.cache_info().nbytes <= cache_bytes


if __name__ == "__main__":  # the other process
    import torch

    from inter2former import load_segmenter

    torch.set_num_threads(1)
    cold_segmenter = load_segmenter(sys.argv[1])
    told = [Request.from_json(fields) for fields in json.loads(Path(sys.argv[2]).read_text())]
    print(json.dumps([answer(cold_segmenter, request) for request in told]))
