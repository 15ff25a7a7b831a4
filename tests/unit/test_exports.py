"""Reading annotation exports: the recorded one as it is, then one with every defect (R30), each with its line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from inter2former import brush_rle
from train.exports import ExportError, Record, Report, find_image, read_label_studio, split_by_content

FIXTURES = Path(__file__).parents[1] / "fixtures" / "exports"
RECORDED = FIXTURES / "label_studio_1.23.2.json"
H, W = 40, 60


def disc(row: float = 20, column: float = 30, radius: float = 10) -> np.ndarray:
    rows, columns = np.mgrid[:H, :W] + 0.5
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


def brush(mask: np.ndarray, name: str = "r1", label: str = "Cup", **changes: Any) -> dict[str, Any]:
    value = {"format": "rle", "rle": brush_rle.encode(mask), "brushlabels": [label]}
    entry = {"id": name, "type": "brushlabels", "to_name": "image", "value": value}
    return entry | {"original_width": W, "original_height": H, "image_rotation": 0} | changes


def shape(kind: str, name: str = "r1", **value: Any) -> dict[str, Any]:
    return brush(disc(), name) | {"type": f"{kind}labels", "value": value | {f"{kind}labels": ["Cup"]}}


class Project:
    """A folder of images and a growing export."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tasks = folder, []
        self.images = folder / "images"
        self.images.mkdir()

    def image(self, name: str = "a.png", seed: int = 1, size: tuple[int, int] = (H, W)) -> str:
        pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(self.images / name), pixels)
        return name

    def task(self, name: str, *results: Any, **annotation: Any) -> dict[str, Any]:
        number = len(self.tasks) + 1
        annotations = [
            {"id": 10 * number + nth, "completed_by": nth, "result": result, "was_cancelled": False} | annotation
            for nth, result in enumerate(results)
        ]
        self.tasks.append({"id": number, "data": {"image": f"/data/upload/1/0123abcd-{name}"}})
        self.tasks[-1]["annotations"] = annotations
        return self.tasks[-1]

    def read(self, *, strict: bool = False) -> tuple[list[Record], Report]:
        path = self.folder / "export.json"
        path.write_text(json.dumps(self.tasks))
        return read_label_studio(path, self.images, strict=strict)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """One good task is always there, so that the rest may be broken."""
    project = Project(tmp_path)
    project.task(project.image("good.png", seed=0), [brush(disc())])
    return project


def test_the_recorded_export_gives_each_mask_once() -> None:
    records, report = read_label_studio(RECORDED, FIXTURES / "images")
    assert [record.path.name for record in records] == ["chelsea.jpg", "chelsea_exif6.jpg"]
    assert [[mask.label for mask in record.masks] for record in records] == [["Cup", "Cup"], ["Cat"]]
    assert report.findings == []
    tasks = json.loads(RECORDED.read_text())
    for record, task in zip(records, tasks, strict=True):
        entry = task["annotations"][0]["result"][0]
        expected = brush_rle.decode(entry["value"]["rle"], entry["original_height"], entry["original_width"])
        assert (record.masks[0].pixels() == expected).all()
        assert record.image().shape[:2] == expected.shape == record.size_hw
        assert record.masks[0].area == expected.sum()


def test_the_answer_of_the_api_may_be_wrapped_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    path.write_text(json.dumps({"note": "GET ...", "export": json.loads(RECORDED.read_text())}))
    assert len(read_label_studio(path, FIXTURES / "images")[0]) == 2


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (shape("rectangle", x=10, y=25, width=50, height=50, rotation=0), np.s_[10:30, 6:36]),
        (shape("rectangle", x=60, y=75, width=-50, height=-50, rotation=0), np.s_[10:30, 6:36]),
        (shape("rectangle", x=50, y=25, width=25, height=50, rotation=90), np.s_[10:25, 10:30]),
        (shape("polygon", points=[[10, 25], [60, 25], [60, 75], [10, 75]], closed=True), np.s_[10:30, 6:36]),
        (brush(disc()) | {"type": "brush", "value": {"format": "rle", "rle": brush_rle.encode(np.ones((H, W)))}}, ...),
    ],
    ids=["rectangle", "turned round", "rotated about its corner", "polygon", "brush without labels"],
)
def test_shapes(project: Project, entry: dict[str, Any], expected: Any) -> None:
    project.task(project.image(), [entry])
    records, report = project.read()
    mask = np.zeros((H, W), bool)
    mask[expected] = True
    assert (records[1].masks[0].pixels() == mask).all()
    assert report.findings == []


