"""A packed model computes what the plain one computes."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from inter2former import reference_mask
from inter2former.config import tiny
from inter2former.nn.model import Inter2Former
from inter2former.runtime import packing


def trained_looking(**changes: object) -> Inter2Former:
    """A tiny model whose batch norms and edge branch are not at their start."""
    torch.manual_seed(0)
    net = Inter2Former(dataclasses.replace(tiny(), **changes)).eval()  # type: ignore[arg-type]
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    for lateral in net.canny_net.laterals:
        torch.nn.init.normal_(lateral.weight, 0.0, 0.3)
    return net


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stem": "patch", "stem_channels": (), "up_norm": "group"},
        {"stem_channels": (8, 24, 32), "embed_dim": 32, "up_channels": (32, 24, 4, 4), "edge_blocks": (0, 1, 2, 1)},
    ],
    ids=["conv stem", "patch stem", "wide maps"],
)
def test_packed_equals_plain(changes: dict[str, object]) -> None:
    plain = trained_looking(**changes)
    packed = packing.pack(copy.deepcopy(plain))
    image = torch.randn(3, 256, 256)
    one, two = plain.encode(image), packed.encode(image)
    torch.testing.assert_close(one.tokens[0].permute(1, 2, 0), two.tokens, atol=1e-4, rtol=1e-4)
    state = reference_mask.paint_clicks(reference_mask.initial(256), [(100, 90, True)], 5)
    for _ in range(3):  # first click: all tokens unknown; later ones use codes and boxes
        a, b = plain.decode(one, state), packed.decode(one, state)
        assert a.box == b.box
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.logits, packed.decode(two, state).logits, atol=1e-3, rtol=1e-3)  # 16-bit edges
        state = reference_mask.apply_prediction(state, a.logits.numpy() > 0)
        state = reference_mask.paint_clicks(state, [(30, 200, False)], 5)


def test_an_encoder_in_bfloat16_stays_near_the_plain_one() -> None:
    """Operands and edge maps have eight bits; sums, norms and the residual stream are float32."""
    plain = trained_looking()
    packed = packing.pack(copy.deepcopy(plain), "bfloat16")
    image = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        one, two = plain.encode_batch(image), packed.encode_batch(image)
    assert two.tokens.dtype == torch.float32
    for want, found in zip([one.tokens, *one.edges], [two.tokens, *two.edges], strict=True):
        assert 0 < (found - want).norm() / want.norm() < 0.02


def test_a_packed_linear_gives_a_row_the_same_bits_in_any_batch() -> None:
    """The plain product does not: its kernel changes with the number of rows."""
    if not packing.packed_linear_works():
        pytest.skip("no packed operators on this CPU")
    linear = packing.PackedLinear(torch.nn.Linear(40, 24))
    x = torch.randn(33, 40)
    whole = linear(x)
    for row in (0, 13, 32):
        assert np.array_equal(linear(x[row : row + 1]).numpy()[0], whole.numpy()[row])


def test_the_split_projection_agrees_with_float64() -> None:
    """Rows and terms that fill no block, one part and several."""
    if not packing.packed_linear_works():
        pytest.skip("no packed operators on this CPU")
    for width, rows in ((40, 1), (128, 7), (300, 515)):
        linear = torch.nn.Linear(width, 3 * width).requires_grad_(False)
        x = torch.randn(2, rows, width)
        want = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        torch.testing.assert_close(packing.SplitQkv(linear)(x), want.float(), atol=3e-6, rtol=0)


def test_patches_are_rounded_once() -> None:
    conv = torch.nn.Conv2d(3, 20, 16, 16).requires_grad_(False).to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, 48, 32)
    want = copy.deepcopy(conv).double()(image.double())
    torch.testing.assert_close(packing.ExactPatches(conv)(image), want.float(), atol=1e-7, rtol=1e-7)


def test_without_the_private_operators_the_plain_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(linear: torch.nn.Linear) -> torch.nn.Module:
        raise AttributeError("no such operator")

    monkeypatch.setattr(packing, "PackedLinear", broken)
    packing.packed_linear_works.cache_clear()
    try:
        assert not packing.packed_linear_works()
        plain = trained_looking()
        packed = packing.pack(copy.deepcopy(plain))
        image = torch.randn(3, 128, 128)
        tokens = plain.encode(image).tokens[0].permute(1, 2, 0)
        torch.testing.assert_close(tokens, packed.encode(image).tokens, atol=1e-4, rtol=1e-4)
    finally:
        packing.packed_linear_works.cache_clear()


def test_without_the_native_module_the_network_itself_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """R35: other parts of a click, the same masks."""
    monkeypatch.setattr(packing.native, "module", lambda: None)
    plain = trained_looking()
    packed = packing.pack(copy.deepcopy(plain))
    image = torch.randn(3, 128, 128)
    one, two = plain.encode(image), packed.encode(image)
    state = reference_mask.paint_clicks(reference_mask.initial(128), [(60, 50, True)], 5)
    torch.testing.assert_close(plain.decode(one, state).logits, packed.decode(two, state).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [4, 16])
def test_map_norm_is_exact_on_large_maps(channels: int) -> None:
    """A million numbers a channel with a mean far from zero: what float32 sums get wrong in the fourth digit."""
    norm = torch.nn.GroupNorm(1, channels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(0.8 + 0.4 * torch.rand(channels, generator=generator))
        norm.bias.copy_(torch.rand(channels, generator=generator) - 0.5)
        x = 0.7 * torch.randn(2, channels, 512, 768, generator=generator) + 2
        want = copy.deepcopy(norm).double()(x.double()).float()
        for layout in (torch.contiguous_format, torch.channels_last):
            found = packing.MapNorm(norm)(x.contiguous(memory_format=layout))
            torch.testing.assert_close(found, want, atol=5e-6, rtol=0)
