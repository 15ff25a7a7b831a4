"""Make a loaded model ready to serve: the same function, fewer memory moves. What is packed is not trained again.

Clicks go to the native decoder where there is a compiled module. Linear layers get oneDNN's own weight layout
(private operators that inductor's freezing uses: twice the speed of the plain product on CPUs where the BLAS is slow,
equal elsewhere), batch norms fold into their convolutions, convolutions run channels last, constants of the weights are
computed once. Each step keeps the function up to float32 rounding; the plain model is the twin that tests compare with.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from inter2former.nn.encoder import ConvUnit
from inter2former.nn.model import Inter2Former
from inter2former.runtime import native
from inter2former.runtime.decoder import FusedDecoder
from inter2former.runtime.rounding import with_rounded_products

_LOG = logging.getLogger(__name__)
_ROWS_HINT = 4096  # tokens at T = 1024; one packing serves every number of rows


class PackedLinear(nn.Module):
    """Inference-only linear layer over oneDNN's packed weight; the plain weight is gone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _ROWS_HINT)
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [..., in] -> [..., out]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


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

    precision   of the operands of the decoder's large products, see rounding.py
    """
    model.eval().requires_grad_(False)
    compiled = native.module()
    if compiled is None and precision == "bfloat16":
        model = with_rounded_products(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ConvUnit):
                _fold_norms(module)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.prompt.fix_background()
        for block in model.blocks:
            block.attention.fix_code_table()  # type: ignore[operator, union-attr]
        if compiled is not None:
            fused = FusedDecoder(model, compiled, precision=precision)
            model.encode, model.decode = fused.encode, fused.decode  # type: ignore[method-assign, assignment]
        if packed_linear_works():
            _pack_linears(model.encoder if compiled is not None or precision == "bfloat16" else model)
    return model


def _fold_norms(unit: ConvUnit) -> None:
    for conv, norm in (("down", "norm"), ("conv1", "norm1"), ("conv2", "norm2")):
        setattr(unit, conv, fuse_conv_bn_eval(getattr(unit, conv), getattr(unit, norm)))
        setattr(unit, norm, nn.Identity())


def _pack_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            _pack_linears(child)