def test_an_ellipse_covers_its_area(project: Project) -> None:
    project.task(project.image(), [shape("ellipse", x=50, y=50, radiusX=100 * 20 / W, radiusY=25, rotation=0)])
    mask = project.read()[0][1].masks[0].pixels()
    rows, columns = np.mgrid[:H, :W] + 0.5
    expected = ((columns - 30) / 20) ** 2 + ((rows - 20) / 10) ** 2 < 1
    assert (mask ^ expected).sum() <= 4


def test_a_bitmask_is_its_alpha(project: Project) -> None:
    png = cv2.imencode(".png", np.dstack([np.zeros((H, W, 3), np.uint8), disc().astype(np.uint8) * 255]))[1]
    url = "data:image/png;base64," + base64.b64encode(png.tobytes()).decode()
    project.task(project.image(), [shape("bitmask", imageDataURL=url)])
    assert (project.read()[0][1].masks[0].pixels() == disc()).all()


def test_an_accepted_mask_takes_its_label_from_its_twin(project: Project) -> None:
    mask, click = brush(disc()), brush(disc())
    del mask["value"]["brushlabels"]
    click |= {"type": "keypointlabels", "value": click["value"] | {"keypointlabels": ["Dog"]}}
    project.task(project.image(), [click, mask])
    records, report = project.read()
    assert [mask.label for mask in records[1].masks] == ["Dog"]
    assert report.findings == []


# -- R30: every defect is a counted line -----------------------------------------------------------------------------

DAMAGED = brush_rle.encode(disc())[:-9]
FAR = [[0, 0], [900, 0], [0, 50]]
BROKEN = {
    "cut rle": brush(disc()) | {"value": {"format": "rle", "rle": DAMAGED}},
    "rle of another size": brush(disc()) | {"value": {"format": "rle", "rle": brush_rle.encode(np.ones((3, 3)))}},
    "rle of words": brush(disc()) | {"value": {"format": "rle", "rle": "AAAA"}},
    "no rle": brush(disc()) | {"value": {"format": "rle"}},
    "format": brush(disc()) | {"value": {"format": "png"}},
    "two points": shape("polygon", points=[[1, 1], [2, 2]], closed=True),
    "open polygon": shape("polygon", points=[[1, 1], [9, 1], [9, 9]], closed=False),
    "not points": shape("polygon", points=[1, 2, 3]),
    "not numbers": shape("polygon", points=[[1, 1], ["9", 1], [9, 9]]),
    "nan": shape("rectangle", x=float("nan"), y=1, width=5, height=5),
    "huge": shape("rectangle", x=10**400, y=1, width=5, height=5),
    "no width": shape("rectangle", x=1, y=1, height=5),
    "far away": shape("polygon", points=FAR, closed=True),
    "too many points": shape("polygon", points=[[1, 1]] * 20_001),
    "not a picture": shape("bitmask", imageDataURL="data:image/png;base64,AAAA"),
    "not base64": shape("bitmask", imageDataURL="data:image/png;base64,%%"),
    "not a url": shape("bitmask", imageDataURL=7),
}


@pytest.mark.parametrize("entry", BROKEN.values(), ids=BROKEN)
def test_r30_broken_mask(project: Project, entry: dict[str, Any]) -> None:
    project.task(project.image(), [entry, brush(disc(), "good")])
    records, report = project.read()
    assert report.counts() == {"broken mask": 1}
    assert "task 2, annotation 20, region r1" in str(report.findings[0])
    assert [mask.where for mask in records[1].masks] == ["task 2, annotation 20, region good"]
    with pytest.raises(ExportError, match="1 x broken mask"):
        project.read(strict=True)


