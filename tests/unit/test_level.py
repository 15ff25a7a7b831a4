"""Where logits are cut: what is seen of masks drawn here, the choice, and what it does to answers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from synthetic import make_image, make_tiny_model

from inter2former import Box, Click, ConfigError, Segmenter, level, score
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import ModelConfig, tiny
from inter2former.level import FEATURES, LEVELS, ZERO

N = len(FEATURES)
FREE = np.ones((4, level.CELLS**2), np.float32)
CENTRE = [(20, 30, True)]


def prefer(**features: float) -> tuple[float, ...]:
    """Weights of a network that wants these numbers to be large."""
    row = [0.0] * N
    for name, weight in features.items():
        row[FEATURES.index(name)] = weight
    return (*row, 0.0, 1.0)


def hill(height: int = 40, width: int = 60, slope: float = 0.1) -> npt.NDArray[np.float32]:
    """Logits that fall from 1.45 in the middle, the same along rows and columns."""
    y, x = np.abs(np.arange(height) - 20), np.abs(np.arange(width) - 30)
    return (1.45 - slope * np.maximum(y[:, None], x[None])).astype(np.float32)


def named(
    logits: npt.NDArray[np.float32], links: npt.NDArray[np.float32] = FREE, zero: float = 0.0
) -> dict[str, float]:
    numbers = level.describe(logits, links, CENTRE, None)[LEVELS.index(zero)]
    assert numbers is not None
    return dict(zip(FEATURES, numbers, strict=True))


def test_each_level_is_described_as_a_mask_of_its_own() -> None:
    logits = hill()
    described = level.describe(logits, FREE, CENTRE, logits > 0.5)
    for zero, numbers in zip(LEVELS, described, strict=True):
        assert numbers is not None
        evidence = score.evidence(logits - np.float32(zero), CENTRE, logits > 0.5)
        assert numbers[: len(score.EVIDENCE)] == evidence
        assert numbers[-1] == zero
    areas = [numbers[FEATURES.index("area")] for numbers in described if numbers is not None]
    assert areas == sorted(areas, reverse=True)
    assert len(set(areas)) == len(LEVELS)


def test_shapes_are_seen() -> None:
    square = named(hill())
    assert square["fill"] == 1
    assert square["aspect"] == 0
    assert square["cut_off"] == 0
    assert square["border"] == pytest.approx(0, abs=1e-3)
    logits = hill()
    logits[:, :30] = -5.0  # the right half alone
    half = named(logits)
    assert half["aspect"] == pytest.approx(math.log(29 / 15))
    logits[8:20, 35:] = -5.0
    assert named(logits)["fill"] < 0.8
    assert named(logits)["ragged"] > half["ragged"]
    assert named(np.full((40, 60), 1.5, np.float32))["cut_off"] == 1


def test_a_border_along_outlines_is_told_from_one_across_a_surface() -> None:
    """Links are weak around the square that the logits end at zero with, and nowhere else."""
    grid = FREE.reshape(4, level.CELLS, level.CELLS).copy()
    inside = np.zeros((level.CELLS, level.CELLS), bool)
    inside[:40, :60] = hill() > 0
    for link, (dy, dx) in zip(grid, ((0, 1), (1, 0), (1, 1), (1, -1)), strict=True):
        link[inside != np.roll(inside, (-dy, -dx), (0, 1))] = 0.01
    links = grid.reshape(4, -1)
    at = {zero: named(hill(), links, zero) for zero in LEVELS}
    for name in ("border", "leak"):
        assert min(LEVELS, key=lambda zero: at[zero][name]) == 0.0


def test_levels_without_a_mask_are_passed_over() -> None:
    described = level.describe(hill() - np.float32(1.0), FREE, CENTRE, None)
    empty = [zero for zero, numbers in zip(LEVELS, described, strict=True) if numbers is None]
    assert empty == [zero for zero in LEVELS if zero >= 0.45]
    assert level.choose(described, prefer(level=1.0)) == 0.3
    assert level.choose(described, prefer(level=-1.0)) == LEVELS[0]
    assert level.choose([None] * len(LEVELS), prefer(level=1.0)) == 0.0


def test_the_choice_is_a_network_of_one_hidden_layer() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(len(LEVELS), N))
    W, b, v = rng.normal(size=(5, N)), rng.normal(size=5), rng.normal(size=5)
    weights = (*W.ravel(), *b, *v)
    assert level.hidden_units(len(weights)) == 5
    assert level.hidden_units(len(weights) + 1) == 0
    best = int((np.tanh(numbers @ W.T + b) @ v).argmax())
    assert level.choose([tuple(row) for row in numbers], weights) == LEVELS[best]


@pytest.mark.parametrize(
    "changes",
    [
        {"level_weights": (1.0,), "walk_trust": 0.1},
        {"level_weights": (0.0,) * (N + 3), "walk_trust": 0.1},
        {"level_weights": (math.nan,) * (N + 2), "walk_trust": 0.1},
        {"level_weights": (0.0,) * (N + 2), "walk_trust": 0.0},
    ],
)
def test_weights_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="level_weights"):
        dataclasses.replace(tiny(), **changes)  # type: ignore[arg-type]


# -- in use ----------------------------------------------------------------------------------------------------------


def with_levels(**features: float) -> ModelConfig:
    return dataclasses.replace(tiny(), walk_trust=0.05, level_weights=prefer(**features) if features else ())


def areas(config: ModelConfig, **prompts: object) -> list[int]:
    """Of the mask after each click."""
    segmenter = Segmenter(make_tiny_model(config), model_size=256)
    clicks = [Click(80, 60), Click(40, 30), Click(120, 90, positive=False)]
    return [
        int(segmenter.segment(make_image(), clicks[:n], **prompts).mask.sum())  # type: ignore[arg-type]
        for n in range(1, len(clicks) + 1)
    ]


def test_masks_follow_the_choice() -> None:
    low, zero, high = (areas(with_levels(**wanted)) for wanted in ({"level": -1.0}, {}, {"level": 1.0}))
    assert low[0] > zero[0] > high[0]
    assert areas(with_levels(clicks=1.0)) == areas(
        with_levels(positive=1.0)
    )  # the same for all levels: the first of them


def test_boxes_and_given_masks_say_how_large_the_object_is() -> None:
    given = np.zeros((120, 160), bool)
    given[30:90, 40:120] = True
    for prompts in ({"box": Box(40, 30, 120, 90)}, {"initial_mask": given}):
        assert areas(with_levels(level=-1.0), **prompts) == areas(with_levels(), **prompts)


def test_weights_travel_with_the_checkpoint(tmp_path: Path) -> None:
    config = with_levels(level=1.0)
    save_checkpoint(tmp_path / "levels.safetensors", make_tiny_model(config))
    assert load_checkpoint(tmp_path / "levels.safetensors").model.config == config


def test_zero_is_one_of_the_levels() -> None:
    assert LEVELS[ZERO] == 0.0
    assert list(LEVELS) == sorted(LEVELS)
