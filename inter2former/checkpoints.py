"""Checkpoints: safetensors in and out, with the configuration and the provenance inside; the released format in.

A checkpoint is data only. Pickle is met in `convert_released` alone, and there only as `weights_only`.

Metadata (strings): `format` = "inter2former/1", `config` = ModelConfig as JSON, `provenance` = JSON object.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from inter2former.config import EdgeRule, ModelConfig, base
from inter2former.errors import CheckpointError, ConfigError
from inter2former.files import write_atomically
from inter2former.nn.canny import NEIGHBOURS
from inter2former.nn.encoder import POSITION_GRID
from inter2former.nn.model import Inter2Former

FORMAT = "inter2former/1"
STARTER = Path(__file__).parent / "weights" / "starter.safetensors"


class Loaded(NamedTuple):
    """A model ready for use (float32, evaluation mode), its provenance and the digest of the file."""

    model: Inter2Former
    provenance: dict[str, Any]
    digest: str
    dtype: torch.dtype  # of the weights in the file; those of `model` are float32


def save_checkpoint(
    path: str | os.PathLike[str],
    model: Inter2Former,
    *,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write one file, whole or not at all; returns its digest.

    dtype   torch.float16 halves the file; weights are float32 again once loaded
    raises  CheckpointError when a value is not finite, or would not be in `dtype`
    """
    state = {}
    for key, value in model.state_dict().items():
        stored = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
        if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
            raise CheckpointError(f"{key} holds values that are not finite in {dtype}; nothing was written.")
        state[key] = stored.contiguous().clone()
    data = safetensors.torch.save(
        state,
        {
            "format": FORMAT,
            "config": model.config.to_json(),
            "provenance": json.dumps(dict(provenance or {}), sort_keys=True),
        },
    )
    write_atomically(path, data)
    return _digest(data)


