"""The ablation's switches: each changes what it says, the plain variant and the served model change nothing."""

import json

import numpy as np
import pytest
import torch
from synthetic import make_image, make_tiny_model
from train_pack import write_pack

from benchmarks import ablation, results
from benchmarks.ablation import Switches, Variant
from inter2former.images import Frame
from inter2former.nn.upsampling import FILL
from inter2former.reference_mask import initial, paint_clicks


@pytest.fixture(scope="module")
def scene(tiny_model):
    """An encoded image and a reference mask: mostly possible background, some told."""
    encoding = tiny_model.encode(Frame(120, 160, 256).prepare(make_image()))
    reference = initial(256, 1)
    reference[60:120, 70:150] = 3
    return encoding, paint_clicks(reference, [(90, 100, True), (200, 50, False)], 5)


def decoded(model, scene):
    return model.decode(*scene)


def test_without_switches_it_is_the_model(tiny_model, scene):
    ours, plain = decoded(Variant(tiny_model, Switches("plain")), scene), decoded(tiny_model, scene)
    assert ours.box == plain.box
    assert torch.allclose(ours.logits, plain.logits, atol=1e-5)


@pytest.mark.parametrize(
    "switches",
    [
        pytest.param(Switches("p", full_prompt=True), id="prompt"),
        pytest.param(Switches("f", attention="full"), id="full"),
        pytest.param(Switches("b", attention="bsq"), id="bsq"),
        pytest.param(Switches("u", full_upsampling=True), id="upsampling"),
    ],
)
def test_each_switch_changes_the_answer_a_little(tiny_model, scene, switches):
    plain, other = decoded(tiny_model, scene), decoded(Variant(tiny_model, switches), scene)
    assert not torch.equal(plain.logits, other.logits)
    assert torch.isfinite(other.logits).all()


def test_full_upsampling_leaves_nothing_out(tiny_model, scene):
    plain, full = decoded(tiny_model, scene), decoded(Variant(tiny_model, Switches("u", full_upsampling=True)), scene)
    assert (plain.logits == FILL).any()
    assert full.box == (0, 0, 16, 16)
    assert not (full.logits == FILL).any()


def test_the_table_and_the_picture(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    folder = write_pack(tmp_path / "pack", photos=2)
    ablation.main(folder, tiny_checkpoint, limit=1, size=256, clicks=3, write=True)
    content = json.loads((tmp_path / "results" / "ablation.json").read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert list(rows) == [variant.name for variant in ablation.VARIANTS]
    assert all({"miou@1", "miou@3", "noc90", "first_click_ms", "click_ms"} <= set(row) for row in rows.values())
    served = rows["as served"]
    assert served["miou@3"] == pytest.approx(rows["Inter2Former"]["miou@3"], abs=1)
    assert (tmp_path / "results" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "full upsampling" in capsys.readouterr().out


def test_variants_do_not_share_weights_with_the_model():
    model = make_tiny_model()
    before = [value.clone() for value in model.state_dict().values()]
    for switches in ablation.VARIANTS:
        ablation.build(model, switches)
    after = list(model.state_dict().values())
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
