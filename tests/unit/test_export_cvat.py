"""Reading CVAT's exports: the four formats as they were recorded, zip or folder, then what may be wrong."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from inter2former.masks import png_to_mask
from train.__main__ import app
from train.cvat_exports import read_cvat
from train.exports import ExportError, ObjectMask, Record, Report
from train.finetune import read_export

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDED = FIXTURES / "exports" / "cvat"
CAT = FIXTURES / "cvat" / "cat_226x150.jpg"
EXPECTED = png_to_mask((RECORDED / "expected_cat_mask.png").read_bytes())
H, W = EXPECTED.shape

LAYOUT = {  # where the files of each format are in a zip
    "cvat": {"annotations.xml": "cvat_for_images_1.1.xml", "images/cat.jpg": CAT},
    "coco": {"annotations/instances_default.json": "coco_1.0_instances_default.json", "images/default/cat.jpg": CAT},
    "datumaro": {"annotations/default.json": "datumaro_1.0_default.json", "images/default/cat.jpg": CAT},
    "painted": {
        **{
            name: f"segmentation_mask_1.1/{name}"
            for name in (
                "labelmap.txt",
                "SegmentationClass/cat.png",
                "SegmentationObject/cat.png",
                "ImageSets/Segmentation/default.txt",
            )
        },
        "JPEGImages/cat.jpg": CAT,
    },
}


def files(form: str) -> dict[str, bytes]:
    return {name: (RECORDED / where).read_bytes() for name, where in LAYOUT[form].items()}


def pack(path: Path, content: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def unpack(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def by_label(record: Record, label: str) -> list[np.ndarray]:
    return [mask.pixels() for mask in record.masks if mask.label == label]


@pytest.mark.parametrize("packed", ["zip", "folder", "zip in a folder", "images beside"])
@pytest.mark.parametrize("form", LAYOUT)
def test_every_format_reads_back_to_the_same_mask_pixel_for_pixel(tmp_path: Path, form: str, packed: str) -> None:
    content, images = files(form), None
    if packed == "images beside":
        images = unpack(tmp_path / "photos", {"cat.jpg": CAT.read_bytes()})
        content = {name: data for name, data in content.items() if not name.endswith(".jpg")}
    if packed == "folder":
        export = unpack(tmp_path / "export", content)
    else:
        prefix = "dump/" if packed == "zip in a folder" else ""
        export = pack(tmp_path / "export.zip", {prefix + name: data for name, data in content.items()})
    records, report = read_cvat(export, images)
    (record,) = records
    assert record.size_hw == (H, W)
    assert record.image().shape == (H, W, 3)
    cat = by_label(record, "cat")[0]
    if form == "painted":  # what is drawn over it is not in its picture
        over = by_label(record, "cat")[1]
        assert np.array_equal(cat, EXPECTED & ~over)
        assert int((EXPECTED & over).sum()) == 107
    else:
        assert np.array_equal(cat, EXPECTED)
    assert {mask.label for mask in record.masks} <= {"cat", "cushion"}
    assert not report.defects


def test_polygons_boxes_and_ellipses_are_the_same_in_every_format_that_has_them(tmp_path: Path) -> None:
    read = {form: read_cvat(pack(tmp_path / f"{form}.zip", files(form)))[0][0] for form in ("cvat", "coco", "datumaro")}
    cushion = np.zeros((H, W), bool)
    cushion[100:140, 10:60] = True  # centres inside (10.5, 100) .. (60, 140.25); a centre on the left side counts
    for record in read.values():
        assert np.array_equal(by_label(record, "cushion")[0], cushion)
    plain = np.zeros((H, W), bool)
    plain[20:80, 150:200] = True
    assert np.array_equal(by_label(read["coco"], "cat")[1], plain)
    assert np.array_equal(by_label(read["datumaro"], "cat")[1], plain)
    turned, ellipse = by_label(read["cvat"], "cat")[1], by_label(read["cvat"], "cushion")[1]
    assert abs(int(turned.sum()) - 50 * 60) < 30
    assert not np.array_equal(turned, plain)
    assert abs(ellipse.sum() / (np.pi * 20 * 10) - 1) < 0.02
    rows, columns = np.nonzero(ellipse)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (30, 50, 10, 50)


# -- one image, any shapes --------------------------------------------------------------------------------------------


def element(kind: str, **attributes: Any) -> str:
    text = " ".join(f"{name}={quoteattr(str(value))}" for name, value in attributes.items())
    return f"<{kind} {text}></{kind}>"


def read(tmp_path: Path, *shapes: str, name: str = "a.png", **image: Any) -> tuple[Record | None, Report]:
    """A 40 x 30 picture with these shapes, beside another one that is in order."""
    pixels = np.random.default_rng(3).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    png = cv2.imencode(".png", pixels)[1].tobytes()
    given = {"id": 0, "name": name, "width": 40, "height": 30} | image
    attributes = " ".join(f"{key}={quoteattr(str(value))}" for key, value in given.items())
    whole = element("mask", label="all", rle=f"0, {H * W}", left=0, top=0, width=W, height=H)
    xml = (
        f"<annotations><image {attributes}>{''.join(shapes)}</image>"
        f'<image id="1" name="cat.jpg" width="{W}" height="{H}">{whole}</image></annotations>'
    )
    content = {"annotations.xml": xml.encode(), "images/sub/a.png": png, "images/cat.jpg": CAT.read_bytes()}
    records, report = read_cvat(pack(tmp_path / "one.zip", content))
    assert records[-1].masks[0].pixels().all()
    return (records[0] if len(records) == 2 else None), report


def test_parts_of_a_group_are_one_object(tmp_path: Path) -> None:
    left = element("box", label="glasses", xtl=2, ytl=2, xbr=10, ybr=10, group_id=3)
    right = element("polygon", label="glasses", points="20,2;30,2;30,10;20,10", group_id=3)
    other = element("box", label="nose", xtl=12, ytl=12, xbr=16, ybr=20, group_id=0)
    record, report = read(tmp_path, left, other, right, name="sub/a.png")
    assert record is not None
    expected = np.zeros((30, 40), bool)
    expected[2:10, 2:10] = expected[2:10, 20:30] = True
    assert [mask.label for mask in record.masks] == ["glasses", "nose"]
    assert np.array_equal(record.masks[0].pixels(), expected)
    assert report.findings == []


def test_images_are_found_in_the_folder_of_their_subset(tmp_path: Path) -> None:
    record, report = read(tmp_path, element("box", label="x", xtl=1, ytl=1, xbr=5, ybr=5), subset="sub")
    assert record is not None
    assert report.counts() == {}


@pytest.mark.parametrize(
    ("shape", "kind", "text"),
    [
        (element("mask", rle="3, x", left=0, top=0, width=2, height=2), "broken mask", "whole numbers"),
        (element("mask", rle="", left=0, top=0, width=2, height=2), "broken mask", "whole numbers"),
        (element("mask", rle="3, 9", left=0, top=0, width=2, height=2), "broken mask", "do not fill"),
        (element("mask", rle="-1, 5", left=0, top=0, width=2, height=2), "broken mask", "do not fill"),
        (element("mask", rle="0, 4", left=39, top=0, width=2, height=2), "broken mask", "not inside"),
        (element("mask", rle="0, 4", left=-1, top=0, width=2, height=2), "broken mask", "not inside"),
        (element("mask", rle="9" * 40, left=0, top=0, width=2, height=2), "broken mask", "whole numbers"),
        (element("mask", rle="0, 4", left="nan", top=0, width=2, height=2), "broken mask", "left"),
        (element("mask", rle="4", left=0, top=0, width=2, height=2), "zero area", "no pixel"),
        (element("polygon", points="1,1;2,2"), "broken mask", "three points"),
        (element("polygon", points="1,1;2,2;x,3"), "broken mask", "coordinate"),
        (element("polygon", points="1,1;2,2;900,3"), "broken mask", "far outside"),
        (element("polygon", points="1,1;2,2;3,3"), "zero area", "no pixel"),
        (element("box", xtl=1, ytl=1, xbr=5), "broken mask", "ybr"),
        (element("box", xtl=1, ytl=1, xbr=1, ybr=9), "zero area", "no pixel"),
        (element("ellipse", cx=5, cy=5, rx=0, ry=3), "zero area", "no pixel"),
        (element("points", points="1,1"), "not a mask", "points"),
        (element("tag", label="x"), "not a mask", "tag"),
        (element("cuboid", xtl1=1), "unsupported shape", "cuboid"),
    ],
)
def test_r30_every_defect_is_a_line_and_the_rest_is_used(tmp_path: Path, shape: str, kind: str, text: str) -> None:
    good = element("box", label="x", xtl=10, ytl=10, xbr=20, ybr=20)
    record, report = read(tmp_path, shape, good, subset="sub")
    assert record is not None
    assert len(record.masks) == 1
    (finding,) = report.findings
    assert finding.kind == kind
    assert text in str(finding)
    assert "a.png" in finding.where


def test_r30_images_that_are_missing_or_of_another_size_are_lines(tmp_path: Path) -> None:
    box = element("box", label="x", xtl=1, ytl=1, xbr=5, ybr=5)
    for changes, kind in (
        ({"name": "b.png"}, "missing image"),
        ({"name": "../a.png"}, "missing image"),
        ({"subset": "sub", "width": 30, "height": 40}, "size mismatch"),
        ({"width": "wide"}, "broken entry"),
    ):
        _, report = read(tmp_path, box, **changes)
        assert kind in report.counts()


def test_r30_strict_stops_at_a_defect(tmp_path: Path) -> None:
    content = files("cvat")
    del content["images/cat.jpg"]
    with pytest.raises(ExportError, match="missing image"):
        read_cvat(pack(tmp_path / "a.zip", content), strict=True)
    with pytest.raises(ExportError, match="missing image"):  # and so does an export of which nothing is left
        read_cvat(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({}, "none of CVAT's formats"),
        ({"a.txt": b""}, "none of CVAT's formats"),
        ({"annotations.xml": b"<annotations>"}, "not XML"),
        ({"annotations.xml": b"<annotations><track/></annotations>"}, "CVAT for video"),
        ({"annotations/a.json": b"{"}, "not JSON"),
        ({"annotations/a.json": b"[]"}, "broken entry"),
        ({"SegmentationObject/a.png": b"x"}, "broken mask"),
    ],
)
def test_what_is_no_usable_export_is_refused(tmp_path: Path, content: dict[str, bytes], text: str) -> None:
    with pytest.raises(ExportError, match=text):
        read_cvat(pack(tmp_path / "a.zip", content))


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK no")
    for path in (tmp_path / "a.zip", tmp_path / "none.zip"):
        with pytest.raises(ExportError, match=path.name):
            read_cvat(path)
    with pytest.raises(ExportError, match="not a folder"):
        read_cvat(pack(tmp_path / "b.zip", files("cvat")), tmp_path / "none")


def test_a_broken_zip_entry_is_named(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", files("cvat"))
    data = bytearray(path.read_bytes())
    data[data.find(b"annotations.xml") + 40] ^= 255
    path.write_bytes(data)
    with pytest.raises(ExportError):
        read_cvat(path)


@pytest.mark.parametrize("form", ["coco", "datumaro"])
def test_r26_tables_bent_in_any_way_are_lines_or_an_export_error(tmp_path: Path, form: str) -> None:
    name, where = next(iter(LAYOUT[form].items()))
    whole = json.loads((RECORDED / str(where)).read_bytes())
    for path in list(_paths(whole)):
        for junk in ([None], 1e30):
            bent = json.loads(json.dumps(whole))
            at = bent
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = junk
            folder = tmp_path / "bent"
            shutil.rmtree(folder, ignore_errors=True)
            unpack(folder, {**files(form), name: json.dumps(bent).encode()})
            try:
                records, _ = read_cvat(folder)
            except ExportError:
                continue
            assert all(isinstance(mask, ObjectMask) for record in records for mask in record.masks)


def _paths(value: Any, so_far: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        if key not in ("licenses", "info"):
            yield (*so_far, key)
            yield from _paths(inner, (*so_far, key))


def test_a_large_image_entry_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.cvat_exports.MAX_FILE_BYTES", 5000)
    with pytest.raises(ExportError, match="missing image"):
        read_cvat(pack(tmp_path / "a.zip", files("cvat")))


def test_fine_tuning_reads_them_too(tmp_path: Path) -> None:
    export = pack(tmp_path / "cat.zip", files("coco"))
    records, report, source = read_export(export, None)
    assert (len(records), report.defects, source["format"]) == (1, [], "CVAT")
    result = CliRunner().invoke(app, ["finetune", "--export", str(export), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "Too few different images with objects: 1" in result.stderr  # so it was read
