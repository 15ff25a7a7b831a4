"""The native experts against their PyTorch twin: every instruction set, odd sizes, every kind of routing (R31-R34)."""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inter2former import _native
from inter2former.nn.experts import HybridExperts
from tests.native.support import PATHS, make, tokens, weights

LENGTHS = [0, 1, 2, 5, 11, 12, 13, 15, 16, 17, 33, 47, 48, 49, 97]  # around tiles, vectors and blocks


def exact(module: HybridExperts, x: torch.Tensor, edge: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 result, and which rows may be compared: where the choice of the expert is not a near tie."""
    double = copy.deepcopy(module).double()
    with torch.inference_mode():
        out = double(x.double(), edge)
        score = torch.sigmoid(double.expert_gate(x.double())) + double.expert_bias
    if score.shape[1] == 1:
        return out, torch.ones(len(x), dtype=torch.bool)
    best = score.topk(2, dim=1).values
    return out, ~edge | (best[:, 0] - best[:, 1] > 1e-5)


def assert_agrees(module: HybridExperts, isa: str, x: torch.Tensor, edge: torch.Tensor) -> None:
    """Native error against float64 at most twice PyTorch's own, with a floor of a few float32 steps."""
    want, compare = exact(module, x, edge)
    got = torch.from_numpy(_native.HybridExperts(weights(module), isa).forward(x.numpy(), edge.numpy()))
    assert got.dtype == torch.float32
    assert got.shape == x.shape
    with torch.inference_mode():
        twin = module(x, edge)
    if not compare.any():
        return
    ours = (got - want)[compare].abs()
    theirs = (twin - want)[compare].abs()
    scale = float(want.abs().max())
    assert ours.max() <= 2 * theirs.max() + 4e-7 * scale
    if ours.numel() < 64:  # the mean over a handful says how lucky PyTorch was, not how exact
        return
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + 1e-7 * scale


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("count", LENGTHS)
def test_r31_every_path_agrees_at_every_length(isa: str, count: int) -> None:
    assert_agrees(make(48, 20, 4), isa, *tokens(count, 48, seed=count))


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize(
    ("width", "hidden", "n_experts"),
    [(1, 1, 1), (3, 2, 2), (16, 8, 4), (17, 31, 7), (31, 17, 33), (33, 16, 15), (128, 64, 8), (256, 64, 64)],
)
def test_r31_every_path_agrees_at_every_width(isa: str, width: int, hidden: int, n_experts: int) -> None:
    assert_agrees(make(width, hidden, n_experts), isa, *tokens(70, width))


@pytest.mark.parametrize("isa", PATHS)
def test_r31_released_width_is_within_twice_the_error_of_pytorch(isa: str) -> None:
    assert_agrees(make(256, 64, 8), isa, *tokens(500, 256))


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("edge", [False, True])
def test_r31_no_edge_tokens_and_only_edge_tokens(isa: str, edge: bool) -> None:
    x, _ = tokens(60, 24)
    assert_agrees(make(24, 12, 5), isa, x, torch.full((60,), edge))


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("expert", [0, 2, 4])
def test_r31_all_tokens_on_one_expert(isa: str, expert: int) -> None:
    module = make(24, 12, 5)
    with torch.no_grad():
        module.expert_bias.zero_()
        module.expert_bias[expert] = 10
    x, edge = tokens(90, 24)
    chosen, _ = _native.HybridExperts(weights(module), isa).route(x.numpy())
    assert (chosen == expert).all()
    assert_agrees(module, isa, x, edge)


@pytest.mark.parametrize("isa", PATHS)
def test_r31_every_routing_of_three_tokens(isa: str) -> None:
    """One gate direction an expert: token i points where routing[i] says, so every assignment occurs."""
    module = make(8, 4, 3)
    with torch.no_grad():
        module.expert_gate.weight.copy_(10 * torch.eye(3, 8))
        module.expert_gate.bias.zero_()
    packed = _native.HybridExperts(weights(module), isa)
    for routing in itertools.product(range(3), repeat=3):
        x = torch.eye(8)[list(routing)] + 0.01 * torch.arange(3)[:, None]
        chosen, _ = packed.route(x.numpy())
        assert tuple(chosen) == routing
        assert_agrees(module, isa, x, torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("isa", PATHS)
def test_r31_equal_scores_choose_the_first_expert(isa: str) -> None:
    module = make(8, 4, 6)
    with torch.no_grad():
        module.expert_gate.weight.zero_()
        module.expert_gate.bias.zero_()
        module.expert_bias.zero_()
    chosen, _ = _native.HybridExperts(weights(module), isa).route(tokens(20, 8)[0].numpy())
    assert (chosen == 0).all()


@pytest.mark.parametrize("isa", PATHS)
def test_r31_strided_and_unaligned_inputs(isa: str) -> None:
    module = make(20, 12, 4)
    packed = _native.HybridExperts(weights(module), isa)
    x, edge = tokens(50, 20)
    want = packed.forward(x.numpy(), edge.numpy())
    wide = np.zeros((50, 33), np.float32)
    wide[:, 5:25] = x.numpy()  # rows 33 apart, off every vector boundary
    assert np.array_equal(packed.forward(wide[:, 5:25], edge.numpy()), want)
    backwards = np.ascontiguousarray(x.numpy()[::-1])[::-1]
    assert np.array_equal(packed.forward(backwards, edge.numpy()), want)
    same = np.broadcast_to(x.numpy()[:1], (50, 20))  # a stride of zero
    assert np.array_equal(packed.forward(same, edge.numpy())[edge.numpy().argmin()], want[0]) or edge[0]
    out = np.full((50, 40), np.float32(7))
    returned = packed.forward(x.numpy(), edge.numpy(), out[:, 3:23])
    assert np.shares_memory(returned, out)
    assert np.array_equal(out[:, 3:23], want)
    assert (out[:, :3] == 7).all()
    assert (out[:, 23:] == 7).all()


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e-3, 1e3, 1e6])
def test_r31_denormals_and_large_magnitudes(isa: str, scale: float) -> None:
    x, edge = tokens(40, 32)
    assert_agrees(make(32, 16, 4), isa, x * scale, edge)


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_r8_a_value_that_is_not_finite_stays_visible_and_in_its_row(isa: str, value: float) -> None:
    packed = _native.HybridExperts(weights(make(32, 16, 4)), isa)
    x, edge = tokens(40, 32)
    want = packed.forward(x.numpy(), edge.numpy())
    x[7, 3] = value
    got = packed.forward(x.numpy(), edge.numpy())
    assert not np.isfinite(got[7]).any()
    assert np.array_equal(np.delete(got, 7, 0), np.delete(want, 7, 0))


