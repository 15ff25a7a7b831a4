"""Reading packs and drawing samples (train.data), pixels (train.augment)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.unit.train_pack import write_cutouts, write_pack
from train import augment
from train.data import UNKNOWN, DrawConfig, Pack, Photo, Sampler, read_pack
from train.teacher import COMPONENTS

DRAW = DrawConfig(size=64, scale=(0.25, 4.0))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("data")
    return read_pack([write_pack(folder / "pack"), write_cutouts(folder / "composites")])


def test_a_pack_is_read_by_split_and_with_its_objects(pack: Pack) -> None:
    assert [photo.key for photo in pack.photos] == [f"{s}_{n}" for s in ("human290", "other") for n in range(3)]
    photo = pack.photos[0]
    assert photo.rgb.shape == (96, 128, 3)
    for m, number, area in photo.objects:
        assert (photo.maps[m] == number).sum() == area
    assert len(pack.cutouts) == 2
    assert pack.backgrounds[0].shape == (60, 80, 3)


def test_limit_counts_photos_a_source(tmp_path: Path) -> None:
    limited = read_pack([write_pack(tmp_path / "pack")], limit=1)
    assert [photo.key for photo in limited.photos] == ["human290_0", "other_0"]


def test_folders_without_an_index_and_without_photos_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no index\.json"):
        read_pack([tmp_path])
    with pytest.raises(ValueError, match="No photo of split 'train'"):
        read_pack([write_cutouts(tmp_path / "composites")])


def test_a_batch_depends_on_seed_and_step_alone(pack: Pack) -> None:
    first, again = (Sampler(pack, DRAW, seed=3).batch(5, 4) for _ in range(2))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    other_step, other_seed = Sampler(pack, DRAW, seed=3).batch(6, 4), Sampler(pack, DRAW, seed=4).batch(5, 4)
    assert not np.array_equal(first["image"], other_step["image"])
    assert not np.array_equal(first["image"], other_seed["image"])


def test_every_crop_shows_its_targets_and_keeps_the_padding_empty(pack: Pack) -> None:
    batch = Sampler(pack, DRAW, seed=0).batch(0, 120)
    areas = batch["targets"].mean((2, 3))
    assert areas.min() >= DRAW.smallest
    assert areas.min() < 0.05
    assert areas.max() > 0.3
    assert set(np.unique(batch["targets"])) == {0, 1}
    padded = 0
    for image, targets, (h, w) in zip(batch["image"], batch["targets"], batch["valid"], strict=True):
        outside = np.ones((64, 64), bool)
        outside[:h, :w] = False
        padded += outside.any()
        assert not image[outside].any()
        assert not targets[:, outside].any()
    assert 0 < padded < 120


def test_targets_are_objects_of_the_photo_when_nothing_is_composed(pack: Pack) -> None:
    plain = DrawConfig(size=64, paste=0, union=0, minus=0, complement=0, targets=1, scale=(1, 1), whole=0)
    for sample in (Sampler(pack, plain, 0).sample(np.random.default_rng(i)) for i in range(20)):
        target = sample["targets"][0, 2::4, 2::4] == 1
        assert len(np.unique(sample["regions"][target])) == 1


def test_dense_maps_know_what_is_not_known(pack: Pack) -> None:
    batch = Sampler(pack, dataclasses.replace(DRAW, paste=0), 0).batch(0, 60)
    assert batch["boundary"].shape == batch["salient"].shape == batch["regions"].shape == (60, 16, 16)
    assert set(np.unique(batch["boundary"])) == {0, 1, UNKNOWN}
    known = (batch["salient"] != UNKNOWN).any((1, 2))
    assert 0 < known.sum() < 60  # of one source only
    assert not (batch["salient"][~known] != UNKNOWN).any()


def test_pasted_objects_become_exact_targets_and_regions(pack: Pack) -> None:
    pasting = DrawConfig(size=64, paste=1, union=0, minus=0, complement=0, targets=1)
    batch = Sampler(pack, pasting, 0).batch(0, 20)
    assert (batch["salient"] == 1).any((1, 2)).sum() > 10


def test_composed_targets_unions_parts_and_complements(pack: Pack) -> None:
    sampler, rng = Sampler(pack, dataclasses.replace(DRAW, union=1), 0), np.random.default_rng(0)
    maps = [p.astype(np.int32) for p in pack.photos[0].maps]
    left = maps[1] == 1
    union = sampler._compose(left, [maps[1]], rng)
    assert np.array_equal(union, maps[0] == 1)
    sampler = Sampler(pack, dataclasses.replace(DRAW, union=0, minus=1), 0)
    rest = sampler._compose(maps[0] == 1, [maps[1]], rng)
    assert np.array_equal(rest, maps[1] == 1) or np.array_equal(rest, maps[1] == 3)
    sampler = Sampler(pack, dataclasses.replace(DRAW, union=0, minus=0, complement=1), 0)
    assert np.array_equal(sampler._compose(left, maps, rng), ~left)


def test_teacher_maps_follow_the_view() -> None:
    """Columns of the photo carry a number each; the teacher's map must show the numbers that the labels show."""
    column = np.repeat(np.arange(1, 17, dtype=np.uint8), 16)[None].repeat(192, 0)
    photo = Photo(
        "p", "other", np.zeros((192, 256, 3), np.uint8), (column,), np.array([[0, n, 3072] for n in range(1, 17)])
    )
    maps = {
        "edge": column[1::2, 1::2].copy(),
        "fine": np.zeros((24, 32, COMPONENTS), np.int8),
        "coarse": np.zeros((12, 16, COMPONENTS), np.int8),
    }
    sampler = Sampler(Pack((photo,), teacher={"p": maps}), dataclasses.replace(DRAW, paste=0), 0)
    for sample in (sampler.sample(np.random.default_rng(i)) for i in range(30)):
        seen = (sample["regions"] > 0) & (sample["edge"] > 0)
        assert sample["known"].any()
        assert seen.any()
        difference = np.abs(sample["edge"].astype(int) - sample["regions"])[seen]
        assert difference.max() <= 1  # neighbours, where a column ends inside a cell
        assert (difference == 0).mean() > 0.6


def test_packs_of_specks_are_refused(pack: Pack) -> None:
    with pytest.raises(RuntimeError, match="No usable object"):
        Sampler(pack, dataclasses.replace(DRAW, smallest=0.99, paste=0), 0).sample(np.random.default_rng(0))


def test_photometric_keeps_shape_and_type_and_changes_colours() -> None:
    rng, image = np.random.default_rng(0), np.random.default_rng(1).integers(0, 256, (32, 40, 3)).astype(np.uint8)
    results = [augment.photometric(image, rng) for _ in range(40)]
    assert all(r.shape == image.shape and r.dtype == np.uint8 for r in results)
    assert len({r.tobytes() for r in results}) > 20


@pytest.mark.parametrize(("top", "left", "area"), [(2, 3, 16), (-2, 3, 8), (8, 8, 4), (20, 20, 0), (-9, 0, 0)])
def test_blend_cuts_at_the_border_and_reports_the_visible_part(top: int, left: int, area: int) -> None:
    canvas = np.zeros((10, 10, 3), np.uint8)
    where = augment.blend(canvas, np.full((4, 4, 3), 200, np.uint8), np.full((4, 4), 255, np.uint8), top, left)
    assert where.sum() == area
    assert np.array_equal(canvas[..., 0] == 200, where)


def test_dihedral_makes_all_eight() -> None:
    image = np.arange(12).reshape(3, 4)
    assert len({augment.dihedral(image, t, f).tobytes() + bytes([t % 2]) for t in range(4) for f in (False, True)}) == 8
