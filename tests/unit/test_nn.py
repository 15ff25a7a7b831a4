"""The network's two faces agree: use (crops, boxes, subsets of tokens) and training (dense, batched, differentiable).

Also the rules that can be computed by hand: windows, rotary positions, Canny bins, boxes, edge tokens, code tables.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from inter2former import reference_mask
from inter2former.config import ModelConfig, tiny
from inter2former.nn.attention import HybridAttention, edge_tokens, edge_tokens_batch
from inter2former.nn.canny import MEAN, STD, canny, network_input
from inter2former.nn.encoder import Attention
from inter2former.nn.experts import BALANCE_STEP, HybridExperts
from inter2former.nn.layers import rope_tables, rotate
from inter2former.nn.model import Inter2Former
from inter2former.nn.prompt_embedding import prompt_box, prompt_box_mask
from inter2former.nn.upsampling import FILL, Upsampling

CPU = torch.device("cpu")


def model(config: ModelConfig | None = None, seed: int = 0) -> Inter2Former:
    torch.manual_seed(seed)
    net = Inter2Former(config or tiny()).eval()
    for lateral in net.canny_net.laterals:  # zero at the start: edges would be ignored
        torch.nn.init.normal_(lateral.weight, 0.0, 0.3)
    return net


def some_reference(size: int = 128) -> np.ndarray:
    """An object in the middle, an unknown rim on one side, one negative disc."""
    state = np.full((size, size), 1, np.uint8)
    state[40:90, 50:80] = 3
    state[40:90, 76:80] = 2
    return reference_mask.paint_clicks(state, [(60, 60, True), (30, 64, False)], 5)


# -- boxes and edge tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "box"),
    [
        ([], (0, 0, 128, 128)),  # nothing told: the whole map
        ([(70, 70)], (48, 48, 96, 96)),  # one pixel: its token and one around
        ([(0, 0)], (0, 0, 32, 32)),  # clamped at the corner
        ([(127, 127)], (96, 96, 128, 128)),
        ([(16, 31), (79, 80)], (0, 0, 112, 96)),  # rounded outwards before widening
    ],
)
def test_prompt_box(pixels: list[tuple[int, int]], box: tuple[int, int, int, int]) -> None:
    reference = np.ones((128, 128), np.uint8)
    for row, column in pixels:
        reference[row, column] = 4
    assert prompt_box(reference) == box
    mask = prompt_box_mask(torch.from_numpy(reference)[None])[0].numpy()
    want = np.zeros((8, 8), bool)
    want[box[1] // 16 : box[3] // 16, box[0] // 16 : box[2] // 16] = True
    assert np.array_equal(mask, want)


def test_edge_tokens_by_hand() -> None:
    reference = np.full((128, 128), 1, np.uint8)
    reference[32:64, 32:64] = 3  # two tokens by two, aligned: windows reach 3 pixels over the outline
    box = prompt_box(reference)
    marked = edge_tokens(reference, box)
    assert marked.sum() == 16  # both sides of the outline
    assert marked[1:5, 1:5].all()
    assert not edge_tokens(np.full((128, 128), 3, np.uint8), (0, 0, 128, 128)).any()
    assert edge_tokens(np.full((128, 128), 2, np.uint8), (0, 0, 128, 128)).all()  # unknown always


def test_released_edge_rule_marks_all_but_constant_definite_background() -> None:
    reference = np.full((128, 128), 1, np.uint8)
    reference[32:96, 32:96] = 0
    box = prompt_box(reference)
    assert box == (16, 16, 112, 112)
    marked = edge_tokens(reference, box, "released")
    assert marked[1:7, 1:7].sum() == 36 - 4  # the four inner tokens see only definite background
    assert not marked[3:5, 3:5].any()
    assert not marked[0].any()


@pytest.mark.parametrize("rule", ["exact", "released"])
def test_edge_tokens_of_a_batch_are_those_of_each(rule: str) -> None:
    rng = np.random.default_rng(0)
    states = []
    for index in range(6):
        state = np.full((96, 128), 1, np.uint8)
        top, left = rng.integers(0, 60, 2)
        state[top : top + 25, left : left + 30] = rng.integers(0, 5)
        if index % 2:
            state[rng.integers(0, 96), rng.integers(0, 128)] = 2
        states.append(state)
    batch = torch.from_numpy(np.stack(states))
    together = edge_tokens_batch(batch, prompt_box_mask(batch), rule)  # type: ignore[arg-type]
    for state, tokens in zip(states, together, strict=True):
        assert np.array_equal(edge_tokens(state, prompt_box(state), rule), tokens.numpy())  # type: ignore[arg-type]


# -- two faces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["exact", "released"])
def test_decode_equals_the_training_pass(rule: str) -> None:
    """Crops, token subsets and the code table compute what the dense batched pass computes."""
    net = model(dataclasses.replace(tiny(), edge_rule=rule))  # type: ignore[arg-type]
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    references = [some_reference(), reference_mask.paint_clicks(reference_mask.initial(128), [(60, 60, True)], 5)]
    with torch.no_grad():
        out = net(images, torch.from_numpy(np.stack(references)))
    for index, reference in enumerate(references):
        decoded = net.decode(net.encode(images[index]), reference)
        torch.testing.assert_close(decoded.low, out.low[index], atol=1e-4, rtol=1e-4)
        if decoded.box == (0, 0, 8, 8):
            torch.testing.assert_close(decoded.logits, out.logits[index], atol=1e-4, rtol=1e-4)


def test_upsampling_outside_the_box_is_the_fill() -> None:
    net = model()
    head = net.upsampling
    low = torch.full((8, 8), -5.0)
    low[2:4, 5:7] = 1.0
    assert head.box(low) == (5, 2, 7, 4)
    assert head.box(torch.full((8, 8), -2.0)) == (0, 0, 8, 8)  # the threshold itself is outside: nothing, so all
    torch.nn.init.constant_(head.low[-1].bias, -50.0)
    encoding = net.encode(torch.randn(3, 128, 128))
    with torch.no_grad():
        tokens = encoding.tokens.clone()
        weights = head.low[-1].weight
        torch.nn.init.constant_(weights, 0.0)
        torch.nn.init.constant_(head.low[-1].bias, -1.0)
        logits, box, _ = head.decode(tokens, encoding.edges)
    assert box == (0, 0, 8, 8)
    assert logits.shape == (128, 128)
    assert FILL == -100.0


def test_upsampling_with_pixel_norm_does_not_depend_on_the_box_inside() -> None:
    """Away from the crop's border, a smaller box gives the same logits: what the group norm of the release does not."""
    config = tiny()
    head = Upsampling(config)
    for stage in head.stages:
        torch.nn.init.normal_(stage.norm.weight, 1.0, 0.1)
    tokens = torch.randn(1, config.embed_dim, 8, 8)
    edges = [torch.randn(1, c, 8 * 2 << j, 8 * 2 << j) for j, c in enumerate(config.up_channels)]
    crops = [e[:, :, 2 * (2 << j) :, 2 * (2 << j) :] for j, e in enumerate(edges)]
    with torch.no_grad():
        whole, part = head.up(tokens, edges)[0], head.up(tokens[:, :, 2:, 2:], crops)[0]
    torch.testing.assert_close(whole[96:, 96:], part[64:, 64:], atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter() -> None:
    net = model().train()  # 9 x 9 tokens: windows of all blocks hold padding
    out = net(torch.randn(2, 3, 144, 144), torch.from_numpy(np.stack([some_reference(144), some_reference(144)])))
    (out.logits.mean() + out.low.mean() + out.commitment).backward()
    without = {name for name, p in net.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())}
    assert not without