def test_r30_missing_image(project: Project) -> None:
    task = project.task("gone.png", [brush(disc(), "r1"), brush(disc(), "r2")])
    task["data"]["image"] = "s3://bucket/gone.png?signature=secret"
    project.task("gone.png", [])
    report = project.read()[1]
    assert report.counts() == {"missing image": 2}
    assert "gone.png" in str(report.findings[0])
    assert "2 regions" in str(report.findings[0])
    assert "secret" not in str(report.findings[0])


def test_r30_broken_image(project: Project) -> None:
    (project.images / "a.png").write_bytes(b"<html>log in</html>")
    project.task("a.png", [brush(disc(), "r1"), brush(disc(), "r2")])
    assert project.read()[1].counts() == {"broken image": 1}


def test_r30_zero_area(project: Project) -> None:
    empty = shape("rectangle", "r2", x=10, y=10, width=0, height=30)
    project.task(project.image(), [brush(np.zeros((H, W))), empty, brush(disc(), "r3")])
    records, report = project.read()
    assert report.counts() == {"zero area": 2}
    assert len(records[1].masks) == 1


def test_r30_a_mask_of_another_size_is_never_shifted_or_scaled(project: Project) -> None:
    larger = brush(np.ones((2 * H, 2 * W)), original_width=2 * W, original_height=2 * H)
    turned = brush(np.ones((W, H)), "r2", original_width=H, original_height=W)
    unsaid = {key: value for key, value in brush(disc(), "r3").items() if not key.startswith("original")}
    project.task(project.image(), [larger, turned, unsaid, brush(disc(), "r4")])
    records, report = project.read()
    assert report.counts() == {"size mismatch": 3}
    assert len(records[1].masks) == 1


def test_r30_annotators_who_disagree(project: Project) -> None:
    project.task(
        project.image(),
        [brush(disc(20, 20, 8), "agreed"), brush(disc(20, 45, 5), "only one saw it")],
        [brush(disc(20, 20.5, 8), "agreed"), brush(disc(32, 31, 4), "somewhere else")],
    )
    records, report = project.read()
    assert report.counts() == {"annotators disagree": 2, "second opinion": 1}
    assert len(records[1].masks) == 2
    with pytest.raises(ExportError, match="2 x annotators disagree"):
        project.read(strict=True)


@pytest.mark.parametrize("mark", [{"updated_at": "2026-11-24T00:00:00Z"}, {"ground_truth": True}])
def test_the_ground_truth_or_the_latest_annotation_counts(project: Project, mark: dict[str, Any]) -> None:
    task = project.task(project.image(), [brush(disc())], [brush(disc(10, 10, 5), label="Right")])
    for annotation in task["annotations"]:
        annotation["updated_at"] = "2026-11-23T00:00:00Z"
    task["annotations"][1] |= mark
    assert [mask.label for mask in project.read()[0][1].masks] == ["Right"]


def test_r30_cancelled_annotations(project: Project) -> None:
    project.task(project.image(), [brush(disc())], was_cancelled=True)
    records, report = project.read()
    assert report.counts() == {"cancelled annotation": 1}
    assert len(records) == 1


def test_r30_duplicates(project: Project) -> None:
    other = brush(disc(12, 12, 5), "r1")
    project.task(project.image(), [brush(disc(), "r1"), brush(disc(), "r2"), other])
    records, report = project.read()
    assert report.counts() == {"duplicate mask": 2}  # r2 = r1, and a second shape under the id r1
    assert [mask.area for mask in records[1].masks] == [disc().sum()]


