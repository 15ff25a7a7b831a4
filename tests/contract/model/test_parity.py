"""The converted model computes what the released implementation computed: recorded click sequences, forced and free."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from weight_rule import build_state

from inter2former import reference_mask
from inter2former.checkpoints import from_released
from inter2former.images import Frame
from inter2former.nn.attention import edge_tokens
from inter2former.nn.canny import CannyMaps, canny
from inter2former.nn.model import ImageEncoding, Inter2Former
from inter2former.nn.prompt_embedding import prompt_box
from inter2former.runtime.packing import pack

FIXTURES = Path(__file__).parents[2] / "fixtures" / "model"
SEQUENCES: dict[str, Any] = json.loads((FIXTURES / "sequences.json").read_text())
T = 512


def bits(packed: np.ndarray, *shape: int) -> np.ndarray:
    return np.unpackbits(packed)[: int(np.prod(shape))].reshape(shape).astype(bool)


class Recording:
    """One sequence with its model, its network input and its encoding on injected and on own Canny maps."""

    def __init__(self, name: str) -> None:
        self.info = SEQUENCES[name]
        self.data = np.load(FIXTURES / f"{name}.npz")
        shapes = json.loads((FIXTURES / "released_keys.json").read_text())
        self.model: Inter2Former = from_released(build_state(shapes, self.info["salt"]))
        rgb = np.ascontiguousarray(cv2.imread(str(FIXTURES / self.info["image"]))[..., ::-1])
        self.frame = Frame(*rgb.shape[:2], T, "released")
        self.image = self.frame.prepare(rgb)
        self.own_maps = canny(self.image[None])
        maps = np.load(FIXTURES / "canny_coffee_512.npz")
        self.recorded_maps = CannyMaps(
            torch.from_numpy(maps["grad_mag"]).view(1, 1, T, T),
            torch.from_numpy(maps["orientation_div45"].astype(np.float32)).view(1, 1, T, T),
            torch.from_numpy(bits(maps["is_max"], 1, 1, T, T)),
        )
        with torch.inference_mode():
            self.injected: ImageEncoding = self.model.encode_with_canny(self.image[None], self.recorded_maps)

    def group(self, k: int) -> list[tuple[int, int, bool]]:
        return [(*self.frame.model_pixel(x, y), sign == "positive") for y, x, sign in self.info["clicks"][k]]


@pytest.fixture(scope="module", params=sorted(SEQUENCES))
def recording(request: pytest.FixtureRequest) -> Recording:
    return Recording(request.param)


def test_network_input_and_encoding(recording: Recording) -> None:
    data = recording.data
    np.testing.assert_allclose(recording.image[:, 8::16, 8::16], data["x_stride"], atol=1e-5)
    np.testing.assert_allclose(recording.injected.tokens[0][::8, ::2, ::2], data["emb_slice"], atol=1e-3)
    for j, edges in enumerate(recording.injected.edges):
        channels, side = edges.shape[1:3]
        middle = slice(side // 2 - 6, side // 2 + 6)
        np.testing.assert_allclose(
            edges[0, :: max(1, channels // 8), middle, middle], data[f"edge{j}_slice"], atol=2e-3
        )


def test_own_canny_maps_differ_only_where_float32_decides(recording: Recording) -> None:
    """Up to 239 pixels of this image lie on horizontal gradients whose orientation is arbitrary."""
    maps = np.load(FIXTURES / "canny_coffee_512.npz")
    own = recording.own_maps
    np.testing.assert_allclose(own.magnitude[0, 0], maps["grad_mag"], atol=1e-4)
    assert (own.orientation[0, 0].numpy() % 8 != maps["orientation_div45"] % 8).sum() < 300
    assert (own.is_max[0, 0].numpy() != bits(maps["is_max"], T, T)).sum() < 300


@pytest.mark.parametrize("k", range(5))
def test_forced_click(recording: Recording, k: int) -> None:
    """Each click from its recorded reference mask: discrete decisions equal, numbers within float32 noise."""
    data, info, model = recording.data, recording.info, recording.model
    reference = data[f"c{k}_ref_in"]
    box = prompt_box(reference)
    edge = edge_tokens(reference, box)
    assert box == tuple(info["dpe_boxes"][k])
    assert np.array_equal(edge.ravel(), bits(data[f"c{k}_edge_tokens"], edge.size))
    assert edge.sum() == info["edge_tokens"][k]
    decoded = model.decode(recording.injected, reference)
    assert np.abs(decoded.low.numpy() - data[f"c{k}_low"]).max() < 1e-3
    if info["box_stable_1e3"][k]:
        assert list(decoded.box) == info["boxes"][k]
    assert np.abs(decoded.logits[4::8, 4::8].numpy() - data[f"c{k}_logits_s8"]).max() < 2e-3
    wrong = (decoded.logits.numpy() > 0) != bits(data[f"c{k}_logits_sign"], T, T)
    assert wrong.mean() <= 2e-4
    final = recording.frame.mask_from_logits(decoded.logits)
    assert (final != bits(data[f"c{k}_final_sign"], *final.shape)).mean() <= 2e-4


@pytest.mark.parametrize("k", range(1, 5))
def test_codes_and_experts(recording: Recording, k: int) -> None:
    """At least 99.9 % of the BSQ codes and of the chosen experts are those of the release."""
    data, model = recording.data, recording.model
    reference = data[f"c{k}_ref_in"]
    box = prompt_box(reference)
    edge = torch.from_numpy(edge_tokens(reference, box)).flatten()
    with torch.inference_mode():
        x = model.prompted(recording.injected, reference, box)
        for index, block in enumerate(model.blocks):
            normed = block.norm1(x)
            keys = block.attention.qkv(normed).chunk(3, dim=-1)[1]
            assert (block.attention.codes(keys).numpy() == data[f"c{k}_codes{index}"]).mean() >= 0.999
            attended = x + block.attention.decode(normed, (T // 16, T // 16), edge)
            chosen, _ = block.experts.route(block.norm2(attended)[edge])
            assert (chosen.numpy() == data[f"c{k}_expert{index}"]).mean() >= 0.999
            x = block.decode(x, (T // 16, T // 16), edge)


def test_a_packed_model_keeps_the_records(recording: Recording) -> None:
    """What serves (native clicks, packed linear layers, own norms), encoder included, within the tolerances, forced."""
    packed = pack(copy.deepcopy(recording.model))
    with torch.inference_mode():
        encoding = packed.encode_with_canny(recording.image[None], recording.recorded_maps)
    for mine, plain in zip(encoding.edges, recording.injected.edges, strict=True):
        torch.testing.assert_close(mine, plain, atol=2e-4, rtol=0)
    for k in range(5):
        decoded = packed.decode(encoding, recording.data[f"c{k}_ref_in"])
        assert np.abs(decoded.low.numpy() - recording.data[f"c{k}_low"]).max() < 1e-3
        assert np.abs(decoded.logits[4::8, 4::8].numpy() - recording.data[f"c{k}_logits_s8"]).max() < 2e-3
        wrong = (decoded.logits.numpy() > 0) != bits(recording.data[f"c{k}_logits_sign"], T, T)
        assert wrong.mean() <= 2e-4


def test_free_run(recording: Recording) -> None:
    """Our own state throughout. A box that hangs on a logit within 1e-3 of the threshold (`box_stable_1e3` is false)
    forks the run on the last bits of a float32 sum; up to there the masks are those of the release."""
    stable = recording.info["box_stable_1e3"]
    state = reference_mask.initial(T)
    for k in range(len(stable) if all(stable) else stable.index(False)):
        state = reference_mask.paint_clicks(state, recording.group(k), 5)
        logits = recording.model.decode(recording.injected, state).logits
        state = reference_mask.apply_prediction(state, logits.numpy() > 0)
        final = recording.frame.mask_from_logits(logits)
        want = bits(recording.data[f"c{k}_final_sign"], *final.shape)
        assert (final & want).sum() >= 0.99 * (final | want).sum()
    if all(stable):
        assert (state != recording.data["ref_out_last"]).mean() < 1e-4


def test_reference_mask_transitions_exactly() -> None:
    """Twelve recorded steps a case: mixed groups, overlapping discs, borders, predictions; equal in every pixel."""
    cases = json.loads((FIXTURES / "refmask.json").read_text())
    data = np.load(FIXTURES / "refmask.npz")
    for index, case in enumerate(cases):
        height, width = case["H"], case["W"]
        states = data[f"case{index}_states"]
        state = np.full((height, width), 2, np.uint8)
        assert np.array_equal(state, states[0])
        for step, group in enumerate(case["steps"]):
            state = reference_mask.paint_clicks(state, [(y, x, sign == "positive") for y, x, sign in group], 5)
            assert np.array_equal(state, states[1 + 2 * step])
            state = reference_mask.apply_prediction(state, bits(data[f"case{index}_pred{step}"], height, width))
            assert np.array_equal(state, states[2 + 2 * step])
