"""What the network that draws outlines promises: nothing before it has learnt, the same with and without a cache and
the native module, a fit that finds outlines, and that nothing else of a checkpoint changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from synthetic import make_image, make_tiny_model, only_part_differs
from train_pack import write_pack
from typer.testing import CliRunner

from inter2former import evaluation
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import tiny
from inter2former.errors import ConfigError, NumericError
from inter2former.images import Frame
from inter2former.nn.model import Inter2Former
from inter2former.nn.outline import CHANNELS, Outline
from inter2former.prompts import Click
from inter2former.runtime.packing import pack
from inter2former.segmenter import CERTAIN, Segmenter
from train import __main__ as cli
from train import outline as fitting
from train.outline import CROP, Answer

WIDTHS = (4, 8, 8, 8)
DRAWING = dataclasses.replace(tiny(), coarse_size=256, outline_widths=WIDTHS)
CLICKS = [Click(80, 60), Click(20, 100, False), Click(100, 70)]


def drawing(seed: int = 0) -> Inter2Former:
    """A model whose outline network changes something."""
    model = make_tiny_model(DRAWING)
    assert model.outline is not None
    torch.manual_seed(seed)
    for unit in model.outline.modules():
        if isinstance(unit, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(unit.weight, 0.5, 1.5)
    torch.nn.init.normal_(model.outline.last.weight, std=5.0)
    torch.nn.init.uniform_(model.outline.last.bias, 5.0, 40.0)  # type: ignore[arg-type]
    return model


@pytest.fixture
def image() -> evaluation.Image:
    return make_image(120, 160)


def test_untrained_it_changes_nothing() -> None:
    assert not Outline(WIDTHS).eval()(torch.randn(2, CHANNELS, 32, 48)).any()
    image = make_image(256, 256)  # as large as its frame: no logits between pixels
    model = make_tiny_model(DRAWING)
    drawn = Segmenter(model, model_size=256).segment(image, CLICKS)
    model.config = dataclasses.replace(DRAWING, outline_widths=())
    plain = Segmenter(model, model_size=256).segment(image, CLICKS)
    assert drawn.mask.any()
    assert np.array_equal(drawn.mask, plain.mask)


@pytest.mark.parametrize("size", [256, 512])
def test_outlines_are_drawn_alike_with_and_without_a_cache(image: evaluation.Image, size: int) -> None:
    segmenter, forgetful = Segmenter(drawing(), model_size=size), Segmenter(drawing(), model_size=size, cache_bytes=0)
    for n in range(1, len(CLICKS) + 1):
        want = segmenter.segment(image, CLICKS[:n])
        assert np.array_equal(forgetful.segment(image, CLICKS[:n]).mask, want.mask)
        assert np.array_equal(segmenter.segment(image, CLICKS[:n]).mask, want.mask)
        assert np.array_equal(want.logits() > 0, want.mask)
    assert segmenter.encodes == 1
    plain = Segmenter(make_tiny_model(DRAWING), model_size=size).segment(image, CLICKS)
    assert not np.array_equal(plain.mask, want.mask)
    assert plain.score == want.score  # of what was found


LATE = dataclasses.replace(DRAWING, local_from=2)
MORE = [*CLICKS, Click(60, 50), Click(110, 80)]


def late(**options: Any) -> Segmenter:
    model = drawing()
    model.config = LATE
    return Segmenter(model, model_size=512, **options)


def test_late_outlines_depend_on_the_prompts_alone(image: evaluation.Image) -> None:
    """What is shown follows from what was shown before; from whichever click on that is known, it is the same."""
    stepwise, at_once, forgetful = late(), late(), late(cache_bytes=0)
    shown = [stepwise.segment(image, MORE[:n]).mask for n in range(1, len(MORE) + 1)]
    assert np.array_equal(at_once.segment(image, MORE).mask, shown[-1])
    for n in (5, 2, 4):
        for segmenter in (stepwise, at_once, forgetful):
            assert np.array_equal(segmenter.segment(image, MORE[:n]).mask, shown[n - 1])
    # States that another T left behind, and a first look at this one.
    other = late()
    other.segment(image, MORE, model_size=256)
    assert np.array_equal(other.segment(image, MORE).mask, shown[-1])
    assert other.encodes == 1
    # Another click on the same pixel of the coarse frame is another prompt.
    near = [*MORE[:-1], Click(110.2, 80.2)]
    assert np.array_equal(stepwise.segment(image, near).mask, late().segment(image, near).mask)


@pytest.mark.parametrize("mask", [False, True])
def test_late_outlines_change_near_the_click_or_where_they_are_sure(mask: bool) -> None:
    image = make_image(256, 256)  # as large as its frame: no logits between pixels
    given = np.zeros(image.shape[:2], bool)
    given[30:110, 40:140] = True
    segmenter = late()
    before = given if mask else segmenter.segment(image, MORE[:2], model_size=256).mask
    made, start = (MORE[2:3], given) if mask else (MORE[:3], None)
    shown = segmenter.segment(image, made, initial_mask=start, model_size=256)
    changed = shown.mask != before
    assert changed.any() or not mask
    _, part = cv2.connectedComponents(changed.view(np.uint8), connectivity=8)
    x, y, radius = int(MORE[2].x), int(MORE[2].y), DRAWING.click_radius
    met = np.isin(part, part[y - radius : y + radius + 1, x - radius : x + radius + 1]) & (part > 0)
    assert (np.abs(shown.logits())[changed & ~met] > CERTAIN).all()


def test_the_native_network_draws_the_same(image: evaluation.Image) -> None:
    plain, packed = Segmenter(drawing(), model_size=512), Segmenter(pack(drawing()), model_size=512)
    found = plain.segment(image, CLICKS).logits()
    assert np.allclose(found, packed.segment(image, CLICKS).logits(), atol=5e-3)


def test_pictures_are_kept_ahead(image: evaluation.Image) -> None:
    data = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    segmenter = Segmenter(drawing(), model_size=512)
    segmenter.segment(data, CLICKS[:1], model_size=256)
    assert segmenter.is_encoded(data, model_size=256)
    assert not segmenter.is_encoded(data)  # the larger picture is missing
    segmenter.prefetch(data)
    assert segmenter.is_encoded(data)
    assert segmenter.encodes == 1
    answer = segmenter.segment(data, CLICKS[:1])
    assert not answer.encoded
    assert answer.timing["decode_image"] < 1e-3


def test_numbers_that_are_not_finite_are_no_mask(image: evaluation.Image) -> None:
    model = drawing()
    assert model.outline is not None
    with torch.no_grad():
        model.outline.last.bias.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(NumericError, match="outline"):
        Segmenter(model, model_size=256).segment(image, CLICKS)


@pytest.mark.parametrize("changes", [{"outline_widths": (4, 4, 4)}, {"outline_widths": (0, 4, 4, 4)}])
def test_impossible_widths_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="outline_widths"):
        dataclasses.replace(tiny(), **changes)
    with pytest.raises(ConfigError, match="outline_widths"):
        dataclasses.replace(tiny(), outline_widths=WIDTHS, input_convention="released")


# -- the fit -----------------------------------------------------------------------------------------------------------


def invented(n: int, seed: int = 0) -> tuple[list[np.ndarray], list[Answer]]:
    """Bright discs on a dark ground, of which a shifted copy was found."""
    rng = np.random.default_rng(seed)
    frame = Frame(256, 256, 256)
    pictures, answers = [], []
    for number in range(n):
        y, x = rng.integers(90, 160, 2)
        rows, columns = np.mgrid[:256, :256]
        truth = np.hypot(rows - y, columns - x) < 60
        found = np.hypot(rows - y - 5, columns - x - 4) < 60
        picture = rng.integers(0, 60, (256, 256, 3)) + np.where(truth[..., None], 150, 20)
        pictures.append(picture.astype(np.uint8))
        logits = np.where(found, np.float16(2), np.float16(-2))
        clicks = ((int(y), int(x), True),)
        answers.append(
            Answer(number, f"s{number % 2}", frame, frame, logits, (0, 0, 16, 16), clicks, np.packbits(truth), None)
        )
    return pictures, answers


def test_a_crop_lies_at_the_outline() -> None:
    pictures, answers = invented(1)
    rng = np.random.default_rng(0)
    for _ in range(8):
        crop = fitting.crop(answers[0], pictures[0], rng)
        assert crop is not None
        assert crop.seen.shape == (CHANNELS, CROP, CROP)
        assert crop.truth.shape == crop.shown.shape == (CROP, CROP)
        assert 0.05 < crop.truth.mean() < 0.95
        assert np.isfinite(crop.seen).all()
        bright = crop.seen[0] > crop.seen[0][crop.shown > 0].mean()
        assert ((crop.truth > 0.5) == bright)[crop.shown > 0].mean() > 0.9
        assert not crop.seen[:3, crop.shown == 0].any()
    nothing = answers[0]._replace(logits=np.full((256, 256), -1, np.float16))
    assert fitting.crop(nothing, pictures[0], rng) is None


def test_the_fit_finds_the_outline() -> None:
    pictures, answers = invented(6)
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(Outline(WIDTHS))
        fitting.fit(networks[-1], pictures, answers, steps=40, batch=4, lr=0.02)
    assert all(torch.equal(a, b) for a, b in zip(*(network.parameters() for network in networks), strict=True))
    model = make_tiny_model(DRAWING)
    model.outline = networks[0]
    figures = fitting.ious(model, *invented(4, seed=1))
    assert figures["drawn"] > figures["as found"] + 0.03


def test_answers_without_anything_found_are_refused() -> None:
    pictures, answers = invented(1)
    nothing = answers[0]._replace(logits=np.full((256, 256), -1, np.float16))
    with pytest.raises(ConfigError, match="anything"):
        fitting.fit(Outline(WIDTHS), pictures, [nothing])
    assert fitting.ious(make_tiny_model(DRAWING), pictures, [nothing]) == {}


def test_answers_are_those_that_were_drawn(image: evaluation.Image) -> None:
    truth = np.zeros(image.shape[:2], bool)
    truth[40:90, 50:120] = True
    targets = [evaluation.Target("s", "a", image, truth), evaluation.Target("s", "b", image, ~truth)]
    pictures, answers = fitting.collect(pack(drawing()), targets, 2)
    assert len(pictures) == 1  # both objects are of one photo
    assert {answer.picture for answer in answers} == {0}
    assert np.array_equal(answers[0].mask(), truth)
    assert [len(answer.clicks) for answer in answers[:2]] == [1, 2]
    found = Segmenter(pack(drawing())).segment(image, [evaluation.next_click(np.zeros_like(truth), truth)])
    assert found.model_size == answers[0].frame.size
    assert answers[0].shown() is None
    shown, logits = answers[1].shown(), found.logits()
    assert shown is not None
    assert np.array_equal(answers[1].frame.mask_from_logits(torch.from_numpy(shown.logits), shown.box), logits > 0)


# -- the file and the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(), WIDTHS, (4, 4, 4, 4)])
def test_nothing_but_the_outline_network_changes(tmp_path: Path, widths: tuple[int, ...]) -> None:
    path, out = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    config = dataclasses.replace(DRAWING, outline_widths=widths)
    digest = save_checkpoint(path, make_tiny_model(config), provenance={"recipe": "random"}, dtype=torch.float16)
    torch.manual_seed(7)
    given = Outline(WIDTHS)
    assert fitting.write(path, out, given, WIDTHS, {"steps": 7}) == load_checkpoint(out).digest
    before, after = load_checkpoint(path), load_checkpoint(out)
    assert after.model.config == DRAWING
    assert after.provenance == {"recipe": "random", "outline": {"steps": 7, "of": digest}}
    only_part_differs(before.model, after.model, "outline", given)


def test_the_command_line(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "tiny.safetensors", tmp_path / "out.safetensors"
    save_checkpoint(checkpoint, make_tiny_model())
    folder = write_pack(tmp_path / "pack", photos=2)
    arguments = f"outline --checkpoint {checkpoint} --data {folder} --out {out} --limit 2 --val-limit 1 --steps 2"
    widths = " --width 4 --width 8 --width 8 --width 8"
    result = CliRunner().invoke(cli.app, [*(arguments + widths).split(), "--json"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.output)) == {"out", "sha256", "as found", "drawn"}
    assert load_checkpoint(out).model.config.outline_widths == WIDTHS
    result = CliRunner().invoke(cli.app, arguments.replace(str(checkpoint), str(tmp_path / "none")).split())
    assert result.exit_code == 1
    assert "error" in result.output
