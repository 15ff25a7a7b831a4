"""The native click against its PyTorch twin: every instruction set, sizes, crops, reference masks (R31-R34)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from inter2former import _native, reference_mask
from inter2former.config import ModelConfig, base, small, tiny
from inter2former.nn.model import Features, Inter2Former
from inter2former.runtime.decoder import FusedDecoder
from tests.native.support import PATHS

Reference = npt.NDArray[np.uint8]


def make_model(config: ModelConfig, seed: int = 0) -> Inter2Former:
    """Every bias and norm random, so that none hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Inter2Former(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def make_features(config: ModelConfig, size: int, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    side = size // 16
    edges = zip(config.up_channels, (8, 4, 2, 1), strict=True)
    return Features(
        torch.randn(1, config.embed_dim, side, side, generator=generator),
        [torch.randn(1, channels, size // by, size // by, generator=generator) for channels, by in edges],
    )


def twin(model: Inter2Former, features: Features, reference: Reference, box: Any = None) -> Any:
    """What the plain network says; upsampled in `box` where one is given."""
    if box is not None:
        model.upsampling.box = lambda low: box  # type: ignore[method-assign]
    try:
        return model.decode(features, reference)
    finally:
        if box is not None:
            del model.upsampling.box


def assert_agrees(model: Inter2Former, isa: str, features: Features, reference: Reference, box: Any = None) -> None:
    decoder = FusedDecoder(model, _native, isa)
    want = twin(model, features, reference, box)
    got = decoder.click(features, reference, box)
    np.testing.assert_allclose(got.low, want.low.numpy(), atol=1e-5)
    if box is None and (np.abs(got.low - model.config.low_threshold) > 1e-5).all():
        assert got.box == want.box
    box = box or want.box
    again = decoder.click(features, reference, box)
    left, top, right, bottom = (16 * side for side in box)
    np.testing.assert_allclose(again.inside, want.logits[top:bottom, left:right].numpy(), atol=1e-4)


def session(size: int, seed: int, steps: int) -> list[Reference]:
    """Reference masks of a few clicks on a disc that moves."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    reference = reference_mask.initial(size)
    out = []
    for index in range(steps):
        row, column = (int(v) for v in rng.integers(0, size, 2))
        reference = reference_mask.paint_clicks(reference, [(row, column, index % 2 == 0)], 5)
        out.append(reference)
        row, column = (int(v) for v in rng.integers(size // 4, 3 * size // 4, 2))
        disc = (rows - row) ** 2 + (columns - column) ** 2 < (size // 5) ** 2
        reference = reference_mask.apply_prediction(reference, disc)
    return out


CONFIGS = {
    "tiny": tiny(),
    "group norm": dataclasses.replace(tiny(), up_norm="group"),
    "released edges": dataclasses.replace(tiny(), edge_rule="released", code_bits=5),
    "odd widths": dataclasses.replace(
        tiny(),
        embed_dim=21,
        up_channels=(21, 7, 5, 3),
        prompt_channels=(3, 9, 19),
        attention_dim=20,
        n_experts=3,
        code_bits=1,
        decoder_blocks=1,
    ),
}


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_r31_a_session_agrees_with_the_twin(isa: str, name: str) -> None:
    model = make_model(CONFIGS[name])
    features = make_features(model.config, 128)
    for reference in session(128, 0, 3):
        assert_agrees(model, isa, features, reference)


def test_r31_the_released_widths_agree() -> None:
    model = make_model(base())
    features = make_features(model.config, 256)
    for reference in session(256, 1, 2):
        assert_agrees(model, "auto", features, reference)


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize(
    "box", [(0, 0, 8, 8), (0, 0, 1, 1), (7, 7, 8, 8), (3, 0, 4, 8), (0, 5, 8, 6), (2, 1, 7, 8), (1, 2, 3, 4)]
)
def test_r31_crops_at_every_border(isa: str, box: tuple[int, int, int, int]) -> None:
    model = make_model(tiny())
    assert_agrees(model, isa, make_features(model.config, 128), session(128, 2, 2)[1], box)


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("seed", range(3))
def test_r31_reference_masks_of_noise(isa: str, seed: int) -> None:
    """Nothing is constant anywhere: no token comes from the table."""
    rng = np.random.default_rng(seed)
    model = make_model(tiny())
    assert_agrees(model, isa, make_features(model.config, 128), rng.integers(0, 5, (128, 128), dtype=np.uint8))


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("state", range(5))
def test_r31_reference_masks_of_one_state(isa: str, state: int) -> None:
    model = make_model(tiny())
    assert_agrees(model, isa, make_features(model.config, 64), np.full((64, 64), state, np.uint8))


@pytest.mark.parametrize("isa", PATHS)
def test_r31_a_query_whose_likely_codes_have_no_keys(isa: str) -> None:
    """The product of exponentials underflows; the weights are then relative to the best code that has keys."""
    model = make_model(tiny())
    for block in model.blocks:
        block.attention.codebook *= 3000.0  # type: ignore[operator, union-attr]
    model.blocks[0].attention.code_proj.bias += 100.0  # type: ignore[operator, union-attr, arg-type]
    assert_agrees(model, isa, make_features(model.config, 128), np.where(session(128, 3, 2)[1] == 2, 1, 3).astype("u1"))


@pytest.mark.parametrize("isa", PATHS)
@settings(deadline=None, max_examples=15, phases=[Phase.generate])  # shrinking takes minutes
@given(data=st.data())
def test_r31_differential(isa: str, data: st.DataObject) -> None:
    """Random widths, sizes, crops, blobs of states, numbers of threads."""
    draw = data.draw
    config = dataclasses.replace(
        tiny(),
        embed_dim=(d := draw(st.integers(2, 40), "embed_dim")),
        up_channels=(d, *(draw(st.integers(2, 20), f"up_{i}") for i in range(3))),
        prompt_channels=tuple(draw(st.integers(1, 20), f"prompt_{i}") for i in range(3)),
        attention_dim=4 * draw(st.integers(1, 18), "attention_dim / 4"),
        code_bits=draw(st.integers(1, 9), "code_bits"),
        n_experts=draw(st.integers(1, 9), "experts"),
        expert_hidden=draw(st.integers(1, 20), "hidden"),
        decoder_blocks=draw(st.integers(1, 2), "blocks"),
        up_norm=draw(st.sampled_from(["group", "pixel"])),
        edge_rule=draw(st.sampled_from(["exact", "released"])),
    )
    side = draw(st.integers(1, 9), "tokens a side")
    seed = draw(st.integers(0, 2**16), "seed")
    rng = np.random.default_rng(seed)
    coarse = draw(st.sampled_from([1, 8, 16, 48]), "pixels a blob")
    blobs = rng.integers(0, 5, (-(-16 * side // coarse),) * 2, dtype=np.uint8)
    reference = np.kron(blobs, np.ones((coarse, coarse), np.uint8))[: 16 * side, : 16 * side]
    left, top = (draw(st.integers(0, side - 1)) for _ in range(2))
    box = (left, top, draw(st.integers(left + 1, side)), draw(st.integers(top + 1, side)))
    model, features = make_model(config, seed), make_features(config, 16 * side, seed)
    if near_tie(model, features, reference):
        return
    _native.set_threads(draw(st.integers(1, 3), "threads"))
    assert_agrees(model, isa, features, np.ascontiguousarray(reference), box)


def near_tie(model: Inter2Former, features: Features, reference: Reference) -> bool:
    """Whether a code bit or the choice of an expert hangs on the last bits of a float32 sum."""
    close: list[bool] = []

    def bits(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        close.append(bool((output.abs() < 1e-4).any()))

    def scores(module: Any, _inputs: Any, output: torch.Tensor) -> None:
        best = torch.sigmoid(output).add(module.bias_of_choice).topk(min(2, output.shape[1]), dim=1).values
        close.append(bool((best[:, 0] - best[:, -1] < 1e-5).any()) and best.shape[1] > 1)

    hooks = []
    for block in model.blocks:
        block.experts.expert_gate.bias_of_choice = block.experts.expert_bias  # type: ignore[union-attr]
        hooks.append(block.attention.code_proj.register_forward_hook(bits))  # type: ignore[union-attr, operator]
        hooks.append(block.experts.expert_gate.register_forward_hook(scores))  # type: ignore[union-attr, operator]
    model.decode(features, reference)
    for hook in hooks:
        hook.remove()
    return any(close)


def test_r34_same_bits_for_every_number_of_threads_and_from_many_threads() -> None:
    model = make_model(dataclasses.replace(base(), up_channels=(256, 32, 16, 4)))
    decoder = FusedDecoder(model, _native)
    image = decoder.compact(make_features(model.config, 256))
    references = session(256, 4, 3)
    wanted = [decoder.click(image, reference, (2, 1, 15, 16)) for reference in references]

    def equal(index: int) -> bool:
        got = decoder.click(image, references[index], (2, 1, 15, 16))
        return np.array_equal(got.inside, wanted[index].inside) and np.array_equal(got.low, wanted[index].low)

    for threads in range(1, 5):
        _native.set_threads(threads)
        assert all(equal(index) for index in range(3))
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(equal, [0, 1, 2, 2, 1, 0]))


@pytest.mark.parametrize("preset", [base, small, tiny])
@pytest.mark.parametrize("box", [(1, 1, 14, 15), (0, 0, 16, 16), (3, 5, 4, 6)])
def test_compact_encodings_are_small_and_close(preset: Callable[[], ModelConfig], box: Any) -> None:
    """Logits are within 1e-4 of the plain network's, at borders of crops too; 24 MB at T = 1024, 96 MB at T = 2048."""
    model = make_model(preset())
    features = make_features(model.config, 256)
    decoder = FusedDecoder(model, _native)
    image = decoder.compact(features)
    assert image.nbytes * 16 <= 24e6  # T = 1024 has sixteen times the tokens
    assert image.nbytes < features.nbytes
    left, top, right, bottom = (16 * side for side in box)
    for reference in session(256, 5, 2):
        want = twin(model, features, reference, box).logits[top:bottom, left:right].numpy()
        np.testing.assert_allclose(decoder.click(image, reference, box).inside, want, rtol=0, atol=1e-4)


def test_r8_what_is_not_finite_stays_visible() -> None:
    model = make_model(tiny())
    decoder = FusedDecoder(model, _native)
    features = make_features(model.config, 64)
    features.edges[3][0, 0, 20, 30] = float("nan")
    image = decoder.compact(features)
    assert not all(bool(torch.isfinite(part.float()).all()) for part in image.edges)
    features = make_features(model.config, 64)
    features.tokens[0, 3, 2, 2] = float("nan")
    assert not np.isfinite(decoder.click(features, reference_mask.initial(64)).low).all()


def arguments() -> dict[str, Any]:
    model = make_model(tiny())
    decoder = FusedDecoder(model, _native)
    image = decoder.compact(make_features(model.config, 64), exact=False)
    return {
        "tokens": image.tokens.numpy(),
        "edges": [part.numpy() for part in image.maps],
        "units": [part.view(torch.uint16).numpy() for part in image.units],
        "middles": [part.numpy() for part in image.middles],
        "cosines": np.ones((16, 4), np.float32),
        "sines": np.zeros((16, 4), np.float32),
        "state": np.full((64, 64), 2, np.uint8),
    }


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("tokens", np.zeros((4, 4, 15), np.float32), ValueError, "tokens must have shape"),
        ("tokens", np.zeros((4, 4, 16)), TypeError, "tokens must be float32"),
        ("tokens", np.zeros((4, 4, 32), np.float32)[:, :, ::2], ValueError, "contiguous"),
        ("tokens", np.zeros((0, 4, 16), np.float32), ValueError, "1 to 4096"),
        ("edges", [], ValueError, "4 arrays"),
        ("edges", [np.zeros(3, np.int16)] * 4, ValueError, r"edges\[0\] must have shape"),
        ("edges", [np.zeros(3)] * 4, TypeError, r"edges\[0\] must be float32"),
        ("units", [np.zeros(3, np.uint16)] * 4, ValueError, r"units\[0\] must have shape"),
        ("units", [np.zeros(3, np.float32)] * 4, TypeError, r"units\[0\] must be uint16"),
        ("middles", [np.zeros((8, 8), np.float32)] * 4, ValueError, r"middles\[0\] must have shape"),
        ("cosines", np.ones((15, 4), np.float32), ValueError, "cosines must have shape"),
        ("sines", np.ones((16, 4)), TypeError, "sines must be float32"),
        ("state", np.zeros((64, 48), np.uint8), ValueError, "state must have shape"),
        ("state", np.zeros((64, 64), np.int64), TypeError, "state must be uint8"),
        ("state", np.zeros((128, 128), np.uint8)[::2, ::2], ValueError, "contiguous rows"),
        ("state", np.full((64, 64), 5, np.uint8), ValueError, "state holds a value above 4"),
        ("box", (0, 0, 0, 4), ValueError, "box"),
        ("box", (0, 0, 4, 5), ValueError, "box"),
        ("box", (-1, 0, 4, 4), ValueError, "box"),
    ],
)
def test_r33_bad_arguments_raise(name: str, value: Any, error: type[Exception], text: str) -> None:
    decoder = FusedDecoder(make_model(tiny()), _native)._native
    with pytest.raises(error, match=text):
        decoder.decode(**{**arguments(), name: value})


def test_r33_bad_weights_raise() -> None:
    model = make_model(tiny())
    with pytest.raises(ValueError, match="Unknown instruction set"):
        FusedDecoder(model, _native, "nonsense")
    del model.prompt.convs[3]
    with pytest.raises(ValueError, match=r"'prompt.convs.3.weight' is missing"):
        FusedDecoder(model, _native)
