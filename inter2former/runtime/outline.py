"""The outline network and what it looks at in one native call, with its batch norms folded; the twins are
nn/outline.py and `look` and `drawn` of refinement.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.fusion import fuse_conv_bn_weights

from inter2former.images import MEAN, STD
from inter2former.nn.outline import DOWN, SCALE, UP, Outline
from inter2former.refinement import BLOB, FAR, SURE, View

Float32 = npt.NDArray[np.float32]


class NativeOutline:
    """An outline network in evaluation mode, with its weights of now.

    native  the compiled module
    isa     name of an instruction set, for tests
    """

    def __init__(self, outline: Outline, native: Any, isa: str = "auto") -> None:
        self._native = native.Outline(_layers(outline), DOWN, UP, isa)

    def __call__(self, x: Float32) -> Float32:
        """x float32 [CHANNELS, h, w] -> what is to be added to the logits, [h, w]."""
        out: Float32 = self._native.forward(x)
        return out

    def drawn(self, view: View) -> tuple[Float32, bool]:
        """The logits of a view with what is to be added to them, float32 [H, W], and whether that is finite."""
        logits, before = (None if part is None else np.ascontiguousarray(part) for part in (view.logits, view.before))
        rules = SURE, SCALE, BLOB, FAR, MEAN, STD
        out: tuple[Float32, bool] = self._native.draw(
            logits, before, view.picture, view.shape, view.shown, view.clicks, *rules
        )
        return out


def _layers(outline: Outline) -> list[tuple[Float32, Float32]]:
    """In the order of csrc/outline.h."""
    layers = [_folded(outline.first, outline.first_norm)]
    for n, units in enumerate(outline.down):
        if n > 0:
            layers.append(_folded(outline.narrow[n - 1], outline.narrow_norms[n - 1]))
        layers += _of_units(units)
    for n in reversed(range(len(outline.up))):
        layers.append(_folded(outline.widen[n], outline.widen_norms[n]))
        layers += _of_units(outline.up[n])
    return [*layers, _numbers(outline.last.weight, outline.last.bias)]


def _of_units(units: Any) -> list[tuple[Float32, Float32]]:
    return [
        _folded(conv, norm) for unit in units for conv, norm in ((unit.conv1, unit.norm1), (unit.conv2, unit.norm2))
    ]


def _folded(conv: Any, norm: Any) -> tuple[Float32, Float32]:
    return _numbers(
        *fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    )


def _numbers(weight: Any, bias: Any) -> tuple[Float32, Float32]:
    weight, bias = (part.detach().to("cpu", torch.float32).contiguous().numpy() for part in (weight, bias))
    return weight, bias


__all__ = ["NativeOutline"]
