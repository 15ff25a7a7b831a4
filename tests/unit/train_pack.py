"""A small pack drawn on the spot, in the format that train.data reads. Used by the tests of train/."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import cv2
import numpy as np


def draw_photo(rng: np.random.Generator, height: int = 96, width: int = 128) -> tuple[np.ndarray, list[np.ndarray]]:
    """Bright shapes on a dark ground: rgb, and two label maps (shapes; the left and right half of each shape)."""
    rgb = rng.integers(20, 60, (height, width, 3)).astype(np.uint8)
    whole = np.zeros((height, width), np.uint8)
    for number in (1, 2):
        centre = (
            int(rng.integers(20, width // 2 - 10)) + (number - 1) * width // 2,
            int(rng.integers(30, height - 30)),
        )
        shape = np.zeros_like(whole)
        cv2.ellipse(shape, centre, (int(rng.integers(12, 20)), int(rng.integers(12, 24))), 0, 0, 360, 1, -1)
        whole[shape > 0] = number
        rgb[shape > 0] = rng.integers(120, 250, 3)
    x = np.arange(width)[None]
    centres = [np.argwhere(whole == n)[:, 1].mean() for n in (1, 2)]
    parts = whole.copy()
    for number, centre in enumerate(centres, 1):
        parts[(whole == number) & (x > centre)] = number + 2
    return rgb, [whole, parts]


def write_pack(folder: Path, *, photos: int = 4, seed: int = 0) -> Path:
    """A pack with the sources "human290" (whole objects, complete) and "other"; the last photo of each is val."""
    rng = np.random.default_rng(seed)
    samples = []
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "shard.zip", "w") as shard:
        for source in ("human290", "other"):
            for n in range(photos):
                key = f"{source}_{n}"
                rgb, maps = draw_photo(rng)
                shard.writestr(f"{key}.jpg", cv2.imencode(".jpg", rgb[..., ::-1])[1].tobytes())
                objects = []
                for m, labels in enumerate(maps):
                    shard.writestr(f"{key}.m{m}.png", cv2.imencode(".png", labels)[1].tobytes())
                    for number in np.unique(labels[labels > 0]):
                        area = int((labels == number).sum())
                        objects.append({"map": m, "id": int(number), "kind": "object", "area": area})
                split = "val" if n == photos - 1 else "train"
                h, w = rgb.shape[:2]
                facts = {"id": key, "source": source, "split": split, "w": w, "h": h, "maps": 2, "objects": objects}
                shard.writestr(f"{key}.json", json.dumps(facts))
                samples.append([key, source, split, "shard.zip", w, h, 2, len(objects)])
    fields = ["id", "source", "split", "shard", "w", "h", "maps", "objects"]
    (folder / "index.json").write_text(json.dumps({"version": 1, "fields": fields, "samples": samples}))
    return folder


def write_cutouts(folder: Path) -> Path:
    """Two cut-outs (a red disc, a green square) and one background."""
    folder.mkdir(parents=True)
    disc = np.zeros((40, 40, 4), np.uint8)
    cv2.circle(disc, (20, 20), 16, (0, 0, 250, 255), -1)
    square = np.zeros((32, 32, 4), np.uint8)
    square[4:28, 4:28] = (0, 250, 0, 255)
    with zipfile.ZipFile(folder / "cutouts.zip", "w") as shard:
        for name, image in (("disc.webp", disc), ("square.webp", square)):
            shard.writestr(name, cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes())
    with zipfile.ZipFile(folder / "backgrounds.zip", "w") as shard:
        shard.writestr("0.jpg", cv2.imencode(".jpg", np.full((60, 80, 3), 128, np.uint8))[1].tobytes())
    index = {"cutouts": [{"file": "disc.webp"}, {"file": "square.webp"}], "backgrounds": [{"file": "0.jpg"}]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder
