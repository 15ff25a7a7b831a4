"""The native click in bfloat16 against its PyTorch twin: the plain network with rounded operands (R31-R34).

A number near the middle between two bfloat16 may be rounded either way, by the last bit of a float32 sum, and one code
of a key with it. So the bound of a single logit is that of bfloat16, and the typical difference is far smaller.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from inter2former import _native
from inter2former.config import ModelConfig, base, tiny
from inter2former.runtime.decoder import FusedDecoder
from inter2former.runtime.native import choose_precision
from inter2former.runtime.rounding import round_experts, rounded, with_rounded_products
from tests.native.support import make, tokens, weights
from tests.native.test_decoder import make_features, make_model, session, twin

PATHS = [name for name, _, reason in _native.instruction_sets("bfloat16") if not reason]
CONFIGS = {
    "tiny": tiny(),
    "group norm": dataclasses.replace(tiny(), up_norm="group"),
    "odd widths": dataclasses.replace(
        tiny(),
        embed_dim=37,
        up_channels=(37, 7, 5, 3),
        prompt_channels=(3, 9, 19),
        attention_dim=20,
        n_experts=3,
        expert_hidden=17,
        code_bits=1,
        decoder_blocks=1,
    ),
}


def assert_close(got: np.ndarray, want: np.ndarray, plain: np.ndarray, largest: float) -> None:
    """The largest difference is bounded, and the mean one below what rounding changes."""
    difference = np.abs(got - want)
    assert difference.max() <= largest
    assert difference.mean() <= 0.7 * np.abs(want - plain).mean()


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_r31_a_session_agrees_with_the_twin(isa: str, name: str) -> None:
    model = make_model(CONFIGS[name])
    check(model.config, model, isa, 128, (1, 0, 7, 8), 3)


def test_r31_the_released_widths_agree() -> None:
    check(base(), make_model(base()), "auto", 256, (2, 1, 15, 16), 2)


def check(config: ModelConfig, model: torch.nn.Module, isa: str, size: int, box: tuple[int, ...], steps: int) -> None:
    decoder = FusedDecoder(model, _native, isa, "bfloat16")  # type: ignore[arg-type]
    rounded_model = with_rounded_products(model)  # type: ignore[arg-type]
    features = make_features(config, size)
    left, top, right, bottom = (16 * side for side in box)
    inside = np.s_[top:bottom, left:right]
    for reference in session(size, 0, steps):
        want, plain = (twin(m, features, reference, box) for m in (rounded_model, model))  # type: ignore[arg-type]
        got = decoder.click(features, reference, box)  # type: ignore[arg-type]
        assert_close(got.low, want.low.numpy(), plain.low.numpy(), 0.05)
        assert_close(got.inside, want.logits.numpy()[inside], plain.logits.numpy()[inside], 0.2)


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize(("width", "hidden", "experts"), [(256, 64, 8), (33, 17, 3), (1, 1, 1), (40, 33, 64)])
@pytest.mark.parametrize("count", [0, 1, 5, 97])
def test_r31_experts_agree_with_the_twin(isa: str, width: int, hidden: int, experts: int, count: int) -> None:
    module = make(width, hidden, experts)
    packed = _native.HybridExperts(weights(module), isa, "bfloat16")
    x, edge = tokens(count, width)
    got = packed.forward(x.numpy(), edge.numpy())
    with torch.no_grad():
        round_experts(module)
        want = module(x, edge).numpy()
    assert np.abs(got - want).max(initial=0.0) <= 0.05
    assert np.abs(got - want).mean() <= 1e-3 if count else True


@pytest.mark.parametrize("isa", PATHS)
def test_r34_a_row_has_the_same_bits_in_every_batch(isa: str) -> None:
    packed = _native.HybridExperts(weights(make(64, 40, 5)), isa, "bfloat16")
    x, edge = (t.numpy() for t in tokens(130, 64))
    whole = packed.forward(x, edge)
    for first, last in ((0, 1), (17, 30), (100, 130)):
        assert np.array_equal(packed.forward(x[first:last], edge[first:last]), whole[first:last])


@pytest.mark.parametrize("isa", PATHS)
def test_r34_same_bits_for_every_number_of_threads_and_from_many_threads(isa: str) -> None:
    model = make_model(dataclasses.replace(base(), up_channels=(256, 32, 16, 4)))
    decoder = FusedDecoder(model, _native, isa, "bfloat16")
    image = decoder.compact(make_features(model.config, 128))
    references = session(128, 4, 2)
    wanted = [decoder.click(image, reference, (2, 1, 7, 8)) for reference in references]

    def equal(index: int) -> bool:
        got = decoder.click(image, references[index], (2, 1, 7, 8))
        return np.array_equal(got.inside, wanted[index].inside) and np.array_equal(got.low, wanted[index].low)

    for threads in (1, 2, 4):
        _native.set_threads(threads)
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(equal, [0, 1, 1, 0]))


def test_paths_round_alike() -> None:
    """Weights of one path against another's: halfway cases, zeros, the largest and smallest numbers."""
    config = dataclasses.replace(tiny(), embed_dim=8, up_channels=(8, 4, 4, 4), decoder_blocks=1)
    model, features = make_model(config), make_features(config, 64)
    reference = session(64, 1, 2)[1]
    clicks = [FusedDecoder(model, _native, isa, "bfloat16").click(features, reference, (0, 0, 4, 4)) for isa in PATHS]
    for click in clicks[1:]:
        np.testing.assert_allclose(click.inside, clicks[0].inside, atol=0.05)


def test_what_is_not_finite_stays_visible() -> None:
    model = make_model(tiny())
    features = make_features(model.config, 64)
    features.tokens[0, 3, 2, 2] = float("nan")
    for isa in PATHS:
        decoder = FusedDecoder(model, _native, isa, "bfloat16")
        assert not np.isfinite(decoder.click(features, session(64, 0, 1)[0]).low).all()


def test_auto_is_what_the_cpu_is_fast_at() -> None:
    if PATHS == ["portable"] or "amx" in PATHS:  # AVX-512 alone is fast on some makers' CPUs only
        assert choose_precision("auto") == ("float32" if PATHS == ["portable"] else "bfloat16")
    assert choose_precision("auto") == ("bfloat16" if _native.bfloat16_pays() else "float32")
    assert choose_precision("float32") == "float32"
    with pytest.raises(ValueError, match="precision is 'half'"):
        choose_precision("half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown precision 'half'"):
        _native.instruction_sets("half")
    with pytest.raises(ValueError, match="Unknown instruction set 'scalar'"):
        _native.HybridExperts(weights(make(8, 8, 2)), "scalar", "bfloat16")


def test_rounding_is_that_of_bfloat16() -> None:
    assert rounded(torch.tensor([1.00390625, 1.01171875])).tolist() == [1.0, 1.015625]  # ties to even
