"""Make a loaded model ready to serve: the same function, fewer memory moves. What is packed is not trained again.

Clicks go to the native decoder where there is a compiled module, and the encoder's blocks to native ones where that has
wide vectors. Linear layers that are left get oneDNN's own weight layout (private operators that inductor's freezing
uses: twice the speed of the plain product on CPUs where the BLAS is slow, equal elsewhere), batch norms fold into their
convolutions, convolutions run channels last and those of wide maps in the native module, group norms add up in float64,
constants of the weights are computed once. Each step keeps the function up to float32 rounding; the plain model is the
twin that tests compare with.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from inter2former.nn.canny import ResidualBlock
from inter2former.nn.encoder import Attention, Block, ConvStem, ConvUnit, PatchStem
from inter2former.nn.model import Inter2Former
from inter2former.runtime import compute, native
from inter2former.runtime.convolution import GroupAffine, NativeStage, NativeUnit, means
from inter2former.runtime.decoder import FusedDecoder
from inter2former.runtime.encoder_block import NativeBlock
from inter2former.runtime.outline import NativeOutline
from inter2former.runtime.rounding import with_rounded_products

_LOG = logging.getLogger(__name__)
_ROWS_HINT = 4096  # tokens at T = 1024; one packing serves every number of rows
_CHAIN = 128  # terms of a product of queries and keys that are added before the next ones join
_BLOCK_ROWS = 256  # rows whose partial sums stay in a core's cache
_TYPES: dict[native.Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WIDE: dict[native.Precision, int] = {"float32": 24, "bfloat16": 64}  # channels; below, oneDNN is as fast


class PackedLinear(nn.Module):
    """Inference-only linear layer over oneDNN's packed weight; the plain weight is gone.

    precision  of the operands; sums are float32, and the result is, unless a layer of the same kind follows
    gelu       also apply it, which costs nothing inside of the product
    """

    def __init__(self, linear: nn.Linear, precision: native.Precision = "float32", *, gelu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._type = _TYPES[precision]
        weight = linear.weight.detach().to(self._type).contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._bias = None if linear.bias is None else linear.bias.detach().to(self._type, copy=True)
        self._gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> float32 [..., out]; with GELU as precise as the operands."""
        compute.stand_aside()
        finish, algorithm = ("gelu", "none") if self._gelu else ("none", "")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self._type), self._packed, self._bias, finish, [], algorithm
        )
        return out if self._gelu else out.float()


class SplitQkv(nn.Module):
    """Packed projection to queries, keys and values; the sums of the first two are made of short chains.

    Softmax multiplies what queries and keys are off: in one chain they made half of the squared distance of the tokens
    from float64, and a code of the click that lies as close to zero falls on the other side.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, bias = linear.weight.detach(), linear.bias.detach()
        self._split = 2 * len(weight) // 3
        exact, values = weight.split([self._split, len(weight) - self._split])
        self._parts = [_packed(part) for part in exact.split(_CHAIN, dim=1)]
        self._values = _packed(values)
        self._bias, self._values_bias = bias[: self._split].clone(), bias[self._split :].clone()

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [..., C] -> [..., 3 C]."""
        rows = x.flatten(0, -2)
        out = rows.new_empty(len(rows), len(self._bias) + len(self._values_bias))
        for block, to in zip(rows.split(_BLOCK_ROWS), out.split(_BLOCK_ROWS), strict=True):
            bias: Tensor | None = self._bias
            total: Tensor | None = None
            for terms, weight in zip(block.split(_CHAIN, dim=1), self._parts, strict=True):
                part = _product(terms, weight, bias)
                total, bias = part if total is None else total.add_(part), None
            to[:, : self._split] = total
            to[:, self._split :] = _product(block, self._values, self._values_bias)
        return out.view(*x.shape[:-1], out.shape[1])


