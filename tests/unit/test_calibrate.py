"""Calibration: the fit on answers whose truth is known, the report, the file, the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import make_tiny_model
from train_pack import write_pack
from typer.testing import CliRunner

from inter2former import evaluation, level, score
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import tiny
from inter2former.errors import ConfigError
from inter2former.runtime.packing import pack
from inter2former.segmenter import Segmenter
from train import __main__ as cli
from train import calibrate
from train.calibrate import Answer, Pass

N = len(score.EVIDENCE)


def invented(n: int = 300, seed: int = 0) -> list[Answer]:
    """Answers whose IoU follows from two kinds of evidence."""
    evidence = np.random.default_rng(seed).normal(2, 3, (n, N))
    ious = 1 / (1 + np.exp(-(0.4 * evidence[:, 0] - 0.5 * evidence[:, 4])))
    return [
        Answer(f"s{i % 2}", 1 + i % 5, tuple(e), 0.5, float(iou))
        for i, (e, iou) in enumerate(zip(evidence, ious, strict=True))
    ]


def test_the_fit_finds_what_there_is_to_find() -> None:
    weights = calibrate.fit(invented())
    assert score.hidden_units(len(weights)) == calibrate.UNITS
    assert weights == calibrate.fit(invented())
    unseen = invented(seed=1)
    assert all(error < 0.06 for error in calibrate.errors(unseen, weights).values())
    assert all(error > 0.2 for error in calibrate.errors(unseen).values())


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="19 masks are too few"):
        calibrate.fit(invented(19))


def test_errors_are_means_over_sources() -> None:
    answers = [Answer("a", 1, None, 0.0, 0.2), Answer("a", 1, None, 0.0, 0.4), Answer("b", 1, None, 1.0, 0.3)]
    assert calibrate.errors(answers) == {"score_mae@1": pytest.approx(0.5)}
    assert calibrate.errors(answers, (0.0,) * (N + 3)) == {"score_mae@1": pytest.approx(0.3)}  # an empty mask scores 0


def test_answers_hold_what_evaluation_measured(segmenter: Segmenter) -> None:
    truth = np.zeros((60, 80), bool)
    truth[10:40, 20:60] = True
    image = np.where(truth[..., None], np.uint8(220), np.uint8(40)).repeat(3, 2)
    targets = [evaluation.Target("s", name, image, truth) for name in "ab"]
    scores: list[evaluation.Score] = []
    answers = calibrate.collect(segmenter, targets, 3, scores.append)
    assert [answer.clicks for answer in answers] == [1, 2, 3] * 2
    assert [answer.iou for answer in answers] == [iou for s in scores for iou in s.ious]
    assert answers[:3] == answers[3:]
    assert all(answer.evidence is not None and len(answer.evidence) == N for answer in answers)


# -- levels ----------------------------------------------------------------------------------------------------------


def invented_passes(n: int = 200, seed: int = 0) -> list[Pass]:
    """Passes whose IoU is highest where two kinds of evidence are equal; some levels are empty."""
    rng = np.random.default_rng(seed)
    passes = []
    for index in range(n):
        numbers = rng.normal(2, 3, (len(level.LEVELS), len(level.FEATURES)))
        ious = np.exp(-np.abs(numbers[:, 1] - numbers[:, 12]) / 3)
        described = [None if rng.random() < 0.1 else tuple(row.tolist()) for row in numbers]
        passes.append(Pass(f"s{index % 2}", tuple(described), tuple(ious.tolist())))
    return passes


def test_the_fit_of_levels_finds_what_there_is_to_find() -> None:
    weights = calibrate.fit_levels(invented_passes(1500))
    assert level.hidden_units(len(weights)) == calibrate.LEVEL_UNITS
    assert weights == calibrate.fit_levels(invented_passes(1500))
    found = calibrate.ious_at_levels(invented_passes(seed=1), weights)
    assert found["at zero"] < 0.45
    assert found["chosen"] > found["best"] - 0.1


def test_too_few_passes_are_refused() -> None:
    nothing = Pass("s", (None,) * len(level.LEVELS), (0.0,) * len(level.LEVELS))
    with pytest.raises(ConfigError, match="19 masks are too few"):
        calibrate.fit_levels([*invented_passes(19), *[nothing] * 100])


def test_passes_hold_what_each_level_would_give() -> None:
    model = pack(make_tiny_model(dataclasses.replace(tiny(), walk_trust=0.05, island_share=0.1)))
    truth = np.zeros((256, 256), bool)
    truth[60:190, 80:200] = True
    image = np.where(truth[..., None], np.uint8(220), np.uint8(40)).repeat(3, 2)
    scores: list[evaluation.Score] = []
    passes = calibrate.collect_passes(
        model, [evaluation.Target("s", "a", image, truth)], 3, model_size=256, on_score=scores.append
    )
    assert len(passes) == 3
    assert all(one.source == "s" and len(one.described) == len(one.ious) == len(level.LEVELS) for one in passes)
    # At 256 x 256 the frame is the image: what is served differs by small holes and clicked pixels only.
    at_zero = [one.ious[level.ZERO] for one in passes]
    assert at_zero == pytest.approx(list(scores[0].ious), abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_but_scores_and_levels_change(tmp_path: Path, dtype: torch.dtype) -> None:
    path, out = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    model = make_tiny_model(dataclasses.replace(tiny(), walk_trust=0.05))
    digest = save_checkpoint(path, model, provenance={"recipe": "random"}, dtype=dtype)
    weights = tuple(math.sin(i) for i in range(N + 3))
    levels = tuple(math.cos(i) for i in range(len(level.FEATURES) + 2))
    assert calibrate.write(path, out, weights, levels, {"answers": 7}) == load_checkpoint(out).digest
    before, after = load_checkpoint(path), load_checkpoint(out)
    assert after.model.config.score_weights == weights
    assert after.model.config.level_weights == levels
    assert after.provenance == {"recipe": "random", "calibration": {"answers": 7, "of": digest}}
    for key, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[key])
    assert abs(out.stat().st_size - path.stat().st_size) < 2000


def test_the_command_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack", photos=3)
    out = tmp_path / "out.safetensors"
    arguments = f"calibrate --checkpoint {tiny_checkpoint} --data {pack} --out {out} --limit 3 --model-size 256"
    result = CliRunner().invoke(cli.app, [*arguments.split(), "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert set(figures) == {"out", "sha256", "before", "after", "on train"}
    assert set(figures["after"]) == {"score_mae@1", "score_mae@3", "score_mae@5"}
    assert load_checkpoint(out).model.config.score_weights
    result = CliRunner().invoke(cli.app, [*arguments.replace("--limit 3", "--limit 1").split()])
    assert result.exit_code == 1
    assert "too few" in result.output


def test_the_command_line_fits_levels_where_there_is_a_walk(tmp_path: Path) -> None:
    walking, out = tmp_path / "walking.safetensors", tmp_path / "out.safetensors"
    save_checkpoint(walking, make_tiny_model(dataclasses.replace(tiny(), walk_trust=0.05)))
    folder = write_pack(tmp_path / "pack", photos=3)
    arguments = f"calibrate --checkpoint {walking} --data {folder} --out {out} --limit 3 --model-size 256"
    result = CliRunner().invoke(cli.app, [*arguments.split(), "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert set(figures["IoU of passes"]) == {"at zero", "chosen", "best"}
    config = load_checkpoint(out).model.config
    assert level.hidden_units(len(config.level_weights)) == calibrate.LEVEL_UNITS
    assert config.score_weights
    result = CliRunner().invoke(cli.app, arguments.replace(str(walking), str(out)).split())
    assert result.exit_code == 0, result.output
    assert "IoU by level" in result.output
