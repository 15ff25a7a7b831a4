"""Distillation: a small teacher made here, views looked at once, both stages, kill and resume, refusals."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import make_tiny_model
from train_pack import write_pack
from typer.testing import CliRunner

from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import tiny
from inter2former.errors import ConfigError
from inter2former.nn.model import Inter2Former
from train import __main__ as cli
from train import distill, loop
from train.data import DrawConfig, Pack, read_pack

CPU = torch.device("cpu")
CLICKS = loop.TrainConfig(
    sizes=(64,), dense_share=0.0, warmup_steps=2, workers=0, amp=False, draw=DrawConfig(scale=(0.25, 4.0))
)
CONFIG = distill.DistillConfig(max_steps=6, encoder_share=0.5, batch=2, sizes=(64, 96), workers=0, clicks=CLICKS)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return read_pack([write_pack(tmp_path_factory.mktemp("pack") / "pack", photos=2)])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher wider than the student, in the released input convention."""
    config = dataclasses.replace(
        tiny(), name="teacher", embed_dim=24, up_channels=(24, 8, 4, 4), input_convention="released"
    )
    path = tmp_path_factory.mktemp("teacher") / "wide.safetensors"
    save_checkpoint(path, make_tiny_model(config, seed=3), provenance={"licence": "none"})
    return path


def student() -> Inter2Former:
    torch.manual_seed(0)
    return Inter2Former(tiny())


def run(teacher: Path, pack: Pack, out: Path, config: distill.DistillConfig = CONFIG, **more: Any) -> Path:
    opened = distill.open_teacher(teacher, 128, CPU)
    return distill.distill(opened, pack, out, config, student(), device=CPU, **more)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_encoder_comes_to_see_what_the_teacher_sees(wide: Path, pack: Pack, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, max_steps=31, encoder_share=0.97, lr=1e-2, views=1, sizes=(64,))
    run(wide, pack, tmp_path, config)
    errors = [row["mse"] for row in rows(tmp_path / "encoder.jsonl")]
    assert len(errors) == 30
    assert np.mean(errors[-5:]) < 0.7 * np.mean(errors[:3])


