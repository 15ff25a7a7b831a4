"""Losses (train.losses) and the cheaper equivalents used in training (train.fast)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inter2former.config import tiny
from inter2former.nn.model import Features, Inter2Former, TrainOutput
from train import fast, losses

UNKNOWN = losses.UNKNOWN


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_nfl_with_constant_confidence_is_half_the_cross_entropy(p: float) -> None:
    target = (torch.arange(64) % 3 == 0).float().view(1, 8, 8)
    logit = torch.logit(torch.tensor(p))
    loss = losses.normalized_focal(torch.where(target > 0, logit, -logit), target)
    assert loss.item() == pytest.approx(-0.5 * np.log(p), rel=1e-4)


def test_nfl_is_the_formula_and_its_gradient_does_not_see_the_normaliser() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 5, requires_grad=True)
    target = (torch.rand(2, 5, 5) > 0.5).float()
    losses.normalized_focal(logits, target).backward()
    p_t = 1 - (torch.sigmoid(logits.detach()) - target).abs()
    beta = (1 - p_t) ** 2
    scale = 25 / beta.sum((1, 2), keepdim=True)
    expected = losses.normalized_focal(logits.detach(), target)
    assert expected.item() == pytest.approx((-0.5 * scale * beta * p_t.log()).mean().item(), rel=1e-4)
    weight = 0.5 * scale * beta * (torch.sigmoid(logits.detach()) - target) / 25 / 2
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, weight, rtol=1e-4, atol=1e-7)


def test_nfl_survives_certainty_and_bfloat16() -> None:
    logits = torch.tensor([[[60.0, -60.0]]], dtype=torch.bfloat16, requires_grad=True)
    loss = losses.normalized_focal(logits, torch.tensor([[[1, 0]]]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_the_hinge_is_the_lost_iou_where_every_pixel_is_decided() -> None:
    """A convex extension agrees with its set function at the corners: errors are 0 or 2 when logits are -1 or 1."""
    generator = torch.Generator().manual_seed(0)
    said, target = (torch.rand(2, 4, 8, 8, generator=generator) > 0.5).float()
    lost = 1 - losses.mask_iou(said - 0.5, target).mean()
    assert losses.lovasz_hinge(2 * said - 1, target).item() == pytest.approx(2 * lost.item(), abs=1e-5)
    assert losses.lovasz_hinge(20 * target - 10, target).item() == 0


def test_the_hinge_of_an_empty_target_counts_the_worst_pixel() -> None:
    logits = torch.tensor([[-3.0, 0.5, -1.0]])
    assert losses.lovasz_hinge(logits, torch.zeros(1, 3)).item() == pytest.approx(1.5)


def test_low_target_keeps_specks() -> None:
    target = torch.zeros(1, 64, 64, dtype=torch.uint8)
    target[0, 17, 40] = 1
    assert losses.low_target(target, 4).nonzero().tolist() == [[0, 1, 2]]


def test_click_loss_sums_its_parts() -> None:
    output = TrainOutput(torch.zeros(1, 32, 32), torch.zeros(1, 2, 2), torch.tensor(2.0))
    loss, parts = losses.click_loss(output, torch.ones(1, 32, 32))
    assert loss.item() == pytest.approx(
        (parts["nfl"] + 0.5 * parts["low"] + 0.5 * parts["overlap"] + 0.1 * parts["commitment"]).item()
    )


def test_mask_iou() -> None:
    logits = torch.tensor([[[1.0, 1.0, -1.0, -1.0]], [[-1.0, -1.0, -1.0, -1.0]]])
    target = torch.tensor([[[1, 0, 1, 0]], [[0, 0, 0, 0]]])
    assert losses.mask_iou(logits, target).tolist() == [pytest.approx(1 / 3), 0.0]


def test_affinity_is_lower_for_separated_regions_and_ignores_unknown_ones() -> None:
    regions = torch.full((1, 8, 8), -1)
    regions[:, :4, :4], regions[:, :4, 4:] = 0, 1
    vectors = torch.zeros(1, 2, 8, 8)
    vectors[:, 0, :, :4], vectors[:, 1, :, 4:] = 1, 1

    def loss(embedding: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return losses.affinity(embedding, labels, 64, 0.1)

    mixed = torch.ones_like(vectors)
    assert loss(vectors, regions) < loss(mixed, regions)
    embedding = torch.randn(1, 2, 8, 8, requires_grad=True)
    loss(embedding, regions).backward()
    assert embedding.grad is not None
    assert embedding.grad[:, :, :4].any()
    assert not embedding.grad[:, :, 4:].any()
    assert loss(vectors, torch.full_like(regions, -1)) == 0
    assert loss(vectors, torch.zeros_like(regions)) == 0  # one region only: nothing to tell apart


def dense_batch(taught: bool) -> dict[str, torch.Tensor]:
    batch = {
        "boundary": torch.full((2, 16, 16), UNKNOWN, dtype=torch.uint8),
        "salient": torch.full((2, 16, 16), UNKNOWN, dtype=torch.uint8),
        "regions": torch.full((2, 16, 16), -1, dtype=torch.int32),
    }
    if taught:
        batch |= {
            "fine": torch.ones(2, 8, 8, losses.COMPONENTS, dtype=torch.int8),
            "coarse": torch.ones(2, 4, 4, losses.COMPONENTS, dtype=torch.int8),
            "edge": torch.full((2, 16, 16), 128, dtype=torch.uint8),
            "known": torch.zeros(2, 4, 4, dtype=torch.uint8),
        }
    return batch


def test_dense_losses_are_zero_where_nothing_is_known_and_reach_the_encoder_where_it_is() -> None:
    torch.manual_seed(0)
    model, head = Inter2Former(tiny()), losses.DenseHead(tiny())
    predicted = head(model.encode_batch(torch.randn(2, 3, 64, 64)))
    loss, parts = losses.dense_loss(predicted, dense_batch(taught=True), losses.DenseConfig())
    assert loss == 0
    assert set(parts) == {"boundary", "salient", "affinity", "teacher", "edge"}
    batch = dense_batch(taught=True)
    batch["known"][0, 1, 1] = 1
    loss, parts = losses.dense_loss(predicted, batch, losses.DenseConfig())
    loss.backward()
    assert parts["teacher"] > 0
    assert parts["edge"] > 0
    weight = next(p for name, p in model.encoder.named_parameters() if name.endswith("proj.weight"))
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_dense_losses_do_not_need_a_teacher() -> None:
    batch = dense_batch(taught=False)
    batch["boundary"][:, 3:5] = 1
    batch["salient"][:] = 0
    head = losses.DenseHead(tiny())
    loss, parts = losses.dense_loss(
        head(Inter2Former(tiny()).encode_batch(torch.zeros(2, 3, 64, 64))), batch, losses.DenseConfig()
    )
    assert loss > 0
    assert "teacher" not in parts


def test_bicubic_x2_is_the_library_s() -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(fast.bicubic_x2(x), F.interpolate(x, scale_factor=2, mode="bicubic"))


def test_speed_up_changes_nothing_but_rounding() -> None:
    torch.manual_seed(0)
    model = Inter2Former(tiny()).eval()
    quick = copy.deepcopy(model)
    fast.speed_up(quick)
    image, reference = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(quick(image, reference).logits, model(image, reference).logits, atol=1e-4, rtol=1e-4)


def test_rounds_without_gradient_see_what_the_network_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Inter2Former(tiny()).eval()
    reference = torch.randint(1, 4, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        features = model.encode_batch(torch.randn(3, 3, 64, 64))
        want = (model.decode_batch(features, reference).logits > 0).numpy()
    click = fast.clicks_without_gradient(model, features)
    if click is not None:
        found = np.stack([click(n, label) > 0 for n, label in enumerate(reference.numpy())])
        assert (found == want).mean() > 0.99  # the served decoder leaves out what lies outside of the object's box
    monkeypatch.setattr(fast.native, "module", lambda: None)
    assert fast.clicks_without_gradient(model, features) is None


def test_a_sped_up_model_shares_an_image_between_targets_and_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = Inter2Former(tiny())
    quick = copy.deepcopy(model)
    fast.speed_up(quick)
    image, reference = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (6, 64, 64), dtype=torch.uint8)
    reference[:, 20:] = 1  # tokens outside the box of the prompt
    found = []
    for m, repeat in ((model, 3), (quick, 1)):
        tokens, edges, _ = m.encode_batch(image)
        edges = [e.repeat_interleave(repeat, 0) for e in edges]
        output = m.decode_batch(Features(tokens.repeat_interleave(3, 0), edges), reference)
        (output.logits.square().mean() + output.low.mean()).backward()
        found.append((output.logits.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)