def test_r30_one_image_under_two_names(project: Project) -> None:
    project.task(project.image("a.png", seed=5), [brush(disc())])
    project.task(project.image("b.bmp", seed=5), [brush(disc()), brush(disc(8, 8, 5), "r2")])
    records, report = project.read()
    assert report.counts() == {"same image twice": 1, "duplicate mask": 1}
    assert [len(record.masks) for record in records] == [1, 2]


def test_r30_labels_spelt_in_several_ways(project: Project) -> None:
    project.task(project.image(), [brush(disc(), label=" cup")])
    report = project.read()[1]
    assert report.counts() == {"label spelt in several ways": 1}


@pytest.mark.parametrize(
    "entries",
    [["text"], [None], [brush(disc()) | {"value": None}], [brush(disc()) | {"value": [1]}]],
    ids=["text", "null", "no value", "a list"],
)
def test_r30_broken_entries(project: Project, entries: list[Any]) -> None:
    project.task(project.image(), [*entries, brush(disc(), "good")])
    records, report = project.read()
    assert report.counts() == {"broken entry": 1}
    assert len(records[1].masks) == 1


def test_r30_broken_tasks(project: Project) -> None:
    project.tasks += [7, {"id": 3}, {"id": 4, "data": [], "annotations": []}]
    project.tasks.append({"id": 5, "data": {"image": "good.png"}, "annotations": {"id": 1}})
    project.tasks.append({"id": 6, "data": {"image": "good.png"}, "annotations": [{"id": 1, "result": None}, 5]})
    assert project.read()[1].counts() == {"broken entry": 5}


def test_odd_values_never_raise(project: Project) -> None:
    for odd in (None, 3, "x", [], {}, [[]], True):
        for key in ("id", "type", "to_name", "original_width", "image_rotation", "item_index"):
            project.task("good.png", [brush(disc()) | {key: odd}])
        project.task("good.png", [brush(disc()) | {"value": {"format": "rle", "rle": odd, "brushlabels": odd}}])
    records, _ = project.read()
    assert len(records) == 1


def test_unsupported_shapes_and_other_regions_are_told_apart(project: Project) -> None:
    vector = shape("vector", "r1", vertices=[])
    click = shape("keypoint", "r2", x=3, y=4, width=1)
    choice = {"id": "r3", "type": "choices", "value": {"choices": ["good"]}}
    relation = {"type": "relation", "from_id": "r1", "to_id": "r2"}
    turned = brush(disc(), "r4", image_rotation=90)
    project.task(project.image(), [vector, click, choice, relation, turned])
    report = project.read()[1]
    assert report.counts() == {"not a mask": 3, "unsupported shape": 2, "no masks": 1}
    assert len(report.defects) == 2


def test_a_shape_over_the_border_is_cut_and_mentioned(project: Project) -> None:
    project.task(project.image(), [shape("rectangle", x=-5, y=0, width=50, height=100)])
    records, report = project.read(strict=True)
    assert records[1].masks[0].area == H * 27
    assert report.counts() == {"cut at the border": 1}


def test_lines_are_single_printable_lines(project: Project) -> None:
    project.task(project.image(), [brush(np.zeros((H, W)), "a\n\x1b[31m" + "b" * 500)])
    (finding,) = [f for f in project.read()[1].findings if f.kind == "zero area"]
    assert str(finding).isprintable()
    assert len(str(finding)) < 200


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "not a list"),
        ('[{"id": 1, "image": "a.png"}]', "JSON_MIN"),
        ("[]", "it is empty"),
        ('[{"id": 1, "data": {"image": "gone.png"}, "annotations": [{"result": []}]}]', "1 x missing image"),
    ],
)
def test_what_is_not_a_usable_export_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(ExportError, match=says):
        read_label_studio(tmp_path / "export.json", tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Cannot read the export"):
        read_label_studio(tmp_path / "gone.json", tmp_path)
    with pytest.raises(ExportError, match="not a folder"):
        read_label_studio(RECORDED, tmp_path / "gone")


# -- where the image is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "/data/upload/7/0123abcd-photo 1.png",
        "/data/upload/7/0123abcd-photo%201.png",
        "https://host/data/local-files/?d=some/where/photo%201.png",
        "/data/local-files/?d=photo 1.png",
        "s3://bucket/some/where/photo 1.png",
        "https://host/photo%201.png?X-Amz-Signature=abc",
        r"C:\photos\photo 1.png",
        "photo 1.png",
    ],
)
def test_forms_of_image_references(tmp_path: Path, reference: str) -> None:
    (tmp_path / "photo 1.png").touch()
    assert find_image(reference, tmp_path) == tmp_path / "photo 1.png"