@pytest.fixture(scope="module")
def whole(wide: Path, pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that nothing interrupted."""
    return run(wide, pack, tmp_path_factory.mktemp("whole") / "run")


def test_one_file_comes_out_that_everything_loads(wide: Path, whole: Path) -> None:
    loaded = load_checkpoint(whole)
    assert loaded.model.config == tiny()
    assert loaded.provenance["teacher"]["name"] == "wide.safetensors"
    assert loaded.provenance["teacher"]["digest"] == load_checkpoint(wide).digest
    assert loaded.provenance["licence"] == "none"
    assert [row["step"] for row in rows(whole.parent / "log.jsonl") if "loss" in row] == [1, 2, 3]
    assert all(
        "iou" in row for row in rows(whole.parent / "log.jsonl") if "loss" in row
    )  # clicks from the first step on


def test_a_teacher_of_the_same_width_needs_no_projection(tiny_checkpoint: Path) -> None:
    teacher = distill.open_teacher(tiny_checkpoint, 128, CPU)
    trainer = distill.EncoderTrainer(student(), teacher.width, CONFIG, CPU)
    assert isinstance(trainer.project, torch.nn.Identity)


@pytest.mark.parametrize(("stage", "at"), [("encoder", 2), ("clicks", 1)])
def test_a_killed_run_continues_as_if_nothing_had_happened(
    wide: Path, pack: Pack, whole: Path, tmp_path: Path, stage: str, at: int
) -> None:

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == at and (("mse" in row) == (stage == "encoder")) and "progress" in row:
            raise KeyboardInterrupt

    often = dataclasses.replace(CONFIG, save_every_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(wide, pack, tmp_path / "cut", often, report=kill)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut" / "tokens").iterdir()}
    resumed = run(wide, pack, tmp_path / "cut", often, resume=True)
    assert {file: file.stat().st_mtime_ns for file in files} == files  # the teacher did not look twice
    for one, other in zip(
        load_checkpoint(whole).model.state_dict().values(),
        load_checkpoint(resumed).model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_folder_belongs_to_one_run(wide: Path, tiny_checkpoint: Path, pack: Pack, whole: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run already"):
        run(wide, pack, whole.parent)
    with pytest.raises(ConfigError, match="teacher changed"):
        run(tiny_checkpoint, pack, whole.parent, resume=True)


def test_views_are_the_whole_photo_and_crops_of_it(pack: Pack) -> None:
    views = distill.choose_views(pack, 3, seed=1)
    assert views == distill.choose_views(pack, 3, seed=1)
    assert len(views) == 3 * len(pack.photos)
    for view in views:
        height, width = pack.photos[view.photo].rgb.shape[:2]
        x0, y0, x1, y1 = view.rect
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
    assert views[0].rect == (0, 0, 128, 96)


def test_what_is_taught_lies_where_the_image_lies(wide: Path, pack: Pack, tmp_path: Path) -> None:
    teacher = distill.open_teacher(wide, 128, CPU)
    views = distill.choose_views(pack, 1, seed=0)
    distill.look(teacher, pack, views, tmp_path, 6)
    batch = distill.Batches(pack, views, tmp_path, CONFIG, 0)[0]
    size = batch["image"].shape[1]
    assert batch["taught"].shape[1:] == (24, size // 16, size // 16)
    for valid, known, image in zip(batch["valid"], batch["known"], batch["image"], strict=True):
        assert known.sum() == valid.prod() / 256
        assert known[: valid[0] // 16, : valid[1] // 16].all()
        assert not image[valid[0] :].any()
    assert float(batch["taught"].abs().sum()) > 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"minutes": 0.0}, "minutes"),
        ({"max_steps": 0}, "max-steps"),
        ({"encoder_share": 1.0}, "encoder-share"),
        ({"views": 0}, "views"),
        ({"sizes": (100,)}, "sizes"),
        ({"batch": 0}, "batch"),
    ],
)
def test_impossible_settings_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(CONFIG, **fields)


# -- the SAM family --------------------------------------------------------------------------------------------------


def test_a_teacher_folder_holds_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="Pickled weights"):
        distill.open_teacher(tmp_path, 1024, CPU)


def test_without_transformers_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        distill.open_teacher(tmp_path, 1024, CPU)


@pytest.mark.filterwarnings("default")
def test_a_sam_teaches(pack: Pack, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    parts = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "mlp_dim": 8}
    vision = {**parts, "output_channels": 8, "image_size": 64, "window_size": 2, "global_attn_indexes": [0]}
    config = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 8, "image_size": 64, "mask_input_channels": 4},
        mask_decoder_config={**parts, "iou_head_hidden_dim": 8},
    )
    torch.manual_seed(0)
    transformers.SamModel(config).save_pretrained(tmp_path / "sam")
    teacher = distill.open_teacher(tmp_path / "sam", 1024, CPU)
    assert (teacher.width, teacher.name) == (8, "sam")
    assert teacher.tokens(pack.photos[0].rgb).shape == (8, 3, 4)  # 96 x 128 pixels in a square of 64
    out = distill.distill(
        teacher, pack, tmp_path / "run", dataclasses.replace(CONFIG, max_steps=2), student(), device=CPU
    )
    assert load_checkpoint(out).provenance["teacher"]["kind"] == "SamModel"


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_line(wide: Path, tmp_path: Path) -> None:
    folder = write_pack(tmp_path / "pack", photos=2)
    arguments = (
        f"distill --teacher {wide} --data {folder} --out {tmp_path / 'run'} --config tiny --max-steps 2 --batch 2 "
        "--size 64 --workers 0 --teacher-size 128 --views 1 --probe-objects 0 --device cpu"
    ).split()
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "model.safetensors").is_file()
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert "holds a run already" in result.output
