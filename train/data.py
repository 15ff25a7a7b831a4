"""From packs on disk to training samples: reading, drawing, cropping, composing targets.

A pack is a folder with index.json and zip shards; a folder of cut-outs and backgrounds (also with an index.json) adds
copy-paste material. Everything is decoded once into memory; a batch is a pure function of (pack, settings, seed, step),
so a run continues exactly where it stopped. Pixel values change in augment.py, clicks are drawn in simulate.py.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from train.augment import Array, Rng, blend, dihedral, photometric
from train.teacher import TeacherMaps

# Facts about the sources (not tuning): where label 0 is known to be background in map 0 ...
COMPLETE = {"ccp", "human290", "dsb2018", "crackforest", "cwfid", "neu_seg", "roads"}
# ... and where map 0 holds what a person would call the objects of the photo.
SALIENT = {"ccp", "human290", "inet1k_salient", "catdog_salient", "kangaroo_salient"}
# Whole objects and human outlines of natural photos count more than narrow or coarse sources.
SOURCE_FACTOR = {"bsds500": 2.0, "human290": 2.0, "ccp": 2.0, "coco_mini": 2.0, "inet1k_salient": 2.0,
                 "catdog_salient": 1.5, "neu_seg": 0.5, "facades": 0.5, "fasseg": 0.5}  # fmt: skip
UNKNOWN = 255


@dataclasses.dataclass(frozen=True)
class Photo:
    """One decoded photo: rgb uint8 [H, W, 3], label maps uint8/16 [H, W], objects (map, id, area) int64 [n, 3]."""

    key: str
    source: str
    rgb: Array
    maps: tuple[Array, ...]
    objects: Array


@dataclasses.dataclass(frozen=True)
class Pack:
    """Everything a run draws from. Cut-outs stay compressed (WebP): decoding one costs a millisecond."""

    photos: tuple[Photo, ...]
    cutouts: tuple[bytes, ...] = ()
    backgrounds: tuple[Array, ...] = ()
    teacher: dict[str, TeacherMaps] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    """How samples are drawn; each value with its reason."""

    size: int = 256  # pixels; large enough for context, small enough for two cores
    targets: int = 4  # objects a crop: the others share the encoder's work, half of a step
    smallest: float = 0.0012  # of the crop; below it outlines are noise
    paste: float = 0.5  # of the crops get pasted objects: exact outlines on unlimited backgrounds
    union: float = 0.12  # touching regions together: both granularities must be reachable
    minus: float = 0.06  # object without a part: holes, garments
    complement: float = 0.05  # background as the target
    whole: float = 0.35  # whole photos, as at inference
    relative: tuple[float, float] = (0.06, 1.15)  # longer side of the object by side of the view, log-uniform
    scale: tuple[float, float] = (0.35, 4.0)  # output pixels a photo pixel; up-scaled inputs are what large T shows


def read_photos(folder: str | Path, split: str, *, limit: int | None = None) -> list[Photo]:
    """Decode the photos of one split of a pack, in index order; `limit` keeps the first so many of every source."""
    folder = Path(folder)
    index = json.loads((folder / "index.json").read_text())
    rows = [dict(zip(index["fields"], row, strict=True)) for row in index["samples"]]
    counts: dict[str, int] = {}
    photos = []
    shards: dict[str, zipfile.ZipFile] = {}
    for row in rows:
        if row["split"] != split:
            continue
        counts[row["source"]] = counts.get(row["source"], 0) + 1
        if limit is not None and counts[row["source"]] > limit:
            continue
        shard = shards.setdefault(row["shard"], zipfile.ZipFile(folder / row["shard"]))
        photos.append(_read_photo(shard, row["id"], row["source"], row["maps"]))
    for shard in shards.values():
        shard.close()
    return photos


def _decode(data: bytes, name: str, flags: int = cv2.IMREAD_COLOR) -> Array:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise ValueError(f"{name} is not an image.")
    return image


def _read_photo(shard: zipfile.ZipFile, key: str, source: str, n_maps: int) -> Photo:
    rgb = cv2.cvtColor(_decode(shard.read(f"{key}.jpg"), f"{key}.jpg"), cv2.COLOR_BGR2RGB)
    names = [f"{key}.m{m}.png" for m in range(n_maps)]
    maps = tuple(_decode(shard.read(name), name, cv2.IMREAD_UNCHANGED) for name in names)
    objects = json.loads(shard.read(f"{key}.json"))["objects"]
    rows = np.array([(o["map"], o["id"], o["area"]) for o in objects], np.int64).reshape(-1, 3)
    return Photo(key, source, rgb, maps, rows)


def read_pack(folders: Sequence[str | Path], split: str = "train", *, limit: int | None = None) -> Pack:
    """Read every folder: packs give photos, folders of cut-outs give copy-paste material."""
    photos: list[Photo] = []
    cutouts: list[bytes] = []
    backgrounds: list[Array] = []
    for folder in map(Path, folders):
        if not (folder / "index.json").is_file():
            raise FileNotFoundError(f"{folder} has no index.json: it is neither a pack nor a folder of cut-outs.")
        index = json.loads((folder / "index.json").read_text())
        if "samples" in index:
            photos += read_photos(folder, split, limit=limit)
        if "cutouts" in index:
            with zipfile.ZipFile(folder / "cutouts.zip") as shard:
                cutouts += [shard.read(row["file"]) for row in index["cutouts"]]
            with zipfile.ZipFile(folder / "backgrounds.zip") as shard:
                for row in index["backgrounds"]:
                    image = _decode(shard.read(row["file"]), row["file"])
                    scale = min(1.0, 800 / max(image.shape[:2]))
                    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                    backgrounds.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    if not any(len(photo.objects) for photo in photos):
        raise ValueError(f"No photo of split {split!r} with objects in {', '.join(map(str, folders))}.")
    return Pack(tuple(photos), tuple(cutouts), tuple(backgrounds))


class Sampler:
    """Draws samples: source, then photo, then object (probability ~ sqrt(area)), then a view that shows it."""

    def __init__(self, pack: Pack, draw: DrawConfig, seed: int) -> None:
        self.pack, self.draw, self.seed = pack, draw, seed
        by_source: dict[str, list[int]] = {}
        for i, photo in enumerate(pack.photos):
            if len(photo.objects):
                by_source.setdefault(photo.source, []).append(i)
        self.sources = [np.array(by_source[name]) for name in sorted(by_source)]
        weights = np.array([len(by_source[n]) ** 0.5 * SOURCE_FACTOR.get(n, 1.0) for n in sorted(by_source)])
        self.weights = weights / weights.sum()
        self.whole_objects = np.array(
            [i for i, p in enumerate(pack.photos) if p.source in SALIENT and len(p.objects)], np.int64
        )

    def batch(self, step: int, n: int) -> dict[str, Array]:
        """The n samples of one step, stacked; the same for the same (seed, step, n)."""
        samples = [self.sample(np.random.default_rng([self.seed, step, i])) for i in range(n)]
        return {key: np.stack([s[key] for s in samples]) for key in samples[0]}

    def sample(self, rng: Rng) -> dict[str, Array]:
        """One crop with its targets. S = draw.size, K = draw.targets.

        image      uint8 [S, S, 3], padded right and bottom        valid    int32 [2]: rows and columns that are photo
        targets    uint8 [K, S, S]: 0, 1; 0 in the padding   regions  int32 [S/4, S/4]: region numbers, -1 unknown
        boundary   uint8 [S/4, S/4]: 0, 1, UNKNOWN                 salient  uint8 [S/4, S/4]: 0, 1, UNKNOWN
        fine       int8 [S/8, S/8, C], coarse int8 [S/16, S/16, C], edge uint8 [S/4, S/4], known uint8 [S/16, S/16]:
                   teacher maps and where they hold (only when the pack has them)
        """
        for _ in range(50):
            sample = self._try(rng)
            if sample is not None:
                return sample
        raise RuntimeError("No usable object in 50 draws: the pack's objects are smaller than DrawConfig.smallest.")

    def _try(self, rng: Rng) -> dict[str, Array] | None:
        d, size = self.draw, self.draw.size
        photo = self.pack.photos[int(rng.choice(self.sources[rng.choice(len(self.sources), p=self.weights)]))]
        pasting = rng.random() < d.paste
        if pasting and self.pack.backgrounds and rng.random() < 0.15:
            background = self.pack.backgrounds[rng.integers(len(self.pack.backgrounds))]
            photo = Photo("", "", background, (np.zeros(background.shape[:2], np.uint8),), np.zeros((0, 3), np.int64))
        if len(photo.objects):
            share = np.sqrt(photo.objects[:, 2].astype(np.float64))
            m, wanted, _ = photo.objects[rng.choice(len(share), p=share / share.sum())]
            x, y, w, h = cv2.boundingRect((photo.maps[m] == wanted).astype(np.uint8))
        else:
            m, wanted, (h, w), x, y = 0, 0, photo.rgb.shape[:2], 0, 0
        x0, y0, x1, y1, out_h, out_w = self._view(photo.rgb.shape[:2], (x, y, w, h), rng)

        shrink = out_h < y1 - y0
        rgb = cv2.resize(
            photo.rgb[y0:y1, x0:x1], (out_w, out_h), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        )
        maps = [
            cv2.resize(p[y0:y1, x0:x1], (out_w, out_h), interpolation=cv2.INTER_NEAREST).astype(np.int32)
            for p in photo.maps
        ]
        turns, flip = (int(rng.integers(4)) if rng.random() < 0.3 else 0), bool(rng.random() < 0.5)
        rgb, maps = dihedral(rgb, turns, flip), [dihedral(p, turns, flip) for p in maps]
        out_h, out_w = rgb.shape[:2]

        pasted = self._paste(rgb, rng) if pasting and (self.pack.cutouts or len(self.whole_objects)) else []
        for where in pasted:
            for p in maps:
                p[where] = p.max() + 1
        valid_h, valid_w = out_h, out_w
        if rng.random() < 0.5:  # photos do not end at token borders
            valid_h -= int(rng.integers(16)) if out_h < size else 0
            valid_w -= int(rng.integers(16)) if out_w < size else 0

        targets: list[Array] = []
        smallest = d.smallest * size * size
        for k in range(d.targets):
            if k == 0 and pasted and (rng.random() < 0.7 or not wanted):
                target = pasted[-1]
            elif k == 0 and wanted:
                target = maps[m] == wanted
            else:
                drawn = self._draw_visible(maps, smallest, rng)
                target = targets[0] if drawn is None else drawn
            if k == 0 and target[:valid_h, :valid_w].sum() < smallest:
                return None
            target = self._compose(target, maps, rng)
            area = target[:valid_h, :valid_w].sum()
            if not smallest <= area <= 0.97 * valid_h * valid_w:
                if k == 0:
                    return None
                target = targets[0]
            targets.append(target)

        sample: dict[str, Array] = {"valid": np.array([valid_h, valid_w], np.int32)}
        sample["image"] = _pad(photometric(rgb, rng)[:valid_h, :valid_w], size, 0)
        sample["targets"] = np.stack([_pad(t[:valid_h, :valid_w].astype(np.uint8), size, 0) for t in targets])
        sample |= self._dense(photo, maps, pasted, m, (valid_h, valid_w))
        if self.pack.teacher:
            sample |= self._taught(photo, (x0, y0, x1, y1), turns, flip, pasted, (valid_h, valid_w))
        return sample

    def _view(self, hw: tuple[int, int], box: tuple[int, int, int, int], rng: Rng) -> tuple[int, ...]:
        """Rectangle of the photo to show (x0, y0, x1, y1) and its size in output pixels, both multiples of 16."""
        d, (height, width), (x, y, w, h) = self.draw, hw, box
        low, high = np.log(d.relative)
        side = max(w, h) / np.exp(rng.uniform(low, high))
        side = float(np.clip(side, d.size / d.scale[1], d.size / d.scale[0]))
        if rng.random() < d.whole:
            side = max(height, width)
        view_h = view_w = side
        if rng.random() < 0.2:
            squeeze = rng.uniform(0.5, 1.0)
            view_h, view_w = (side, side * squeeze) if rng.random() < 0.5 else (side * squeeze, side)
        view_h, view_w = min(view_h, height), min(view_w, width)

        def start(low: float, length: float, view: float, limit: int) -> int:
            a, b = (low + length - view, low) if view >= length else (low, low + length - view)
            return int(np.clip(round(rng.uniform(a, b)), 0, max(0, limit - int(view))))

        x0, y0 = start(x, w, view_w, width), start(y, h, view_h, height)
        x1, y1 = x0 + max(1, int(view_w)), y0 + max(1, int(view_h))
        scale = d.size / max(x1 - x0, y1 - y0)
        out_h, out_w = (min(d.size, max(16, round(v * scale / 16) * 16)) for v in (y1 - y0, x1 - x0))
        return x0, y0, x1, y1, out_h, out_w

    def _paste(self, rgb: Array, rng: Rng) -> list[Array]:
        """Blend one to three objects into `rgb`; returns where the visible part of each is (later ones lie on top)."""
        placed: list[Array] = []
        for _ in range(int(rng.choice([1, 1, 1, 2, 2, 3]))):
            cutout, alpha = self._cutout(rng)
            scale = max(rgb.shape[:2]) * np.exp(rng.uniform(np.log(0.12), np.log(0.95))) / max(alpha.shape)
            h, w = (max(4, round(s * scale)) for s in alpha.shape)
            how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            cutout, alpha = cv2.resize(cutout, (w, h), interpolation=how), cv2.resize(alpha, (w, h), interpolation=how)
            turns, flip = (int(rng.integers(4)) if rng.random() < 0.3 else 0), bool(rng.random() < 0.5)
            cutout, alpha = photometric(dihedral(cutout, turns, flip), rng), dihedral(alpha, turns, flip)
            h, w = alpha.shape
            top = int(rng.integers(-h // 4, max(-h // 4 + 1, rgb.shape[0] - h + h // 4 + 1)))
            left = int(rng.integers(-w // 4, max(-w // 4 + 1, rgb.shape[1] - w + w // 4 + 1)))
            where = blend(rgb, cutout, alpha, top, left, feather=rng.uniform(0.5, 1.2) if rng.random() < 0.6 else 0)
            placed = [p & ~where for p in placed] + [where]
        return placed

    def _cutout(self, rng: Rng) -> tuple[Array, Array]:
        """rgb uint8 [h, w, 3] and alpha uint8 [h, w]: a ready cut-out, or an object cut from another photo."""
        if self.pack.cutouts and (rng.random() < 0.65 or not len(self.whole_objects)):
            data = self.pack.cutouts[rng.integers(len(self.pack.cutouts))]
            image = _decode(data, "a cut-out", cv2.IMREAD_UNCHANGED)
            return cv2.cvtColor(image[..., :3], cv2.COLOR_BGR2RGB), np.ascontiguousarray(image[..., 3])
        photo = self.pack.photos[int(rng.choice(self.whole_objects))]
        whole = photo.objects[photo.objects[:, 0] == 0]
        mask = (photo.maps[0] == whole[whole[:, 2].argmax(), 1]).astype(np.uint8) * 255
        x, y, w, h = cv2.boundingRect(mask)
        return photo.rgb[y : y + h, x : x + w], mask[y : y + h, x : x + w]

    def _draw_visible(self, maps: Sequence[Array], smallest: float, rng: Rng) -> Array | None:
        """Another region of the crop, from any map, probability ~ sqrt(visible area)."""
        m = int(rng.integers(len(maps)))
        areas = np.bincount(maps[m].ravel())
        areas[0] = 0
        areas[areas < smallest] = 0
        if not areas.any():
            return None
        share = np.sqrt(areas)
        return np.asarray(maps[m] == rng.choice(len(share), p=share / share.sum()))

    def _compose(self, target: Array, maps: Sequence[Array], rng: Rng) -> Array:
        """Now and then: a union with touching regions, the object without a part, the complement."""
        d, roll = self.draw, rng.random()
        if roll < d.union:
            regions = maps[int(rng.integers(len(maps)))]
            for _ in range(int(rng.integers(1, 5))):
                ring = cv2.dilate(target.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
                near = np.unique(regions[ring & ~target])
                near = near[near > 0]
                if not len(near):
                    break
                target = target | (regions == rng.choice(near))
        elif roll < d.union + d.minus:
            regions = maps[int(rng.integers(len(maps)))]
            counts = np.bincount(regions[target])
            counts[0] = 0
            parts = np.flatnonzero((counts > 0.04 * target.sum()) & (counts < 0.7 * target.sum()))
            if len(parts):
                target = target & (regions != rng.choice(parts))
        elif roll < d.union + d.minus + d.complement:
            target = ~target
        return target

    def _dense(
        self, photo: Photo, maps: Sequence[Array], pasted: Sequence[Array], m: int, valid: tuple[int, int]
    ) -> dict[str, Array]:
        """Class-agnostic maps at stride 4 for the auxiliary head."""
        quarter, (h, w) = self.draw.size // 4, valid
        regions = maps[m][:h, :w].copy()
        if photo.source not in COMPLETE or m:
            regions[regions == 0] = -1
        regions = _pad(regions, self.draw.size, -1)[2::4, 2::4]

        outline = np.zeros((self.draw.size, self.draw.size), np.uint8)
        seen = np.zeros_like(outline)
        for p in maps:
            p = p[:h, :w]
            outline[: h - 1, :w] |= p[1:] != p[:-1]
            outline[:h, : w - 1] |= p[:, 1:] != p[:, :-1]
            seen[:h, :w] |= p > 0
        if photo.source in COMPLETE:
            seen[:h, :w] = 1
        boundary = outline.reshape(quarter, 4, quarter, 4).max((1, 3))
        unseen = seen.reshape(quarter, 4, quarter, 4).min((1, 3)) == 0
        boundary[(boundary == 0) & unseen] = UNKNOWN

        salient = np.full((h, w), UNKNOWN, np.uint8)
        if photo.source in SALIENT:
            salient[...] = maps[0][:h, :w] > 0
        if not photo.source:
            salient[...] = 0
        for where in pasted:
            salient[where[:h, :w]] = 1
        return {
            "regions": regions.astype(np.int32),
            "boundary": boundary,
            "salient": _pad(salient, self.draw.size, UNKNOWN)[2::4, 2::4].copy(),
        }

    def _taught(
        self,
        photo: Photo,
        view: tuple[int, int, int, int],
        turns: int,
        flip: bool,
        pasted: Sequence[Array],
        valid: tuple[int, int],
    ) -> dict[str, Array]:
        """The teacher's maps seen through the same view; `known` is 0 under pasted objects and in the padding."""
        d, (x0, y0, x1, y1) = self.draw, view
        taught = self.pack.teacher.get(photo.key)
        height, width = photo.rgb.shape[:2]
        any_maps = next(iter(self.pack.teacher.values()))
        out: dict[str, Array] = {}
        out_h, out_w = (-(-v // 16) * 16 for v in valid)
        grid = (out_w, out_h) if turns % 2 else (out_h, out_w)  # before the turn
        for name, stride in (("fine", 8), ("coarse", 16), ("edge", 4)):
            tail = any_maps[name].shape[2:]
            canvas = np.zeros((d.size // stride, d.size // stride, *tail), any_maps[name].dtype)
            if taught is not None:
                source = taught[name]
                rows, cols = grid[0] // stride, grid[1] // stride
                y = (y0 + (np.arange(rows) + 0.5) / rows * (y1 - y0)) / height * source.shape[0]
                x = (x0 + (np.arange(cols) + 0.5) / cols * (x1 - x0)) / width * source.shape[1]
                picked = source[np.minimum(y.astype(int), source.shape[0] - 1)[:, None],
                                np.minimum(x.astype(int), source.shape[1] - 1)[None]]  # fmt: skip
                picked = dihedral(picked, turns, flip)
                canvas[: picked.shape[0], : picked.shape[1]] = picked
            out[name] = canvas
        known = np.zeros((d.size, d.size), np.uint8)
        if taught is not None:
            known[: valid[0], : valid[1]] = 1
            for where in pasted:
                known[: where.shape[0], : where.shape[1]][where] = 0
        n = d.size // 16
        out["known"] = known.reshape(n, 16, n, 16).min((1, 3))
        return out


def _pad(array: Array, size: int, value: int) -> Array:
    out = np.full((size, size, *array.shape[2:]), value, array.dtype)
    out[: array.shape[0], : array.shape[1]] = array
    return out
