"""R40: weights cannot run code and are what they say. Every way a file can be wrong has its own sentence."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from inter2former.checkpoints import (
    convert_released,
    from_released,
    load_checkpoint,
    released_shapes,
    save_checkpoint,
)
from inter2former.config import ModelConfig, base, small, tiny
from inter2former.errors import CheckpointError, ConfigError
from inter2former.files import write_atomically
from inter2former.nn.model import Inter2Former


@pytest.fixture(scope="module")
def net() -> Inter2Former:
    torch.manual_seed(0)
    return Inter2Former(tiny()).eval()


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


# -- our format -------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(net: Inter2Former, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "m.safetensors"
    digest = save_checkpoint(path, net, provenance={"recipe": "none", "steps": 3})
    loaded = load_checkpoint(path)
    assert loaded.digest == digest
    assert loaded.provenance == {"recipe": "none", "steps": 3}
    assert loaded.model.config == net.config
    assert not loaded.model.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[key]), key
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]  # no temporary file stays


def test_a_loaded_model_can_be_trained(net: Inter2Former, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m.safetensors", net)
    model = load_checkpoint(tmp_path / "m.safetensors").model.train()
    out = model(torch.randn(1, 3, 64, 64), torch.full((1, 64, 64), 2, dtype=torch.uint8))
    out.logits.mean().backward()
    model.balance_experts()
    assert model.upsampling.stages[0].conv.weight.grad is not None


def test_half_precision_file(net: Inter2Former, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "full.safetensors", net)
    save_checkpoint(tmp_path / "half.safetensors", net, dtype=torch.float16)
    full, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.75 * full
    model = load_checkpoint(tmp_path / "half.safetensors").model
    assert model.upsampling.stages[0].conv.weight.dtype == torch.float32


def test_a_diverged_model_is_not_written(tmp_path: Path) -> None:
    model = Inter2Former(tiny())
    with torch.no_grad():
        model.upsampling.stages[0].conv.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"upsampling\.stages\.0\.conv\.bias"):
        save_checkpoint(tmp_path / "m.safetensors", model)
    with torch.no_grad():
        model.upsampling.stages[0].conv.bias[0] = 1e6
    with pytest.raises(CheckpointError, match="float16"):
        save_checkpoint(tmp_path / "m.safetensors", model, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_r40_bad_files_are_named(net: Inter2Former, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_checkpoint(good, net)
    data = good.read_bytes()
    state, metadata = parts(good)
    key = "upsampling.stages.0.conv.bias"

    def file(name: str, tensors: dict[str, torch.Tensor] | None = None, **meta: str) -> bytes:
        return safetensors.torch.save(state if tensors is None else tensors, metadata | meta)

    cases: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "not a safetensors file"),
        "truncated": (data[:-100], "not a safetensors file"),
        "trailing": (data + b"x", "not a safetensors file"),
        "garbage": (b"\x80\x04" + bytes(200), "not a safetensors file"),
        "pickle": (pickle.dumps({"a": 1}), "convert"),
        "foreign": (safetensors.torch.save({"w": torch.zeros(3)}), "not an Inter2Former checkpoint"),
        "version": (file("v", format="inter2former/9"), "not an Inter2Former checkpoint"),
        "no config": (file("c", config="{"), "bad configuration"),
        "unknown field": (file("u", config='{"wings": 2}'), "wings"),
        "wrong config": (file("w", config=small().to_json()), "does not fit"),
        "missing": (file("m", {k: v for k, v in state.items() if k != key}), f"missing {key}"),
        "extra": (file("e", state | {"bonus": torch.zeros(1)}), "not expected bonus"),
        "shape": (file("s", state | {key: torch.zeros(99)}), r"want \[8\]"),
        "nan": (file("n", state | {key: torch.full((8,), float("nan"))}), f"Not finite: {key}"),
        "provenance": (file("p", provenance="["), "bad configuration"),
    }
    for name, (content, sentence) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=sentence):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_checkpoint(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_checkpoint(tmp_path)


def test_r40_pickle_stays_in_the_converter() -> None:
    """No other file of the product unpickles, evaluates or loads torch files without weights_only."""
    root = Path(__file__).parents[2]
    forbidden = re.compile(r"\bpickle\b|torch\.load|(?<![.\w])(?:eval|exec)\(|marshal|joblib|shelve")
    found = [
        f"{path.relative_to(root)}: {match[0]}"
        for folder in ("inter2former", "backends")
        for path in (root / folder).rglob("*.py")
        if path.name != "checkpoints.py" and (match := forbidden.search(path.read_text()))
    ]
    assert not found
    converter = (root / "inter2former" / "checkpoints.py").read_text()
    assert len(re.findall(r"(?<!safetensors\.)torch\.load\(", converter)) == converter.count("weights_only=True") == 1


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "f"
    write_atomically(target, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [base(), small(), tiny()], ids=lambda c: c.name)
def test_a_configuration_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stem": "wings"}, "stem must be"),
        ({"stem": "conv"}, "stem_channels"),
        ({"encoder_heads": 7}, "encoder_heads"),
        ({"encoder_dim": 24}, "multiple of 4"),
        ({"attention_dim": 6}, "attention_dim"),
        ({"window": 7}, "window"),
        ({"anchor_size": 100}, "anchor_size"),
        ({"fusion_blocks": (12,)}, "fusion_blocks"),
        ({"up_channels": (1, 2, 3, 4)}, "embed_dim"),
        ({"code_bits": 0}, "code_bits"),
        ({"n_experts": 65}, "n_experts"),
        ({"initial_reference": 5}, "initial_reference"),
        ({"auto_sizes": (100,)}, "auto_sizes"),
        ({"edge_rule": "maybe"}, "edge_rule"),
        ({"input_convention": "maybe"}, "input_convention"),
        ({"up_norm": "maybe"}, "up_norm"),
    ],
)
def test_impossible_configurations_say_why(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig(**changes)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '{"wings": 1}'])
def test_bad_configuration_text(text: str) -> None:
    with pytest.raises(ConfigError):
        ModelConfig.from_json(text)


# -- the released format ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released() -> dict[str, torch.Tensor]:
    """A released state dict of zeros, with the fixed kernels that the release stores."""
    from inter2former.checkpoints import _fixed_tensors

    state = {key: torch.zeros(shape) for key, shape in released_shapes().items()}
    return state | {key: value.float() for key, value in _fixed_tensors().items()}


def test_released_shapes_are_the_published_ones() -> None:
    path = Path(__file__).parents[1] / "fixtures" / "model" / "released_keys.json"
    assert {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()} == released_shapes()


def test_every_released_weight_lands_in_one_place(released: dict[str, torch.Tensor]) -> None:
    marked = {key: torch.full_like(value, float(i)) for i, (key, value) in enumerate(released.items())}
    fixed = {key for key in released if "canny." in key or key == "backbone.rope.freqs"}
    state = from_released(marked | {key: released[key] for key in fixed}).state_dict()
    values = {float(value.flatten()[0]) for value in state.values()}
    assert all(bool((value == value.flatten()[0]).all()) for value in state.values())
    counters = {key for key in released if key == "step" or key.endswith(".steps")}
    assert len(values) == len(state) == len(released) - len(fixed) - len(counters)


def test_released_problems_are_named(released: dict[str, torch.Tensor]) -> None:
    key = "neck.blocks.1.ffn.select_ffn_w3"
    with pytest.raises(CheckpointError, match=f"missing {key}"):
        from_released({k: v for k, v in released.items() if k != key})
    with pytest.raises(CheckpointError, match=r"not expected decode_head\.mlp\.1\.weight"):
        from_released(released | {"decode_head.mlp.1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"select_ffn_w3 is \[8, 64, 256\], want \[8, 256, 64\]"):
        from_released(released | {key: torch.zeros(8, 64, 256)})
    with pytest.raises(CheckpointError, match="fixed kernel"):
        from_released(released | {"edge_detector.canny.sobh.weight": torch.ones(1, 1, 3, 3)})
    with pytest.raises(CheckpointError, match="Not tensors: step"):
        from_released(released | {"step": 7})
    with pytest.raises(CheckpointError, match="Not finite"):
        from_released(released | {key: torch.full((8, 256, 64), float("inf"))})


def test_convert(released: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, target = tmp_path / "released.pth", tmp_path / "out.safetensors"
    torch.save({"state_dict": released}, source)
    digest = convert_released(source, target, edge_rule="released")
    loaded = load_checkpoint(target)
    assert loaded.digest == digest
    assert loaded.model.config.edge_rule == "released"
    assert loaded.model.config.input_convention == "released"
    assert loaded.provenance["source"] == "released.pth"


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_convert_looks_inside_the_known_wrappers(tmp_path: Path, wrapper: str | None) -> None:
    state = {"bonus": torch.zeros(1)}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "released.pth")
    with pytest.raises(CheckpointError, match="not expected bonus"):
        convert_released(tmp_path / "released.pth", tmp_path / "out.safetensors")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_r40_convert_never_builds_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(CheckpointError, match="refused"):
        convert_released(path, tmp_path / "out.safetensors")
    assert "code ran" not in capsys.readouterr().out
    assert not (tmp_path / "out.safetensors").exists()


def test_convert_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    for name, content in {"text": b"hello", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            convert_released(tmp_path / name, target)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError):
        convert_released(tmp_path / "zip", target)
    torch.save([torch.zeros(1)], tmp_path / "list")
    with pytest.raises(CheckpointError, match="list"):
        convert_released(tmp_path / "list", target)
    with pytest.raises(CheckpointError, match="Cannot read"):
        convert_released(tmp_path / "absent", target)
    assert np.all([not target.exists()])