def test_the_longest_path_wins(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    for name in ("cats/1.png", "1.png", "0123abcd-1.png"):
        (tmp_path / name).touch()
    assert find_image("s3://bucket/cats/1.png", tmp_path) == tmp_path / "cats/1.png"
    assert find_image("s3://bucket/dogs/1.png", tmp_path) == tmp_path / "1.png"
    assert find_image("/data/upload/1/0123abcd-1.png", tmp_path) == tmp_path / "0123abcd-1.png"


@pytest.mark.parametrize(
    "reference",
    [
        "../secret.png",
        "/data/local-files/?d=../secret.png",
        "a/%2e%2e/%2e%2e/secret.png",
        "..\\secret.png",
        "",
        "/",
        "\0",
        "x" * 5000,
        "http://[",
        "\ud800.png",
        "photos",
    ],
)
def test_r38_no_reference_leaves_the_folder(tmp_path: Path, reference: str) -> None:
    (tmp_path / "secret.png").touch()
    (tmp_path / "images" / "photos").mkdir(parents=True)
    assert find_image(reference, tmp_path / "images") is None


def test_pages_and_several_image_keys(project: Project) -> None:
    first, second = project.image("p1.png", seed=3), project.image("p2.png", seed=4)
    pages = project.task("x", [brush(disc(), item_index=0), brush(disc(8, 8, 5), "r2", item_index=1)])
    pages["data"] = {"image": [first, second]}
    left, right = project.image("left.png", seed=5), project.image("right.png", seed=6)
    pair = project.task("x", [brush(disc(), to_name="right")])
    pair["data"] = {"left": left, "right": right}
    records, report = project.read()
    assert [record.path.name for record in records] == ["good.png", "p1.png", "p2.png", "right.png"]
    assert [len(record.masks) for record in records] == [1, 1, 1, 1]
    assert report.findings == []


# -- splitting -------------------------------------------------------------------------------------------------------


def test_r30_no_image_is_on_both_sides_and_sides_are_kept(tmp_path: Path) -> None:
    project = Project(tmp_path)
    for seed in range(20):
        project.task(project.image(f"{seed}.png", seed=seed), [brush(disc())])
    few, _ = project.read()
    for seed in range(20, 40):
        project.task(project.image(f"{seed}.png", seed=seed % 30), [brush(disc(8, 8, 5))])  # 10 are old pictures
    many, _ = project.read()
    train, held = split_by_content(few)
    train_later, held_later = split_by_content(many)
    assert len(train) + len(held) == 20
    assert len(train_later) + len(held_later) == 30
    assert not {r.key for r in train_later} & {r.key for r in held_later}
    assert {r.key for r in held} <= {r.key for r in held_later}
    assert {r.key for r in train} <= {r.key for r in train_later}


def test_two_images_are_enough_and_one_is_not(project: Project) -> None:
    with pytest.raises(ExportError, match="Annotate a few more"):
        split_by_content(project.read()[0])
    project.task(project.image(), [brush(disc())])
    train, held = split_by_content(project.read()[0])
    assert len(train) == len(held) == 1


def test_the_same_picture_in_two_records_stays_together(project: Project) -> None:
    project.task(project.image(), [brush(disc())])
    records, _ = project.read()
    train, held = split_by_content([*records, *records])
    assert len(train) == len(held) == 2
    assert not {r.key for r in train} & {r.key for r in held}
