"""Calibration: the fit on answers whose truth is known, the report, the file, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import make_tiny_model
from train_pack import write_pack
from typer.testing import CliRunner

from inter2former import evaluation, score
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.errors import ConfigError
from inter2former.segmenter import Segmenter
from train import __main__ as cli
from train import calibrate
from train.calibrate import Answer

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_but_the_score_changes(tmp_path: Path, dtype: torch.dtype) -> None:
    path, out = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    digest = save_checkpoint(path, make_tiny_model(), provenance={"recipe": "random"}, dtype=dtype)
    weights = tuple(math.sin(i) for i in range(N + 3))
    assert calibrate.write(path, out, weights, {"answers": 7}) == load_checkpoint(out).digest
    before, after = load_checkpoint(path), load_checkpoint(out)
    assert after.model.config.score_weights == weights
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
