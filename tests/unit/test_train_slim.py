"""Taking residual blocks out by least squares (train.slim)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import tiny
from inter2former.nn.model import Inter2Former
from tests.unit.train_pack import write_pack
from train.__main__ import app
from train.slim import without_stage


def model(weak: float = 1.0) -> Inter2Former:
    torch.manual_seed(0)
    made = Inter2Former(tiny()).eval()
    for lateral in made.canny_net.laterals:
        torch.nn.init.normal_(lateral.weight, 0.0, 0.3)
    with torch.no_grad():
        for block in made.canny_net.stages.modules():
            if isinstance(block, torch.nn.Conv2d):
                block.weight *= weak
    return made


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_convolution_in_front_takes_over(stage: int) -> None:
    full = model(0.3)
    images = [torch.randn(1, 3, 128, 128) for _ in range(3)]
    slim, explained = without_stage(full, stage, images)
    assert slim.config.edge_blocks == tuple(0 if index == stage else 1 for index in range(4))
    assert 0.6 < explained <= 1
    dropped = Inter2Former(slim.config).eval()
    dropped.load_state_dict({k: v for k, v in full.state_dict().items() if f"canny_net.stages.{stage}." not in k})
    with torch.no_grad():
        want, found, without = (m.encode_batch(images[0]).edges[3 - stage] for m in (full, slim, dropped))
    assert (found - want).norm() < 0.7 * (without - want).norm()  # better than leaving the blocks out


def test_a_stage_without_blocks_is_named() -> None:
    slim, _ = without_stage(model(), 2, [torch.randn(1, 3, 64, 64)])
    with pytest.raises(ValueError, match="Stage 2 has no residual blocks"):
        without_stage(slim, 2, [torch.randn(1, 3, 64, 64)])


def test_command(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "full.safetensors", model(), provenance={"licence": "mine"})
    arguments = ["slim", "--data", str(write_pack(tmp_path / "pack")), "--batches", "1", "--out"]
    out = tmp_path / "slim.safetensors"
    given = [*arguments, str(out), "--checkpoint", str(tmp_path / "full.safetensors")]
    result = CliRunner().invoke(app, [*given, "--stage", "0", "--stage", "3"])
    assert result.exit_code == 0, result.output
    loaded = load_checkpoint(out)
    assert loaded.model.config.edge_blocks == (0, 1, 1, 0)
    assert loaded.provenance["licence"] == "mine"
    assert loaded.provenance["slim"]["stages"] == [0, 3]
    refused = CliRunner().invoke(app, [*given, "--stage", "7"])
    assert refused.exit_code == 1
    assert "Stage 7" in refused.output
