"""The simulated annotator (train.simulate)."""

from __future__ import annotations

import numpy as np
import pytest

from inter2former.config import tiny
from train import simulate
from train.simulate import Annotator, ClickConfig

PLAIN = ClickConfig(box=0, mask=0, random_first=0, jitter=0, slip=0, spread=1.0)


def square(size: int = 64, top: int = 20, left: int = 10, side: int = 21) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def annotator(target: np.ndarray, config: ClickConfig, seed: int = 0) -> Annotator:
    return Annotator(target, (64, 64), tiny(), config, np.random.default_rng(seed))


def test_the_first_click_is_the_deepest_point_and_painted_as_a_disc() -> None:
    clicked = annotator(square(), PLAIN)
    assert np.argwhere(clicked.clicked).tolist() == [[30, 20]]
    assert (clicked.state == 4).sum() == 81  # radius 5
    assert set(np.unique(clicked.state)) == {tiny().initial_reference, 4}


def test_the_image_border_counts_as_outside() -> None:
    mask = np.zeros((64, 64), bool)
    mask[:, :31] = True
    row, column = simulate.pick(mask, np.random.default_rng(0)) or (-1, -1)
    assert column == 15
    assert 15 <= row <= 48


def test_first_clicks_stay_inside_whatever_the_start() -> None:
    config = ClickConfig(box=0, mask=0, random_first=0.5, jitter=8)
    thin = square(side=3)
    for seed in range(40):
        clicked = annotator(thin, config, seed)
        assert clicked.clicked.any()
        assert not (clicked.clicked & ~thin).any()


@pytest.mark.parametrize(
    ("prediction", "positive"),
    [
        (square(left=24), False),
        (square(side=7), True),
        (np.zeros((64, 64), bool), True),
        (np.ones((64, 64), bool), False),
    ],
    ids=["shifted: larger excess wins or ties to negative", "too small", "empty", "everything"],
)
def test_corrections_fall_into_the_larger_error(prediction: np.ndarray, positive: bool) -> None:
    clicked = annotator(square(), PLAIN)
    before = clicked.clicked.copy()
    clicked.round(prediction)
    new = clicked.clicked & ~before
    error = square() & ~prediction if positive else prediction & ~square()
    assert new.sum() == 1
    assert error[new].all()
    assert (clicked.state[new] == (4 if positive else 0)).all()


def test_a_right_prediction_gets_no_click_and_is_written_down() -> None:
    clicked = annotator(square(), PLAIN)
    before = clicked.clicked.copy()
    clicked.round(square())
    assert np.array_equal(before, clicked.clicked)
    assert (clicked.state[square()] >= 3).all()
    assert (clicked.state[~square()] <= 1).sum() > 3000


def test_no_clicks_in_the_padding() -> None:
    target = square(top=0, left=0)
    clicked = Annotator(target, (32, 40), tiny(), PLAIN, np.random.default_rng(0))
    clicked.round(np.ones((64, 64), bool))
    assert not clicked.clicked[32:].any()
    assert not clicked.clicked[:, 40:].any()


def test_a_box_start_excludes_what_is_outside_and_keeps_most_of_the_object() -> None:
    for seed in range(20):
        boxed = annotator(square(), ClickConfig(box=1, box_only=1), seed)
        assert not boxed.clicked.any()
        assert set(np.unique(boxed.state)) == {1, tiny().initial_reference}
        assert (boxed.state[square()] != 1).mean() > 0.75
        assert (boxed.state == 1).mean() > 0.5


def test_a_mask_start_holds_a_wrong_mask_and_its_first_correction() -> None:
    starts = [annotator(square(), ClickConfig(box=0, mask=1, slip=0), seed) for seed in range(20)]
    assert all({1, 2} <= set(np.unique(s.state)) for s in starts)
    assert any(3 in s.state for s in starts)
    assert sum(bool(s.clicked.any()) for s in starts) > 15


def test_disturbed_masks_stay_near_the_truth_but_differ() -> None:
    truth = square(size=128, side=60)
    overlaps = []
    for seed in range(40):
        wrong = simulate.disturb(truth, np.random.default_rng(seed))
        overlaps.append((wrong & truth).sum() / (wrong | truth).sum())
    assert np.median(overlaps) > 0.6
    assert sum(o < 0.999 for o in overlaps) > 35


def test_rounds_follow_a_truncated_geometric_distribution() -> None:
    config, rng = ClickConfig(max_rounds=3), np.random.default_rng(0)
    counts = np.bincount([simulate.draw_rounds(config, rng) for _ in range(4000)], minlength=4) / 4000
    weights = config.decay ** np.arange(4)
    assert np.abs(counts - weights / weights.sum()).max() < 0.03


def test_an_object_that_is_clicked_to_the_end_never_repeats_a_pixel() -> None:
    clicked, rng = annotator(square(), ClickConfig(box=0, mask=0, slip=0.5)), np.random.default_rng(1)
    for n in range(2, 12):
        clicked.round(rng.random((64, 64)) > 0.5)
        assert clicked.clicked.sum() >= n
