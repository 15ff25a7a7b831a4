"""The twin of the native click in bfloat16: the plain network with the operands of its large products rounded.

Rounded are both sides of: the prompt's second to fourth convolution, qkv, scores and values of both kinds of attention,
their projection, the experts, the upsampling convolutions. Sums are float32. The choice of a code, of an expert and of
the box stay in float32 throughout, and so do the prompt's first layer (a table), norms and edge maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inter2former.nn.attention import HybridAttention
from inter2former.nn.experts import HybridExperts
from inter2former.nn.layers import rope_tables, rotate
from inter2former.nn.model import Inter2Former
from inter2former.nn.upsampling import UpStage


def rounded(x: Tensor) -> Tensor:
    """To bfloat16 and back."""
    return x.to(torch.bfloat16).to(torch.float32)


def with_rounded_products(model: Inter2Former) -> Inter2Former:
    """A copy whose `decode` computes as the native decoder does in bfloat16; encoder and CannyNet are shared.

    model   evaluation mode, CPU, float32, without gradients
    """
    encoders = (model.encoder, model.canny_net, model.skips)
    model = copy.deepcopy(model, {id(part): part for part in encoders})
    with torch.no_grad():
        for conv in list(model.prompt.convs)[1:]:
            _round_layer(conv)
        for module in model.modules():
            if isinstance(module, HybridAttention):
                _round_attention(module)
            elif isinstance(module, HybridExperts):
                round_experts(module)
            elif isinstance(module, UpStage):
                _replace(module, "forward", partial(_up_stage, module, rounded(module.conv.weight)))
    return model


def _replace(module: nn.Module, name: str, function: Callable[..., Tensor]) -> None:
    object.__setattr__(module, name, function)


def _round_layer(layer: Any) -> None:
    layer.weight.copy_(rounded(layer.weight))
    layer.register_forward_pre_hook(lambda _layer, inputs: tuple(rounded(x) for x in inputs))


def _round_attention(attention: HybridAttention) -> None:
    width = attention.proj.in_features
    for part in (attention.qkv.weight, attention.qkv.bias):  # the scale of scores is part of the weights
        part[:width] *= attention.scale
    attention.scale = 1.0
    _round_layer(attention.qkv)
    _round_layer(attention.proj)
    _replace(attention, "full", partial(_full, attention))
    _replace(attention, "bsq", partial(_bsq, attention))


def _full(
    attention: HybridAttention, q: Tensor, k: Tensor, v: Tensor, size_hw: tuple[int, int], queries: Tensor
) -> Tensor:
    cos, sin = rope_tables(*size_hw, k.shape[-1], k.device, attention.span)
    scores = rounded(rotate(q, cos[queries], sin[queries])) @ rounded(rotate(k, cos, sin)).t()
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return rounded(weights) @ rounded(v) / weights.sum(-1, keepdim=True)


def _bsq(attention: HybridAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    codes = attention.codes(k)
    values = v.new_zeros(2**attention.bits, v.shape[-1]).index_add_(0, codes, v)
    counts = torch.bincount(codes, minlength=2**attention.bits).to(v.dtype)
    logits = q @ attention.code_table().t()
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))  # relative to the best code, with keys or without
    return (rounded(weights) @ rounded(values)) / (weights @ counts)[:, None]


def round_experts(experts: HybridExperts) -> None:
    """Round the weights of the experts in place, and what they are multiplied with from now on."""
    for layer in (experts.shared_w1, experts.shared_w2, experts.shared_w3):
        _round_layer(layer)
    for weight in (experts.w1, experts.w2, experts.w3):
        weight.copy_(rounded(weight))
    _replace(experts, "expert", partial(_expert, experts))


def _expert(experts: HybridExperts, x: Tensor, e: int) -> Tensor:
    x = rounded(x)
    hidden = F.silu(F.linear(x, experts.w1[e], experts.b1[e])) * F.linear(x, experts.w2[e], experts.b2[e])
    return F.linear(rounded(experts.norm(hidden)), experts.w3[e], experts.b3[e])


def _up_stage(stage: UpStage, weight: Tensor, x: Tensor, edges: Tensor) -> Tensor:
    """conv(up(z) + E) as conv(up(z)) + conv(E): bicubic and convolution of z are one linear map, E is never rounded."""
    up = F.interpolate(rounded(stage.norm(x)), scale_factor=2, mode="bicubic", align_corners=False)
    out: Tensor = F.conv2d(up, weight, padding=1) + stage.conv(edges)
    return out