def test_released_shape_of_the_model_runs_on_every_multiple_of_sixteen() -> None:
    """A patch stem, group norms, non-square windows padded on all sides."""
    config = dataclasses.replace(tiny(), stem="patch", stem_channels=(), up_norm="group", input_convention="released")
    net = model(config)
    for size in (16, 48, 80, 272):
        encoding = net.encode(torch.randn(3, size, size))
        assert encoding.nbytes == 4 * sum(t.numel() for t in (encoding.tokens, *encoding.edges))
        decoded = net.decode(encoding, reference_mask.initial(size))
        assert decoded.logits.shape == (size, size)
        assert bool(torch.isfinite(decoded.logits).all())


# -- encoder ----------------------------------------------------------------------------------------------------------


def test_shifted_windows_against_a_mask_over_all_pairs() -> None:
    """Windowed attention equals attention over all real and padded places that share a window, with absolute rotary
    positions in the padded grid, as the release computes it."""
    torch.manual_seed(0)
    W, heads, dim, h, w = 4, 2, 16, 6, 7
    layer = Attention(dim, heads, W, shifted=True)
    torch.nn.init.normal_(layer.padding)
    x = torch.randn(1, h * w, dim)
    with torch.no_grad():
        got = layer(x, [(h, w)])[0]
        lead, H, V = 2, 8, 12
        grid = layer.padding.expand(H * V, dim).clone().view(H, V, dim)
        grid[lead : lead + h, lead : lead + w] = x[0].view(h, w, dim)
        q, k, v = layer.qkv(grid.view(H * V, dim)).view(H * V, 3, heads, -1).permute(1, 2, 0, 3)
        cos, sin = rope_tables(H, V, dim // heads, CPU)
        window = (torch.arange(H)[:, None] // W * 100 + torch.arange(V)[None, :] // W).flatten()
        mask = window[:, None] == window[None, :]
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask)
        want = layer.proj(out.transpose(0, 1).reshape(H, V, dim)[lead : lead + h, lead : lead + w].reshape(-1, dim))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    cos, sin = rope_tables(5, 6, 8, CPU)
    x = torch.randn(30, 8)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=1), x.norm(dim=1))
    q, k = torch.randn(8), torch.randn(8)

    def score(i: int, j: int) -> torch.Tensor:
        return rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])

    torch.testing.assert_close(score(0, 7), score(8, 15))  # one down, one right, from two places
    assert cos[0].eq(1).all()
    assert torch.allclose(torch.atan2(sin[6], cos[6])[:2], torch.tensor([0.5, 0.5 * 10000 ** (-2 / 4)]))