def _packed(weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class ExactPatches(nn.Module):
    """Patch layer in float64: its error would go through all blocks, and it is a hundredth of an encode."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self._side = conv.kernel_size[0]
        self._weight = conv.weight.detach().double().contiguous().flatten(1)
        self._bias = None if conv.bias is None else conv.bias.detach().double()

    def forward(self, image: Tensor) -> Tensor:
        """image float32 [B, c, H, W] -> [B, d, H / side, W / side]."""
        grid = image.double().unflatten(3, (-1, self._side)).unflatten(2, (-1, self._side))  # [B, c, h, side, w, side]
        rows = grid.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return nn.functional.linear(rows, self._weight, self._bias).float().permute(0, 3, 1, 2)


class RoundedConv(nn.Module):
    """Convolution with operands and result in bfloat16, channels last."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self._conv = conv.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, c, H, W] of any precision -> bfloat16 [B, d, ...]."""
        out: Tensor = self._conv(x.to(torch.bfloat16))
        return out


class MapNorm(nn.Module):
    """Group norm of one group over a channels-last map, with sums that are exact enough for millions of numbers.

    PyTorch's own kernel adds them up in float32 in that layout: at T = 1024 maps come out wrong in the fourth digit,
    and differently with every number of threads. Here sums are those of `means`.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self._affine = GroupAffine(norm)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], any layout and precision -> float32, the same shape, channels last."""
        B, C, H, W = x.shape
        rows = x.float().permute(0, 2, 3, 1).reshape(B, H, W * C)
        scale, shift = self._affine(*means(rows))  # [B, C]
        out = torch.addcmul(shift.repeat(1, W)[:, None], rows, scale.repeat(1, W)[:, None])
        return out.view(B, H, W, C).permute(0, 3, 1, 2)


@functools.cache
def packed_linear_works() -> bool:
    """Start-up self-test of the private operators: present, and equal to the plain layer. Decided once a process."""
    try:
        with torch.inference_mode():
            generator = torch.Generator().manual_seed(0)
            linear = nn.Linear(48, 80)
            packed = PackedLinear(linear)
            for rows in (1, 7, 64):
                x = torch.randn(rows, 48, generator=generator)
                if not torch.allclose(packed(x), linear(x), rtol=1e-4, atol=1e-4):
                    raise RuntimeError("wrong product")
    except Exception as error:
        _LOG.warning("Packed linear layers are not used: %s. Answers are the same, encoding is slower.", error)
        return False
    return True


def pack(model: Inter2Former, precision: native.Precision = "float32") -> Inter2Former:
    """Change the model in place and return it; evaluation mode, CPU, float32. It cannot be trained or saved after.

    precision   of the operands of convolutions and large products; for those of a click see rounding.py
    """
    model.eval().requires_grad_(False)
    compiled = native.module()
    if compiled is None and precision == "bfloat16":
        model = with_rounded_products(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ConvUnit):
                _fold_norms(module)
        if compiled is not None:
            _use_native_convolutions(model, compiled, _WIDE[precision])
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _replace(model.canny_net, nn.GroupNorm, MapNorm)
        model.prompt.fix_background()
        for block in model.blocks:
            block.attention.fix_code_table()  # type: ignore[operator, union-attr]
        if compiled is not None:
            fused = FusedDecoder(model, compiled, precision=precision)
            model.encode, model.decode = fused.encode, fused.decode  # type: ignore[method-assign, assignment]
            if model.outline is not None:
                model.draw = NativeOutline(model.outline, compiled)  # type: ignore[method-assign, assignment]
        if compiled is not None and native.vectors(precision):
            _replace(model.encoder, Block, functools.partial(NativeBlock, native=compiled, precision=precision))
        if packed_linear_works():
            for block in model.encoder.modules():
                if isinstance(block, Block):
                    block.fc1 = PackedLinear(block.fc1, precision, gelu=True)  # type: ignore[assignment]
                    block.gelu = nn.Identity()  # type: ignore[assignment]
                if isinstance(block, Attention) and precision == "float32":
                    block.qkv = SplitQkv(block.qkv)  # type: ignore[assignment]
            _replace(model.encoder, nn.Linear, functools.partial(PackedLinear, precision=precision))
            if compiled is None and precision == "float32":
                _replace(model, nn.Linear, PackedLinear)
        if precision == "float32" and isinstance(model.encoder.stem, PatchStem):
            _replace(model.encoder.stem, nn.Conv2d, ExactPatches)
        if precision == "bfloat16":
            for part in (model.encoder.stem, model.canny_net, model.skips):
                _replace(part, nn.Conv2d, RoundedConv)
    return model


def _fold_norms(unit: ConvUnit) -> None:
    for conv, norm in (("down", "norm"), ("conv1", "norm1"), ("conv2", "norm2")):
        setattr(unit, conv, fuse_conv_bn_eval(getattr(unit, conv), getattr(unit, norm)))
        setattr(unit, norm, nn.Identity())


def _use_native_convolutions(model: Inter2Former, compiled: Any, channels: int) -> None:
    """In the stem's units and CannyNet's stages of at least so many channels."""
    stem, stages = model.encoder.stem, model.canny_net.stages
    if isinstance(stem, ConvStem):
        for index, unit in enumerate(stem.units):
            if isinstance(unit, ConvUnit) and unit.conv1.in_channels >= channels:
                stem.units[index] = NativeUnit(unit, compiled)
    for index, stage in enumerate(stages):
        blocks = [block for block in stage.children() if isinstance(block, ResidualBlock)]
        if blocks and blocks[0].conv1.in_channels >= channels:
            stages[index] = NativeStage(blocks, compiled)


def _replace(module: nn.Module, kind: type[nn.Module], by: Callable[[Any], nn.Module]) -> None:
    """Put `by(child)` in the place of every child that is exactly of that kind."""
    for name, child in module.named_children():
        if type(child) is kind:
            setattr(module, name, by(child))
        else:
            _replace(child, kind, by)
