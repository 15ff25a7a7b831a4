"""R30 for any damage: values of an export dropped or replaced give records, lines and at worst an ExportError."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inter2former import brush_rle
from train.exports import KINDS, ExportError, read_label_studio

H, W = 12, 16
Path_ = tuple[str | int, ...]


def _region(kind: str, name: str, **value: Any) -> dict[str, Any]:
    entry = {"id": name, "type": f"{kind}labels", "to_name": "image", "value": value | {f"{kind}labels": ["Cup"]}}
    return entry | {"original_width": W, "original_height": H, "image_rotation": 0, "item_index": 0}


def _export() -> list[Any]:
    brush = {"format": "rle", "rle": brush_rle.encode(np.eye(H, W))}
    first = [
        _region("brush", "r1", **brush),
        _region("keypoint", "r1", **brush),
        _region("rectangle", "r2", x=1, y=2, width=30, height=40, rotation=5),
    ]
    second = [
        _region("polygon", "r3", points=[[1, 1], [50, 2], [30, 60]], closed=True),
        _region("ellipse", "r4", x=40, y=40, radiusX=10, radiusY=5, rotation=3),
    ]
    annotations = [
        {"id": n, "completed_by": n, "result": result, "was_cancelled": False, "updated_at": "2026-11-23T18:18:35Z"}
        for n, result in enumerate((first, second))
    ]
    good = {"id": 9, "result": [_region("brush", "r", **brush)]}
    return [
        {"id": 1, "data": {"image": "good.png"}, "annotations": [good]},
        {"id": 2, "data": {"image": "other.png"}, "annotations": annotations},
    ]


def _places(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    if path:
        yield path
    if isinstance(node, dict | list) and path[-1:] != ("rle",):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from _places(node[key], (*path, key))


EXPORT = _export()
ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "x",
    "\ud800",
    "../x",
    [],
    [[]],
    [1, 2],
    {},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    for name, grey in (("good.png", 10), ("other.png", 20)):
        cv2.imwrite(str(folder / name), np.full((H, W, 3), grey, np.uint8))
    return folder


@given(
    st.lists(st.tuples(st.sampled_from(list(_places(EXPORT))), st.sampled_from([..., *ODD])), min_size=1, max_size=4)
)
def test_r30_any_damage_is_told_and_never_a_crash(folder: Path, damage: list[tuple[Path_, Any]]) -> None:
    tasks = copy.deepcopy(EXPORT)
    for path, value in damage:
        node: Any = tasks
        try:
            for key in path[:-1]:
                node = node[key]
            if value is ...:
                del node[path[-1]]
            else:
                node[path[-1]] = value
        except (KeyError, IndexError, TypeError):  # inside something that is damaged already
            continue
    (folder / "export.json").write_text(json.dumps(tasks))
    try:
        records, report = read_label_studio(folder / "export.json", folder)
    except ExportError:
        return
    assert len({record.key for record in records}) == len(records)
    for mask in (mask for record in records for mask in record.masks):
        assert mask.pixels().sum() == mask.area > 0
    for finding in report.findings:
        assert finding.kind in KINDS
        assert str(finding).isprintable()