# -- Canny ------------------------------------------------------------------------------------------------------------


def normalised(image: torch.Tensor) -> torch.Tensor:
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_canny_of_a_vertical_step() -> None:
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 255.0
    maps = canny(normalised(image)[None])
    rows = slice(8, 24)
    assert maps.magnitude[0, 0, rows, 8].abs().max() < 1e-3  # flat
    strongest = 8 + maps.magnitude[0, 0, 16, 8:24].argmax().item()  # the image's own border is an edge too
    assert strongest in (15, 16)
    assert maps.orientation[0, 0, 16, strongest].item() % 8 in (0, 4)  # gradient along x


def test_canny_of_a_horizontal_step_and_its_channels() -> None:
    image = torch.zeros(3, 32, 32)
    image[:, 16:] = 255.0
    maps = canny(normalised(image)[None])
    row = 8 + int(maps.magnitude[0, 0, 8:24, 16].argmax())
    assert maps.orientation[0, 0, row, 16].item() % 4 == 2
    channels = network_input(maps)[0]
    norms = channels.flatten(1).norm(dim=1)
    assert torch.allclose(norms[norms > 0.5], torch.ones(int((norms > 0.5).sum())), atol=1e-5)
    assert not canny(torch.zeros(1, 3, 16, 16)).is_max[0, 0, 4:12, 4:12].any()  # a constant has no maxima


# -- attention and experts --------------------------------------------------------------------------------------------


def test_code_table_equals_quantised_keys() -> None:
    """BSQ attention through 2**L weighted codes equals attention over all N quantised keys."""
    torch.manual_seed(3)
    layer = HybridAttention(tiny())
    q, k, v = torch.randn(5, 8), torch.randn(40, 8), torch.randn(40, 8)
    with torch.no_grad():
        got = layer.bsq(q, k, v)
        keys = layer.code_table()[layer.codes(k)]
        want = torch.softmax(q @ keys.t() * layer.scale, dim=-1) @ v
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    bits = (layer.code_proj(k) >= 0).long()
    assert torch.equal(layer.codes(k), bits @ torch.tensor([8, 4, 2, 1]))  # the first bit is the most significant


def test_gradient_passes_straight_through_the_sign() -> None:
    layer = HybridAttention(tiny())
    x = torch.randn(1, 16, 16, requires_grad=True)
    out, commitment = layer(x, (4, 4), torch.zeros(1, 16, dtype=torch.bool))
    (grad,) = torch.autograd.grad(out.sum(), layer.code_proj.weight)
    assert grad.abs().sum() > 0
    assert commitment > 0


@pytest.mark.parametrize("edge", ["none", "some", "all"])
def test_experts_by_hand(edge: str) -> None:
    torch.manual_seed(1)
    layer = HybridExperts(tiny()).eval()
    torch.nn.init.normal_(layer.expert_bias)
    x = torch.randn(9, 16)
    marked = {"none": torch.zeros(9), "some": torch.arange(9) % 2, "all": torch.ones(9)}[edge].bool()
    with torch.no_grad():
        got = layer(x, marked)
        for i in range(9):
            want = layer.shared(x[i])
            if marked[i]:
                affinity = torch.sigmoid(layer.expert_gate(x[i]))
                e = int((affinity + layer.expert_bias).argmax())
                weights = torch.softmax(torch.stack([torch.sigmoid(layer.shared_gate(x[i]))[0], affinity[e]]), 0)
                want = weights[0] * want + weights[1] * layer.expert(x[i], e)
            torch.testing.assert_close(got[i], want, atol=1e-5, rtol=1e-5)


def test_balancing_moves_the_choice_towards_idle_experts() -> None:
    net = model().train()
    experts = net.blocks[0].experts
    with torch.no_grad():
        net(torch.randn(1, 3, 128, 128), torch.from_numpy(some_reference())[None])
    counts = experts.routing_counts.clone()
    assert counts.sum() > 0
    net.balance_experts()
    want = -BALANCE_STEP * torch.sign(counts - counts.mean())
    torch.testing.assert_close(experts.expert_bias, want)
    assert experts.routing_counts.sum() == 0
