"""Choosing small(): candidates are possible models, trained alike, resumed, measured; on tiny models here."""

import json

import pytest
import torch
from train_pack import write_pack

from benchmarks import candidates, results
from inter2former.checkpoints import load_checkpoint
from inter2former.config import small, tiny
from inter2former.nn.model import Inter2Former
from train import loop
from train.data import DrawConfig, read_pack

SETTINGS = loop.TrainConfig(
    max_steps=2, batch=2, sizes=(64,), workers=0, amp=False, warmup_steps=2, draw=DrawConfig(scale=(0.25, 4.0))
)


def test_candidates_are_models_that_differ_in_what_they_say():
    made = candidates.candidates(small(), list(candidates.CHANGES))
    assert len(made) >= 4
    assert len({config.to_json() for config in made.values()}) == len(made)
    with torch.device("meta"):  # shapes alone
        for config in made.values():
            Inter2Former(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("pack") / "pack", photos=2)


def test_a_finished_candidate_is_not_trained_again(folder, tmp_path):
    pack = read_pack([folder])
    rows = []
    path = candidates.train(tiny(), pack, tmp_path / "a", SETTINGS, rows.append)
    assert load_checkpoint(path).provenance["steps"] == 2
    n = len(rows)
    assert candidates.train(tiny(), pack, tmp_path / "a", SETTINGS, rows.append) == path
    assert len(rows) == n


def test_the_table_and_the_picture(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(candidates, "small", tiny)
    monkeypatch.setattr(candidates, "CHANGES", {"small": {}, "one expert": {"n_experts": 1}})
    monkeypatch.setattr(candidates, "CLICKS", 5)
    call = {"batch": 2, "crop": [64], "workers": 0, "limit": 1, "size": 256, "runs": 1, "write": True}
    candidates.main([folder], tmp_path / "runs", max_steps=2, **call)
    content = json.loads((tmp_path / "results" / "candidates.json").read_text())
    assert [row["candidate"] for row in content["rows"]] == ["small", "one expert"]
    assert all(row["steps"] == 2 and row["session_ms"] > 0 for row in content["rows"])
    assert all({"miou@1", "miou@3", "miou@5", "noc90"} <= set(row) for row in content["rows"])
    assert content["rows"][0]["parameters_m"] >= content["rows"][1]["parameters_m"]
    assert (tmp_path / "results" / "candidates.png").read_bytes().startswith(b"\x89PNG")
    assert "one expert" in capsys.readouterr().out
