"""The same function, cheaper to train on a CPU. Nothing here changes what a model computes beyond rounding."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.nn.layers import ChannelNorm
from inter2former.nn.model import Features, Inter2Former
from inter2former.nn.prompt_embedding import PromptEmbedding
from inter2former.nn.upsampling import UpStage
from inter2former.runtime import native
from inter2former.runtime.decoder import FusedDecoder

# Bicubic x2 (a = -0.75) has two phases with four taps each.
_TAPS = (-27 / 256, 225 / 256, 67 / 256, -9 / 256)


def bicubic_x2(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W], as F.interpolate(mode="bicubic", align_corners=False), whose kernel is scalar.

    Two products with a banded matrix: more arithmetic than four taps, which are a dozen passes over memory.
    """
    wide = x.contiguous() @ _doubling(x.shape[3], x.dtype).t()
    out: Tensor = _doubling(x.shape[2], x.dtype) @ wide
    return out.contiguous(memory_format=torch.channels_last)


@functools.cache
def _doubling(n: int, dtype: torch.dtype) -> Tensor:
    """[2n, n]: bicubic x2 (a = -0.75) along one axis. The taps and their sums at borders are exact in bfloat16."""
    matrix = torch.zeros(2 * n, n, dtype=torch.float64)
    for i in range(n):
        for phase, first in ((0, -2), (1, -1)):
            taps = _TAPS[::-1] if phase == 0 else _TAPS
            for k, tap in enumerate(taps):
                matrix[2 * i + phase, min(max(i + first + k, 0), n - 1)] += tap
    return matrix.to(dtype)


def _up_stage(self: UpStage, x: Tensor, edges: Tensor) -> Tensor:
    """The convolution is linear: edges are convolved on their own, once for all targets of an image.

    x [B K, C, h, w], edges [B, C, 2h, 2w]: K targets of each image, one after the other.
    """
    grown = self.conv(bicubic_x2(self.norm(x)))
    drawn = F.conv2d(edges, self.conv.weight, padding=1).unsqueeze(1)
    out: Tensor = grown.unflatten(0, (len(edges), -1)) + drawn
    return out.flatten(0, 1)


def _prompt(self: PromptEmbedding, reference: Tensor, inside: Tensor) -> Tensor:
    """Embedding and first convolution are one convolution over the five labels' indicator maps.

    The indicators need no gradient, which leaves out the two dearest gradients of the prompt: at full resolution.
    """
    first, *others = self.convs
    assert isinstance(first, nn.Conv2d)
    scale = reference.shape[-1] // inside.shape[-1]
    shown = inside.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    label = torch.where(shown, reference, 255).unsqueeze(-1)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else first.weight.dtype
    maps = (label == torch.arange(5, dtype=reference.dtype)).to(dtype).permute(0, 3, 1, 2)
    weight = torch.einsum("oikl,ji->ojkl", first.weight.float(), self.labels.weight.float())
    x = F.relu(F.conv2d(maps, weight.contiguous(memory_format=torch.channels_last), first.bias, 2, 1))
    for conv in others:
        token = x.shape[-1] // inside.shape[-1]
        kept = inside.repeat_interleave(token, 1).repeat_interleave(token, 2).unsqueeze(1)
        x = F.relu(conv(x * kept.to(x.dtype)))
    return torch.where(inside.unsqueeze(1), x, self.background().to(x.dtype)[None, :, None, None])


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    """Autocast would answer in float32; the kernels take and give bfloat16 and compute in float32."""
    with torch.autocast("cpu", enabled=False):
        out: Tensor = type(self).forward(self, x)
        return out


def speed_up(model: Inter2Former) -> None:
    """Prepare a model for training on a CPU, in place: channels-last weights, cheaper prompt, norms and head.

    Afterwards `decode_batch` takes the edges of B images with the tokens and references of B K targets.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.prompt.forward = types.MethodType(_prompt, model.prompt)  # type: ignore[method-assign]
    for stage in model.upsampling.stages:
        stage.forward = types.MethodType(_up_stage, stage)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | ChannelNorm):
            module.forward = types.MethodType(_norm, module)  # type: ignore[method-assign]


def clicks_without_gradient(model: Inter2Former, features: Features) -> Callable[[int, np.ndarray], np.ndarray] | None:
    """The decoder as it is served, with the weights of now: a tenth of the time of the one that is trained, so
    that the rounds of an annotator cost next to nothing.

    features  of B images
    returns   (image, reference mask uint8 [T, T]) -> logits float32 [T, T]; None without the compiled module
    """
    compiled = native.module()
    if compiled is None:
        return None
    decoder = FusedDecoder(model, compiled)
    with torch.autocast("cpu", enabled=False):
        images = [
            decoder.compact(Features(tokens[None], [e[None] for e in edges]), exact=True)
            for tokens, *edges in zip(features.tokens, *features.edges, strict=True)
        ]

    def click(image: int, reference: np.ndarray) -> np.ndarray:
        return decoder.decode(images[image], reference).logits.numpy()

    return click