@pytest.mark.parametrize("isa", PATHS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_r31_differential(isa: str, data: st.DataObject) -> None:
    """Random shapes, routings and shares of edge tokens."""
    width = data.draw(st.integers(1, 70), "width")
    hidden = data.draw(st.integers(1, 40), "hidden")
    n_experts = data.draw(st.integers(1, 64), "experts")
    count = data.draw(st.integers(0, 120), "tokens")
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "edge share")
    seed = data.draw(st.integers(0, 2**16), "seed")
    _native.set_threads(data.draw(st.integers(1, 3), "threads"))
    assert_agrees(make(width, hidden, n_experts, seed), isa, *tokens(count, width, seed, share))


@pytest.mark.parametrize("isa", PATHS)
def test_r34_a_row_does_not_depend_on_the_rows_beside_it(isa: str) -> None:
    packed = _native.HybridExperts(weights(make(64, 24, 6)), isa)
    x, edge = (t.numpy() for t in tokens(130, 64))
    want = packed.forward(x, edge)
    for first, last in [(0, 1), (5, 6), (7, 20), (0, 49), (129, 130), (60, 130)]:
        assert np.array_equal(packed.forward(x[first:last], edge[first:last]), want[first:last])
    order = np.random.default_rng(0).permutation(130)
    assert np.array_equal(packed.forward(x[order], edge[order]), want[order])


@pytest.mark.parametrize("isa", PATHS)
def test_r34_same_bits_for_every_number_of_threads(isa: str) -> None:
    packed = _native.HybridExperts(weights(make(64, 32, 6)), isa)
    x, edge = (t.numpy() for t in tokens(700, 64))  # enough work for the pool
    _native.set_threads(1)
    want = packed.forward(x, edge)
    for threads in range(1, 6):
        _native.set_threads(threads)
        assert _native.threads() == threads
        for _ in range(20):
            assert np.array_equal(packed.forward(x, edge), want)


def test_r33_the_packed_weights_do_not_need_their_source() -> None:
    module = make(16, 8, 3)
    x, edge = (t.numpy() for t in tokens(30, 16))
    source = {name: array.copy() for name, array in weights(module).items()}
    packed = _native.HybridExperts(source)
    want = packed.forward(x, edge)
    for array in source.values():
        array.fill(np.nan)
    source.clear()
    gc.collect()
    assert np.array_equal(packed.forward(x, edge), want)
    assert packed.nbytes > sum(a.nbytes for name, a in weights(module).items() if name in ("w1", "w2", "w3"))


_X, _EDGE = (t.numpy() for t in tokens(6, 16))
_FROZEN = np.zeros((6, 16), np.float32)
_FROZEN.setflags(write=False)
_BUFFER = np.zeros((12, 16), np.float32)


