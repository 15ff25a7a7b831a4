"""The predicted IoU: what the evidence says about masks drawn here, and the little network on top."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_tiny_model

from inter2former import Box, Click, ConfigError, Segmenter, load_segmenter, score
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import ModelConfig, tiny

N = len(score.EVIDENCE)
WEIGHTS = tuple(np.random.default_rng(0).normal(0, 0.3, 3 * (N + 2) + 1).tolist())


def field(height=40, width=60, box=(10, 15, 30, 45), sure=6.0):
    """Logits: `sure` inside the box (top, left, bottom, right), -`sure` outside."""
    logits = np.full((height, width), -sure, np.float32)
    logits[box[0] : box[2], box[1] : box[3]] = sure
    return logits


def named(*arguments):
    return dict(zip(score.EVIDENCE, score.evidence(*arguments), strict=True))


CENTRE = (20, 30, True)


def test_a_sure_mask_that_nothing_changed():
    logits = field()
    e = named(logits, [CENTRE, (5, 5, False)], logits > 0)
    assert e["agreement"] == 1
    assert e["unsure"] == 0
    assert e["fragments"] == 0
    assert e["area"] == pytest.approx(math.log(600 / 2400))
    assert e["centred"] == 1
    assert e["clicks"] == pytest.approx(math.log(3))
    assert e["positive"] == 0
    assert e["inside"] == pytest.approx(6, abs=0.01)


def test_the_last_click_tells_how_wrong_the_mask_before_was():
    logits, before = field(), field(box=(10, 15, 30, 25)) > 0
    near, far = (named(logits, [CENTRE, (20, x, True)], before)["error_depth"] for x in (26, 40))
    assert near < far
    assert near == pytest.approx(math.log(2 / math.sqrt(600) + 0.02))
    inner = named(logits, [CENTRE, (20, 18, False)], before)["error_depth"]
    assert inner == pytest.approx(math.log(4 / math.sqrt(600) + 0.02))  # to the left border of the mask


def test_doubt_and_fragments_are_seen():
    logits = field(sure=0.5)
    assert named(logits, [CENTRE], None)["unsure"] == 2  # no more than that
    logits = field()
    logits[0:10, 0:10] = 6
    assert named(logits, [CENTRE], None)["fragments"] == pytest.approx(1 / 7)


def test_an_empty_mask_has_no_evidence():
    assert score.evidence(np.full((4, 4), -3, np.float32), [CENTRE], None) is None
    assert score.promise(np.full((4, 4), -3, np.float32)) == 0


@pytest.mark.parametrize("logit", [-1e4, 1e4, 1e-9])
@pytest.mark.parametrize("clicks", [[], [(0, 0, True)], [(3, 3, False)]])
@pytest.mark.parametrize("before", [None, False, True])
def test_extreme_logits_and_prompts_give_bounded_numbers(logit, clicks, before):
    logits = np.full((4, 4), logit, np.float32)
    logits[1, 1] = 1
    numbers = score.evidence(logits, clicks, None if before is None else np.full((4, 4), before))
    assert len(numbers) == N
    assert all(abs(number) < 8 for number in numbers)
    assert 0 <= score.predict(numbers, WEIGHTS) <= 1


def test_weights_are_a_network_of_one_hidden_layer():
    numbers = np.linspace(-1, 1, N)
    W, b, v = (np.array(part) for part in (WEIGHTS[: 3 * N], WEIGHTS[3 * N : 3 * N + 3], WEIGHTS[-4:-1]))
    z = v @ np.tanh(W.reshape(3, N) @ numbers + b) + WEIGHTS[-1]
    assert score.predict(numbers, WEIGHTS) == pytest.approx(1 / (1 + math.exp(-z)))
    assert score.predict(numbers, [w * 1e6 for w in WEIGHTS]) in (pytest.approx(0), pytest.approx(1))


@pytest.mark.parametrize("weights", [(1.0,), (0.0,) * (N + 2), (0.0,) * (N + 4), (math.nan,) * (N + 3)])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ConfigError, match="score_weights"):
        dataclasses.replace(tiny(), score_weights=weights)


# -- in use ----------------------------------------------------------------------------------------------------------

CLICKS = [Click(80, 60), Click(40, 30), Click(120, 90), Click(80, 60, positive=False)]


@pytest.fixture
def calibrated() -> ModelConfig:
    return dataclasses.replace(tiny(), score_weights=WEIGHTS)


def test_weights_travel_with_the_checkpoint(calibrated, image, tmp_path: Path):
    path = tmp_path / "calibrated.safetensors"
    save_checkpoint(path, make_tiny_model(calibrated))
    assert load_checkpoint(path).model.config.score_weights == WEIGHTS
    result = load_segmenter(path).segment(image, CLICKS)
    assert result.score == score.predict(result.evidence, WEIGHTS)


def test_weights_change_the_score_and_nothing_else(calibrated, image):
    plain, other = (Segmenter(make_tiny_model(c), model_size=256).segment(image, CLICKS) for c in (tiny(), calibrated))
    assert plain.score != other.score
    assert plain.evidence == other.evidence
    assert np.array_equal(plain.logits(), other.logits())


def test_the_score_does_not_depend_on_what_was_asked_before(calibrated, image):
    warm = Segmenter(make_tiny_model(calibrated), model_size=256)
    step_by_step = [warm.segment(image, CLICKS[:n]).score for n in range(1, len(CLICKS) + 1)]
    cold = [
        Segmenter(make_tiny_model(calibrated), model_size=256, cache_bytes=0).segment(image, CLICKS[:n]).score
        for n in range(1, len(CLICKS) + 1)
    ]
    assert step_by_step == cold


@pytest.mark.parametrize("size", [256, 768])  # 768: every sixth pixel, which is no divisor of a token
def test_every_prompt_and_size_has_evidence(segmenter: Segmenter, image, size: int):
    mask = np.zeros(image.shape[:2], bool)
    mask[40:80, 60:110] = True
    box = segmenter.segment(image, [], box=Box(50, 30, 120, 90), model_size=size)
    given = segmenter.segment(image, [CLICKS[0]], initial_mask=mask, model_size=size)
    names = score.EVIDENCE
    assert box.evidence[names.index("clicks")] == 0
    assert box.evidence[names.index("agreement")] == 0
    assert 0 < given.evidence[names.index("agreement")] <= 1
    assert segmenter.segment(image, [Click(3, 3, positive=False)], model_size=size).evidence is None
    area = given.mask.mean()
    assert given.evidence[names.index("area")] == pytest.approx(math.log(area), abs=0.3)
