"""What the learnt links of the random walk promise: their shape, their fit, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import make_image, make_tiny_model, only_part_differs
from train_pack import write_pack
from typer.testing import CliRunner

from inter2former import evaluation, random_walk
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import ModelConfig, tiny
from inter2former.errors import ConfigError
from inter2former.images import Frame
from inter2former.nn.affinity import Affinity
from inter2former.prompts import Click
from inter2former.random_walk import CELLS
from inter2former.runtime.packing import pack
from inter2former.segmenter import Segmenter
from train import __main__ as cli
from train import affinity as fitting
from train.affinity import Data, Pass, Seen

WALKING = dataclasses.replace(tiny(), walk_trust=0.05)
LEARNT = dataclasses.replace(WALKING, affinity_width=8)


def fresh(config: ModelConfig = LEARNT, seed: int = 0) -> Affinity:
    torch.manual_seed(seed)
    return Affinity(config)


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_links_of_every_size_lie_on_the_grid(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, edges, image = (
        torch.randn(2, channels, size // side, size // side, generator=generator)
        for channels, side in ((LEARNT.embed_dim, 16), (LEARNT.edge_channels[3], 8), (3, 1))
    )
    with torch.no_grad():
        found = fresh()(tokens, edges, image)
    assert found.shape == (2, 4, CELLS, CELLS)
    assert found.dtype == torch.float32
    assert (found <= 0).all()
    right, below, falling, rising = found.unbind(1)
    for outside in (right[..., -1], below[:, -1], falling[:, -1], falling[..., -1], rising[:, -1], rising[..., 0]):
        assert not outside.any()
    assert (right[..., :-1] < 0).all()


def test_links_stop_where_the_photo_ends() -> None:
    everywhere = np.ones((4, CELLS**2), np.float32)
    size, valid = 256, (200, 238)
    kept = random_walk.within(everywhere, valid, size) > 0
    of_colours = random_walk.links(torch.rand(3, *valid), size) > 0
    assert np.array_equal(kept, of_colours)


@pytest.mark.parametrize("width", [-2, 3, 1026])
def test_impossible_widths_are_refused(width: int) -> None:
    with pytest.raises(ConfigError, match="affinity_width"):
        dataclasses.replace(WALKING, affinity_width=width)


def test_nothing_is_learnt_for_a_walk_that_nobody_walks() -> None:
    with pytest.raises(ConfigError, match="affinity_width"):
        dataclasses.replace(tiny(), affinity_width=8)


def test_an_image_is_walked_as_it_was_learnt() -> None:
    image, click = make_image(120, 160), [Click(80, 60)]
    plain, packed = Segmenter(make_tiny_model(LEARNT)), Segmenter(pack(make_tiny_model(LEARNT)))
    found = plain.segment(image, click, model_size=256).logits()
    assert np.allclose(found, packed.segment(image, click, model_size=256).logits(), atol=2e-3)
    closed = make_tiny_model(LEARNT)
    assert closed.affinity is not None
    with torch.no_grad():
        closed.affinity.free.fill_(-20.0)  # nobody walks anywhere
    assert not np.allclose(found, Segmenter(closed).segment(image, click, model_size=256).logits(), atol=0.1)


# -- the walk with gradients -----------------------------------------------------------------------------------------


def invented(n: int = 12, seed: int = 0) -> Data:
    """Pictures of colour stripes that mean nothing; where objects end stands in the edge features. One click each."""
    rng = np.random.default_rng(seed)
    data = Data()
    images, passes = [], []
    for number in range(n):
        top, left = rng.integers(4, 24, 2)
        truth = np.zeros((CELLS, CELLS), np.float32)
        truth[top : top + 30, left : left + 30] = 1
        edges = rng.normal(0, 0.1, (LEARNT.edge_channels[3], CELLS, CELLS))
        edges[0] += 12 * truth
        colours = rng.normal(0, 0.1, (3, CELLS, CELLS)) + np.where(np.arange(CELLS) % 8 < 4, 0, 2)
        tokens = np.zeros((LEARNT.embed_dim, CELLS // 2, CELLS // 2))
        images.append(Seen(*(part.astype(np.float16) for part in (tokens, edges, colours))))
        clicked = np.zeros((CELLS, CELLS))
        clicked[top + 14 : top + 17, left + 14 : left + 17] = 1
        said = np.full((CELLS, CELLS), -1.0)
        maps = (part.astype(np.float16) for part in (said, clicked, 0 * clicked, truth))
        passes.append(Pass(number, f"s{number % 2}", 1 + number % 2, (CELLS, CELLS - 4), *maps))
    data.add(images[: n // 2], passes[: n // 2])
    data.add(images[n // 2 :], [one._replace(image=one.image - n // 2) for one in passes[n // 2 :]])
    return data


def test_the_walk_on_its_grid_is_the_walk_that_is_served() -> None:
    data = invented(2)
    one = data.passes[0]
    rows, columns = one.shown
    colours = torch.from_numpy(data.images[0].colours.astype(np.float32))[:, :rows, :columns]
    reference = np.where(one.object_ > 0, np.uint8(4), np.uint8(1))
    served = random_walk.walk(
        random_walk.links(colours, CELLS),
        one.said.astype(np.float32),
        (0, 0, CELLS // 16, CELLS // 16),
        reference,
        0.05,
    )
    found = fitting.walked(None, torch.tensor(0.05), data, [one])[0].numpy()
    assert np.allclose(found[:rows, :columns], served[:rows, :columns], atol=0.02)


def test_gradients_are_those_of_small_changes() -> None:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    links, trust = drawn(2, 4, CELLS, CELLS), 0.5 + drawn(2, 1, 1)
    for n, (here, _) in enumerate(random_walk.neighbours(CELLS, CELLS)):
        inside = torch.zeros(CELLS, CELLS, dtype=torch.float64)
        inside[here] = 1
        links[:, n] *= inside
    said, object_, weight = drawn(2, CELLS, CELLS), drawn(2, CELLS, CELLS) ** 8, drawn(2, CELLS, CELLS)

    def value(links: torch.Tensor, trust: torch.Tensor) -> torch.Tensor:
        return (fitting._walk(links, trust, said, object_, 0 * object_) * weight).sum()

    of_links, of_trust = torch.autograd.grad(value(links.requires_grad_(), trust.requires_grad_()), (links, trust))
    with torch.no_grad():
        for wanted, step in ((of_links, (links * drawn(*links.shape), 0)), (of_trust, (0, drawn(*trust.shape)))):
            ahead, behind = (value(links + sign * step[0], trust + sign * step[1]) for sign in (1e-5, -1e-5))
            along = sum((wanted * part).sum() for part in step if isinstance(part, torch.Tensor))
            assert float((ahead - behind) / 2e-5) == pytest.approx(float(along), rel=1e-4)


def test_the_fit_finds_outlines_that_colours_do_not_show() -> None:
    data, unseen = invented(24), invented(8, seed=1)
    one, other = fresh(), fresh()
    first = fitting.fit(one, 0.001, data, steps=60, batch=8, lr=0.01)
    assert first == fitting.fit(other, 0.001, data, steps=60, batch=8, lr=0.01)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    before, after = fitting.ious(None, 0.001, unseen), fitting.ious(one, first, unseen)
    assert set(before) == {"IoU@1", "IoU@2"}
    assert after["IoU@1"] > before["IoU@1"] + 0.5


def test_too_few_passes_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 passes are too few"):
        fitting.fit(fresh(), 0.05, invented(4))


def test_passes_hold_what_the_walk_was_given() -> None:
    model = pack(make_tiny_model(LEARNT))
    truth = np.zeros((200, 256), bool)
    truth[60:160, 80:200] = True
    image = np.where(truth[..., None], np.uint8(220), np.uint8(40)).repeat(3, 2)
    targets = [evaluation.Target("s", "a", image, truth), evaluation.Target("s", "b", image, ~truth)]
    images, passes = fitting.collect(model, targets, 2, model_size=256)
    assert len(images) == 1  # both objects are of one picture
    assert [(one.image, one.source, one.clicks) for one in passes] == [(0, "s", 1), (0, "s", 2)] * 2
    first = passes[0]
    assert first.shown == (200 // 4, CELLS)
    assert np.array_equal(first.truth[:50] > 0.5, Frame(200, 256, 256).mask_to_model(truth)[2:200:4, 2::4])
    assert first.object_.sum() > 1
    assert not first.background.any()
    assert images[0].tokens.shape == (LEARNT.embed_dim, 16, 16)
    other, _ = fitting.collect(pack(make_tiny_model(LEARNT)), targets[:1], 1, colours=True, model_size=256)
    assert all(np.allclose(a, b, atol=0.01) for a, b in zip(other[0], images[0], strict=True))


# -- the file and the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [WALKING, LEARNT])
def test_nothing_but_affinity_and_trust_change(tmp_path: Path, config: ModelConfig) -> None:
    path, out = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    digest = save_checkpoint(path, make_tiny_model(config), provenance={"recipe": "random"}, dtype=torch.float16)
    given = fresh(seed=3)
    assert fitting.write(path, out, given, 0.002, {"steps": 7}) == load_checkpoint(out).digest
    before, after = load_checkpoint(path), load_checkpoint(out)
    assert after.model.config == dataclasses.replace(config, affinity_width=8, walk_trust=0.002)
    assert after.provenance == {"recipe": "random", "affinity": {"steps": 7, "of": digest}}
    only_part_differs(before.model, after.model, "affinity", given)


def test_the_command_line(tmp_path: Path) -> None:
    walking, out = tmp_path / "walking.safetensors", tmp_path / "out.safetensors"
    save_checkpoint(walking, make_tiny_model(WALKING))
    folder = write_pack(tmp_path / "pack", photos=3)
    arguments = f"affinity --checkpoint {walking} --data {folder} --out {out} --limit 3 --model-size 256 --steps 3"
    result = CliRunner().invoke(cli.app, [*arguments.split(), "--width", "8", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert set(figures) == {"out", "sha256", "trust", "before", "after 1", "after 2"}
    config = load_checkpoint(out).model.config
    assert config.affinity_width == 8
    assert config.walk_trust == figures["trust"]
    again = arguments.replace(str(walking), str(out)).split()
    result = CliRunner().invoke(cli.app, [*again, "--width", "8", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    assert "after 1" in result.output


def test_a_checkpoint_without_a_walk_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_pack(tmp_path / "pack", photos=1)
    arguments = f"affinity --checkpoint {tiny_checkpoint} --data {folder} --out {tmp_path / 'out.safetensors'}"
    result = CliRunner().invoke(cli.app, arguments.split())
    assert result.exit_code == 1
    assert "no random walk" in result.output