def load_checkpoint(path: str | os.PathLike[str]) -> Loaded:
    """Read and check a checkpoint: format, configuration, every key, shape and value.

    raises   CheckpointError naming what is missing, extra, misshapen or not finite
    """
    name = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint {name}: {error.strerror}.") from error
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{name} is not a safetensors file.", "A released .pth file goes through `inter2former convert` first."
        ) from error
    # The library has checked the header; it only does not hand out the metadata of bytes.
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{name} is a safetensors file, but not an Inter2Former checkpoint ({FORMAT}).")
    try:
        config = ModelConfig.from_json(metadata.get("config", ""))
        provenance = json.loads(metadata.get("provenance", "{}"))
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} has a bad configuration: {error}") from error
    model = _build(config, {key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
    return Loaded(model, provenance if isinstance(provenance, dict) else {}, _digest(data), dtype)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _build(config: ModelConfig, state: Mapping[str, Tensor]) -> Inter2Former:
    """A model with exactly these weights, in evaluation mode; CheckpointError names what does not fit."""
    model = _untrained(config)
    _check_keys({key: tuple(value.shape) for key, value in model.state_dict().items()}, state)
    if broken := [key for key, value in state.items() if not bool(torch.isfinite(value).all())]:
        raise CheckpointError(f"Not finite: {_some(broken)}.", "The training run that wrote it diverged.")
    model.load_state_dict(dict(state), assign=True)
    return model.eval()


def _untrained(config: ModelConfig) -> Inter2Former:
    """The modules alone; the caller's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        return Inter2Former(config)


def _check_keys(wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    problems = []
    if missing := sorted(wanted.keys() - state.keys()):
        problems.append(f"missing {_some(missing)}")
    if extra := sorted(state.keys() - wanted.keys()):
        problems.append(f"not expected {_some(extra)}")
    shapes = [
        f"{key} is {list(state[key].shape)}, want {list(shape)}"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if shapes:
        problems.append("; ".join(shapes[:8]))
    if problems:
        raise CheckpointError("The checkpoint does not fit its configuration: " + "; ".join(problems) + ".")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# -- the released format ---------------------------------------------------------------------------------------------

_POSITIONS = "encoder.stem.positions"

# Our name -> released name; the first pattern that matches the whole name decides.
_RENAMES = [
    (r"encoder\.stem\.positions", r"backbone.pos_embed"),
    (r"encoder\.stem\.(.+)", r"backbone.patch_embed.\1"),
    (r"encoder\.blocks\.(\d+)\.(fc[12]\..+)", r"backbone.blocks.\1.mlp.\2"),
    (r"encoder\.blocks\.(.+)", r"backbone.blocks.\1"),
    (r"encoder\.fusion_norms\.(\d+)\.(.+)", r"backbone.multi_scale_fusion.\1.0.\2"),
    (r"encoder\.laterals\.(\d+)\.(.+)", r"backbone.lateral_convs.\1.0.\2"),
    (r"encoder\.lateral_norms\.(\d+)\.(.+)", r"backbone.lateral_convs.\1.1.\2"),
    (r"encoder\.out_conv\.(.+)", r"backbone.out_conv.0.\1"),
    (r"encoder\.out_norm\.(.+)", r"backbone.out_conv.2.\1"),
    (r"canny_net\.stages\.(.+)", r"edge_detector.block_list.\1"),
    (r"canny_net\.downs\.(.+)", r"edge_detector.downsamplers.\1"),
    (r"canny_net\.laterals\.(.+)", r"edge_detector.lateral_convs.\1"),
    (r"canny_net\.conv1\.(.+)", r"edge_detector.conv1.\1"),
    (r"prompt\.labels\.(.+)", r"neck.ref_embeds.\1"),
    (r"prompt\.convs\.(\d+)\.(.+)", r"neck.ref_conv.stem.{double}.\2"),
    (r"blocks\.(\d+)\.(norm[12]\..+)", r"neck.blocks.\1.\2"),
    (r"blocks\.(\d+)\.attention\.qkv\.(.+)", r"neck.blocks.\1.qkv_proj.\2"),
    (r"blocks\.(\d+)\.attention\.proj\.(.+)", r"neck.blocks.\1.o_proj.\2"),
    (r"blocks\.(\d+)\.attention\.(.+)", r"neck.blocks.\1.bsq_attn.\2"),
    (r"blocks\.(\d+)\.experts\.shared_(w[123]\..+)", r"neck.blocks.\1.ffn.shared_ffn.\2"),
    (r"blocks\.(\d+)\.experts\.shared_norm\.(.+)", r"neck.blocks.\1.ffn.shared_ln.\2"),
    (r"blocks\.(\d+)\.experts\.(shared|expert)_gate\.(.+)", r"neck.blocks.\1.ffn.\2_gate.0.\3"),
    (r"blocks\.(\d+)\.experts\.([wb][123])", r"neck.blocks.\1.ffn.select_ffn_\2"),
    (r"blocks\.(\d+)\.experts\.norm\.(.+)", r"neck.blocks.\1.ffn.select_ln.\2"),
    (r"blocks\.(\d+)\.experts\.expert_bias", r"neck.blocks.\1.ffn.exp_bias"),
    (r"upsampling\.low\.(\d+)\.(.+)", r"decode_head.mlp.{double}.\2"),
    (r"upsampling\.stages\.(.+)", r"decode_head.upsamplers.\1"),
]


def released_name(ours: str) -> str:
    """The release's name of one of our state-dict keys."""
    for pattern, template in _RENAMES:
        if match := re.fullmatch(pattern, ours):
            if "{double}" in template:  # the release counts the activations in between: 0, 2, 4, 6
                template = template.replace("{double}", str(2 * int(match[1])))
            return match.expand(template)
    raise KeyError(ours)


def _fixed_tensors() -> dict[str, Tensor]:
    """What the release stores although it is no weight: the Canny kernels and the rotary frequencies."""
    gauss = torch.exp(-0.5 * torch.arange(-2.0, 3.0, dtype=torch.float64) ** 2)
    gauss /= gauss.sum()
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], dtype=torch.float64)
    directions = torch.zeros(8, 1, 3, 3, dtype=torch.float64)
    for index, (dy, dx) in enumerate(NEIGHBOURS):
        directions[index, 0, 1, 1] = 1.0
        directions[index, 0, 1 + dy, 1 + dx] = -1.0
    return {
        "edge_detector.canny.g_h.weight": gauss.view(1, 1, 1, 5),
        "edge_detector.canny.g_v.weight": gauss.view(1, 1, 5, 1),
        "edge_detector.canny.sobh.weight": sobel.view(1, 1, 3, 3),
        "edge_detector.canny.sobv.weight": sobel.t().reshape(1, 1, 3, 3),
        "edge_detector.canny.dirf.weight": directions,
        "backbone.rope.freqs": 10000.0 ** (-2.0 * torch.arange(16, dtype=torch.float64) / 32),
    }


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Every key of a released state dict with its shape."""
    config = base()
    ours = _untrained(config).state_dict()
    shapes = {released_name(key): tuple(value.shape) for key, value in ours.items()}
    shapes["backbone.pos_embed"] = (1, 1 + POSITION_GRID**2, config.encoder_dim)  # entry 0: an unused class token
    shapes |= {key: tuple(value.shape) for key, value in _fixed_tensors().items()}
    shapes |= {"step": ()} | {f"neck.blocks.{index}.ffn.steps": () for index in range(config.decoder_blocks)}
    return shapes


def from_released(released: Mapping[str, Any], edge_rule: EdgeRule = "exact") -> Inter2Former:
    """A model from a released state dict; every key must be known, present and of its shape.

    edge_rule   "released" keeps what the published float32 test does on common CPUs, "exact" what the paper means
    raises      CheckpointError naming missing, extra and misshapen keys by their released names
    """
    if wrong := [key for key, value in released.items() if not isinstance(value, Tensor | np.ndarray)]:
        raise CheckpointError(f"Not tensors: {_some(sorted(wrong))}.")
    tensors = {key: torch.as_tensor(value) for key, value in released.items()}
    _check_keys(released_shapes(), tensors)
    for key, kernel in _fixed_tensors().items():
        if not torch.allclose(tensors[key].double(), kernel, rtol=1e-3, atol=1e-4):
            raise CheckpointError(f"{key} is not the fixed kernel of the release; this is another model.")
    config = dataclasses.replace(base(), edge_rule=edge_rule)
    names = {key: released_name(key) for key in _untrained(config).state_dict()}
    state = {ours: tensors[theirs].float().contiguous() for ours, theirs in names.items() if ours != _POSITIONS}
    grid = tensors[names[_POSITIONS]][:, 1:].float().transpose(1, 2)
    state[_POSITIONS] = grid.unflatten(2, (POSITION_GRID, POSITION_GRID)).contiguous()
    return _build(config, state)


def convert_released(
    source: str | os.PathLike[str], target: str | os.PathLike[str], edge_rule: EdgeRule = "exact"
) -> str:
    """A released .pth file into one of our checkpoints; returns the digest of what was written.

    Tensors only: objects in the pickle are refused, never built.
    """
    name = os.fspath(source)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"Cannot read {name}: {error.strerror or error}.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{name} is not a file of tensors alone.",
            "It is damaged, not a .pth file, or holds objects, which are refused.",
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{name} holds a {type(loaded).__name__}, not a state dict.")
    model = from_released(loaded, edge_rule)
    provenance = {
        "recipe": "converted from a released Inter2Former checkpoint",
        "source": Path(source).name,
        "source_sha256": _digest(Path(source).read_bytes()),
    }
    return save_checkpoint(target, model, provenance=provenance)