@pytest.mark.parametrize(
    ("x", "edge", "out", "error"),
    [
        pytest.param([[0.0] * 16], _EDGE, None, TypeError, id="x is a list"),
        pytest.param(None, _EDGE, None, TypeError, id="x is None"),
        pytest.param(_X.astype(np.float64), _EDGE, None, TypeError, id="x is float64"),
        pytest.param(_X.astype(">f4"), _EDGE, None, TypeError, id="x has foreign byte order"),
        pytest.param(_X[:, :15], _EDGE, None, ValueError, id="x too narrow"),
        pytest.param(_X[0], _EDGE, None, ValueError, id="x has one dimension"),
        pytest.param(_X[None], _EDGE, None, ValueError, id="x has three dimensions"),
        pytest.param(np.asfortranarray(_X), _EDGE, None, ValueError, id="x in column order"),
        pytest.param(np.zeros((6, 32), np.float32)[:, ::2], _EDGE, None, ValueError, id="x skips columns"),
        pytest.param(
            np.frombuffer(bytes(6 * 64 + 1), np.uint8)[1:].view(np.float32).reshape(6, 16),
            _EDGE,
            None,
            ValueError,
            id="x off its elements",
        ),
        pytest.param(_X, _EDGE[:5], None, ValueError, id="edge too short"),
        pytest.param(_X, _EDGE.astype(np.uint8), None, TypeError, id="edge is uint8"),
        pytest.param(_X, np.zeros(12, bool)[::2], None, ValueError, id="edge strided"),
        pytest.param(_X, _EDGE[None], None, ValueError, id="edge has two dimensions"),
        pytest.param(_X, _EDGE, np.zeros((5, 16), np.float32), ValueError, id="out too short"),
        pytest.param(_X, _EDGE, np.zeros((6, 16)), TypeError, id="out is float64"),
        pytest.param(_X, _EDGE, _FROZEN, ValueError, id="out is read-only"),
        pytest.param(_X, _EDGE, _X, ValueError, id="out is x"),
        pytest.param(_BUFFER[:6], _EDGE, _BUFFER[5:11], ValueError, id="out overlaps x"),
        pytest.param(
            _X,
            _EDGE,
            np.lib.stride_tricks.as_strided(np.zeros(40, np.float32), (6, 16), (16, 4)),
            ValueError,
            id="out overlaps itself",
        ),
    ],
)
def test_r33_bad_arguments_raise(x: Any, edge: Any, out: Any, error: type[Exception]) -> None:
    packed = _native.HybridExperts(weights(make(16, 8, 3)))
    with pytest.raises(error, match=r"(x|edge|out|shape|dimensions)"):
        packed.forward(x, edge, out)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        pytest.param({"w3": None}, ValueError, "'w3' is missing", id="missing"),
        pytest.param({"more": np.zeros(3, np.float32)}, ValueError, "not known", id="unknown"),
        pytest.param({"b1": np.zeros((3, 9), np.float32)}, ValueError, "b1 must have shape", id="shape"),
        pytest.param({"b1": np.zeros((3, 8))}, TypeError, "b1 must be float32", id="dtype"),
        pytest.param({"w1": np.zeros((65, 8, 16), np.float32)}, ValueError, "1 to 64 experts", id="too many experts"),
        pytest.param({"w1": np.zeros((0, 8, 16), np.float32)}, ValueError, "1 to 64 experts", id="no expert"),
        pytest.param({"w1": np.zeros((3, 0, 16), np.float32)}, ValueError, "w1 must have shape", id="no hidden unit"),
        pytest.param({"w2": np.zeros((3, 8, 32), np.float32)[..., ::2]}, ValueError, "contiguous", id="strided"),
        pytest.param({"norm.bias": "text"}, TypeError, "norm.bias must be a numpy array", id="text"),
    ],
)
def test_r33_bad_weights_raise(change: dict[str, Any], error: type[Exception], text: str) -> None:
    changed = {name: array for name, array in (weights(make(16, 8, 3)) | change).items() if array is not None}
    with pytest.raises(error, match=text):
        _native.HybridExperts(changed)


def test_r31_unsupported_names_give_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"Unknown instruction set 'mmx'; here: auto, .*portable, scalar"):
        _native.HybridExperts(weights(make(4, 4, 2)), "mmx")
    for name, _, reason in _native.instruction_sets():
        if reason:
            with pytest.raises(ValueError, match="cannot run"):
                _native.HybridExperts(weights(make(4, 4, 2)), name)


def test_r31_a_forced_path_is_used() -> None:
    for name in PATHS:
        assert _native.HybridExperts(weights(make(4, 4, 2)), name).isa == name
    assert _native.HybridExperts(weights(make(4, 4, 2))).isa == PATHS[0]


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_r33_a_wrong_number_of_threads_raises(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 1024"):
        _native.set_threads(count)
