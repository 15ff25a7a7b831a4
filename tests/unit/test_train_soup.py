"""The mean of weights (train.soup)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from typer.testing import CliRunner

from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import tiny
from inter2former.nn.model import Inter2Former
from train.__main__ import app


def write(path: Path, seed: int, **changes: object) -> Inter2Former:
    torch.manual_seed(seed)
    model = Inter2Former(dataclasses.replace(tiny(), **changes))  # type: ignore[arg-type]
    save_checkpoint(path, model, provenance={"licence": "mine", "seed": seed})
    return model


def test_each_weight_is_the_mean(tmp_path: Path) -> None:
    models = [write(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    files = [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    result = CliRunner().invoke(app, ["soup", *files, "--out", str(tmp_path / "soup.safetensors")])
    assert result.exit_code == 0, result.output
    loaded = load_checkpoint(tmp_path / "soup.safetensors")
    assert [one["seed"] for one in loaded.provenance["ingredients"]] == [1, 2]
    assert loaded.provenance["licence"] == "mine"
    first, second = (model.state_dict() for model in models)
    for name, value in loaded.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[name] + second[name]) / 2)


def test_another_configuration_is_named(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", 1)
    write(tmp_path / "2.safetensors", 1, initial_reference=1)
    files = [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    result = CliRunner().invoke(app, ["soup", *files, "--out", str(tmp_path / "soup.safetensors")])
    assert result.exit_code == 1
    assert "Checkpoint 2 has another initial_reference" in result.output
    assert not (tmp_path / "soup.safetensors").exists()
