"""Exports of annotation platforms, read as they are: photos with object masks, and a report of everything amiss.

Pure readers: files in, `Record`s and a `Report` out; nothing is written, fetched or trained here. Nothing is left out
silently: each thing that cannot be used, or was judged, is a line of the report under one of `KINDS`.

Label Studio (`read_label_studio`): the JSON export (not JSON_MIN), coordinates in percent of the upright image.
A region that was accepted from a suggestion stands twice under one id, as a mask and under the tag of the click; the
mask counts, once. Where several people annotated a task, the ground truth counts, else what was updated last.

CVAT's formats are in cvat_exports.py.
"""

from __future__ import annotations

import base64
import binascii
import collections
import dataclasses
import hashlib
import json
import math
import re
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from inter2former import brush_rle
from inter2former.errors import ImageError, Inter2FormerError, PromptError
from inter2former.images import decode_image, image_key

Mask = npt.NDArray[np.bool_]
Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

SAME_IOU = 0.95  # two masks this close on one image are one object given twice
AGREE_IOU = 0.75  # two people outline one object this closely or better when they mean the same thing
MAX_POINTS = 20_000  # of a polygon; an outline with a point on every pixel of a large photo has fewer
# What reading a file, perhaps out of a zip, may raise; a zip with a password is a RuntimeError.
BROKEN_FILE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)

# What the report counts. True: a defect of the export, at which a strict reading stops; False: worth knowing.
KINDS = {
    "broken entry": True,  # not of the shape that the platform writes
    "missing image": True,
    "broken image": True,
    "same image twice": True,
    "cancelled annotation": True,
    "size mismatch": True,  # the mask belongs to an image of another size
    "broken mask": True,  # run lengths, points or numbers that cannot be a mask
    "zero area": True,
    "duplicate mask": True,
    "annotators disagree": True,
    "label spelt in several ways": True,
    "unsupported shape": True,
    "cut at the border": False,
    "second opinion": False,  # another annotator's mask that agrees; one of the two is used
    "not a mask": False,  # key points, choices, relations
    "no masks": False,  # an image without any object
}


class ExportError(Inter2FormerError):
    """The export cannot be used: not an export, nothing in it, or defects under a strict reading."""

    code = "export"


@dataclasses.dataclass(frozen=True)
class ObjectMask:
    """One object of an image, kept as the packed bits of its bounding box: an export holds thousands."""

    label: str
    where: str  # "task 1, annotation 10, region abc"
    size_hw: tuple[int, int]
    box: tuple[int, int, int, int]  # top, left, bottom, right; half-open
    area: int
    bits: bytes

    @classmethod
    def of(cls, mask: Mask, label: str, where: str) -> ObjectMask:
        """From bool [H, W] with at least one pixel set."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
        crop = mask[top:bottom, left:right]
        height, width = mask.shape
        bits = np.packbits(crop).tobytes()
        return cls(label, where, (height, width), (top, left, bottom, right), int(crop.sum()), bits)

    def pixels(self) -> Mask:
        """bool [H, W]"""
        top, left, bottom, right = self.box
        mask = np.zeros(self.size_hw, dtype=bool)
        mask[top:bottom, left:right] = self._crop()
        return mask

    def _crop(self) -> Mask:
        top, left, bottom, right = self.box
        n_pixels = (bottom - top) * (right - left)
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=n_pixels).astype(bool).reshape(bottom - top, -1)

    def iou(self, other: ObjectMask) -> float:
        """Intersection over union with another mask of the same image."""
        top, left = np.maximum(self.box[:2], other.box[:2])
        bottom, right = np.minimum(self.box[2:], other.box[2:])
        if top >= bottom or left >= right:
            return 0.0
        mine, theirs = (
            m._crop()[top - m.box[0] : bottom - m.box[0], left - m.box[1] : right - m.box[1]] for m in (self, other)
        )
        shared = int((mine & theirs).sum())
        return shared / (self.area + other.area - shared)


@dataclasses.dataclass(frozen=True)
class Record:
    """One image with its objects. `key` is the digest of the upright pixels: equal pictures have equal keys."""

    path: Path | zipfile.Path
    key: str
    size_hw: tuple[int, int]
    masks: tuple[ObjectMask, ...]

    def image(self) -> Image:
        """uint8 [H, W, 3] RGB, read again from the file: an export may be larger than the memory."""
        return decode_image(self.path.read_bytes())


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    kind: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.text}"


class Report:
    """Everything found, in the order of reading."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, kind: str, where: str, text: str) -> None:
        if kind not in KINDS:
            raise KeyError(kind)
        self.findings.append(Finding(kind, where, text))

    def counts(self) -> dict[str, int]:
        """Findings by kind, most frequent first."""
        return dict(collections.Counter(finding.kind for finding in self.findings).most_common())

    @property
    def defects(self) -> list[Finding]:
        return [finding for finding in self.findings if KINDS[finding.kind]]

    def raise_for_defects(self) -> None:
        """ExportError when there is any defect."""
        if self.defects:
            counts = collections.Counter(finding.kind for finding in self.defects)
            raise ExportError(
                f"The export has {len(self.defects)} defects: "
                + ", ".join(f"{n} x {kind}" for kind, n in counts.most_common())
                + f". First: {self.defects[0]}.",
                "Repair them, or read without strict: the rest is usable.",
            )


# -- Label Studio ----------------------------------------------------------------------------------------------------

_SHAPES = ("brush", "bitmask", "polygon", "rectangle", "ellipse")  # control tags whose regions are masks
_TYPES = {f"{shape}{suffix}": shape for shape in _SHAPES for suffix in ("labels", "")}
_OTHER_SHAPES = ("vector", "magicwand", "cube", "video")  # regions with an area that is not read here
_UPLOAD_HASH = re.compile(r"^[0-9a-f]{8}-")  # what the platform puts before the name of an uploaded file
_BEYOND = 10.0  # percent; the page lets a shape hang over the border a little, more is not a percentage


class BrokenMask(Exception):
    """A region that is not a mask; the text says why."""


def read_label_studio(export: str | Path, images: str | Path, *, strict: bool = False) -> tuple[list[Record], Report]:
    """Records of a Label Studio JSON export, one an image, in the order of the export.

    images   folder with the photos; names as in the tasks, with or without the folders and the upload hash before it
    strict   any defect raises, after everything was read
    raises   ExportError: unreadable, not such an export, no usable image, or (strict) defects
    """
    tasks, folder, report = _read_tasks(Path(export)), Path(images), Report()
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder.", "Give the folder with the photos of the export.")

    def found() -> Iterator[tuple[str, Record]]:
        for number, task in enumerate(tasks, start=1):
            where = f"task {short(task.get('id'))}" if isinstance(task, dict) else f"entry {number}"
            for record in _read_task(task, where, folder, report):
                yield where, record

    return collect(found(), report, str(export), strict=strict), report


def collect(found: Iterable[tuple[str, Record]], report: Report, export: str, *, strict: bool) -> list[Record]:
    """One record a picture: equal pictures are joined, and what is amiss with all of them goes into the report.

    found    (where, record) in the order of the export
    raises   ExportError when nothing can be used, or (strict) for any defect
    """
    read: dict[str, Record] = {}
    for where, record in found:
        first = read.get(record.key)
        if first is None:
            read[record.key] = record
        else:
            report.add("same image twice", where, f"{record.path.name} shows the same as {first.path.name}; joined")
            joined = without_duplicates([*first.masks, *record.masks], report)
            read[record.key] = dataclasses.replace(first, masks=joined)
    records = list(read.values())
    for record in records:
        if not record.masks:
            report.add("no masks", record.path.name, "the image has no usable object")
    _check_labels(records, report)
    if strict:
        report.raise_for_defects()
    if not any(record.masks for record in records):
        kinds = ", ".join(f"{n} x {kind}" for kind, n in report.counts().items()) or "it is empty"
        raise ExportError(f"Nothing in {export} can be used: {kinds}.", *(map(str, report.findings[:1])))
    return records


def _read_tasks(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ExportError(f"Cannot read the export {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not JSON.") from error
    if isinstance(content, dict):  # an answer of the API kept with a note about where it comes from
        content = content.get("export")
    if not isinstance(content, list):
        raise ExportError(f"{path} is not a list of tasks.", "Export from Label Studio as JSON.")
    if content and not any(isinstance(task, dict) and "annotations" in task for task in content):
        raise ExportError(f"No task of {path} has annotations.", "Export as JSON, not as JSON_MIN or another format.")
    return content


def _read_task(task: Any, where: str, folder: Path, report: Report) -> Iterator[Record]:
    """Records of one task: one an image, so one unless the task shows several."""
    if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
        report.add("broken entry", where, "not a task with data")
        return
    chosen: list[tuple[str, list[dict[str, Any]]]] = []  # annotations that count, the preferred one first
    annotations = task.get("annotations")
    for annotation in sorted(
        (a for a in annotations if _is_annotation(a)) if isinstance(annotations, list) else (),
        key=lambda a: (bool(a.get("ground_truth")), str(a.get("updated_at") or "")),
        reverse=True,
    ):
        place = f"{where}, annotation {short(annotation.get('id'))}"
        if annotation.get("was_cancelled"):
            report.add("cancelled annotation", place, f"{len(annotation['result'])} entries left out")
        else:
            chosen.append((place, annotation["result"]))
    n_broken = len(annotations) - sum(map(_is_annotation, annotations)) if isinstance(annotations, list) else 1
    if n_broken:
        report.add("broken entry", where, f"{n_broken} annotations are not lists of regions")
    if not chosen:
        return

    images: dict[Path, tuple[str, tuple[int, int]] | None] = {}
    masks: dict[Path, list[list[ObjectMask]]] = {}
    missing: collections.Counter[str] = collections.Counter()
    for nth, (place, result) in enumerate(chosen):
        for region in _regions(result, place, report):
            path = _image_of(task, region.entry, folder)
            if path is None:
                missing[_reference(task, region.entry)] += 1
                continue
            if path not in images:
                images[path] = look(path, region.where, report)
            if (found := images[path]) is not None and (mask := _to_mask(region, found[1], report)) is not None:
                masks.setdefault(path, [[] for _ in chosen])[nth].append(mask)
    if not images and not missing:  # no region tells the image
        if (path := _image_of(task, {}, folder)) is None:
            missing[_reference(task, {})] = 0
        else:
            images[path] = look(path, where, report)
    for name, n_regions in missing.items():
        report.add("missing image", where, f"{name} is not in the folder; {n_regions} regions left out")
    for path, found in images.items():
        if found is not None:
            opinions = [without_duplicates(opinion, report) for opinion in masks.get(path, [[]])]
            yield Record(path, *found, masks=_judge(opinions, report))


def _is_annotation(annotation: Any) -> bool:
    return isinstance(annotation, dict) and isinstance(annotation.get("result"), list)


def look(path: Path | zipfile.Path, where: str, report: Report) -> tuple[str, tuple[int, int]] | None:
    """Content key and (height, width) of an image."""
    try:
        rgb = decode_image(path.read_bytes())
    except BROKEN_FILE as error:
        report.add("broken image", where, f"{path.name}: {getattr(error, 'strerror', None) or type(error).__name__}")
    except ImageError as error:
        report.add("broken image", where, f"{path.name}: {error}")
    else:
        return image_key(rgb), (rgb.shape[0], rgb.shape[1])
    return None


def _references(task: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """What the task's data say about where the image of this entry is, likeliest first.

    The export does not hold the labeling configuration, so the data key is found by its name and by its content.
    """
    data = task["data"]
    keys = [key for key in (entry.get("to_name"), "image") if isinstance(key, str) and key in data]
    found: list[str] = []
    for key in [*keys, *(key for key in data if key not in keys)]:
        value = data[key]
        if isinstance(value, list):  # a task with pages
            page = entry.get("item_index", 0)
            value = value[page] if isinstance(page, int) and 0 <= page < len(value) else None
        if isinstance(value, str):
            found.append(value)
    if isinstance(task.get("file_upload"), str):
        found.append(task["file_upload"])
    return found


def _reference(task: dict[str, Any], entry: dict[str, Any]) -> str:
    """The image's name for a line of the report: never the whole URL, which may hold a signature."""
    parts = [_parts(reference) for reference in _references(task, entry)]
    return short(next((names[0][-1] for names in parts if names), "the image"), 80)


def _image_of(task: dict[str, Any], entry: dict[str, Any], folder: Path) -> Path | None:
    return next((path for r in _references(task, entry) if (path := find_image(r, folder)) is not None), None)


def find_image(reference: str, folder: Path) -> Path | None:
    """The file in `folder` that a task's URL or path names; None when there is none. Never a file outside the folder.

    Tried: the path below each of its folders (a/b/c.jpg, b/c.jpg, c.jpg), then the name without the upload hash.
    """
    for parts in _parts(reference):
        tails = ["/".join(parts[start:]) for start in range(len(parts))]
        for tail in [*tails, _UPLOAD_HASH.sub("", parts[-1])]:
            try:
                if (folder / tail).is_file():
                    return folder / tail
            except OSError:  # a name that is too long for the file system
                continue
    return None


def _parts(reference: str) -> list[list[str]]:
    """Folders and name in a URL or path, as a URL is read and as it stands; nothing that leads out of a folder."""
    texts = []
    try:
        url = urllib.parse.urlsplit(reference)
        local = urllib.parse.parse_qs(url.query).get("d")  # /data/local-files/?d=a/b.jpg
        texts.append(local[0] if local else urllib.parse.unquote(url.path))
    except ValueError:
        pass
    texts.append(reference.partition("://")[2] or reference)
    found = ([part for part in re.split(r"[/\\]", text) if part not in ("", ".")] for text in texts)
    return [parts for parts in found if parts and ".." not in parts and not any("\0" in part for part in parts)]


@dataclasses.dataclass(frozen=True)
class _Region:
    entry: dict[str, Any]
    shape: str
    label: str
    where: str


def _regions(result: Sequence[Any], place: str, report: Report) -> Iterator[_Region]:
    """The regions of one annotation that should be masks, one for each id."""
    by_id: dict[object, list[dict[str, Any]]] = {}
    for number, entry in enumerate(result):
        if not isinstance(entry, dict):
            report.add("broken entry", place, f"entry {number} is not a region")
            continue
        name = entry.get("id")
        by_id.setdefault(name if isinstance(name, str) else number, []).append(entry)
    for name, entries in by_id.items():
        where = f"{place}, region {short(name)}"
        shaped = [e for e in entries if isinstance(e.get("type"), str) and e["type"] in _TYPES]
        if not shaped:
            types = sorted({short(e.get("type")) for e in entries})
            other = any(kind.startswith(_OTHER_SHAPES) for kind in types)
            report.add("unsupported shape" if other else "not a mask", where, ", ".join(types))
            continue
        entry = min(shaped, key=lambda e: _SHAPES.index(_TYPES[e["type"]]))
        if not isinstance(entry.get("value"), dict):
            report.add("broken entry", where, "the region has no value")
            continue
        same = [e for e in shaped if e["type"] == entry["type"]]
        if any(e.get("value") != entry["value"] for e in same):
            report.add("duplicate mask", where, f"{len(same)} different regions share the id; the first is used")
        labels = [label for e in (entry, *entries) if (label := _label(e))]
        yield _Region(entry, _TYPES[entry["type"]], labels[0] if labels else "", where)


def _label(entry: dict[str, Any]) -> str:
    value, kind = entry.get("value"), entry.get("type")
    if not isinstance(value, dict) or not isinstance(kind, str):
        return ""
    labels = value.get(kind) or value.get("labels")
    return labels[0] if isinstance(labels, list) and labels and isinstance(labels[0], str) else ""


def _to_mask(region: _Region, size_hw: tuple[int, int], report: Report) -> ObjectMask | None:
    """The region on an image of this size; None and a line when it cannot be used."""
    entry, (height, width) = region.entry, size_hw
    said = entry.get("original_height"), entry.get("original_width")
    if said != size_hw:
        text = f"drawn on {short(said[1])} x {short(said[0])} pixels, the image has {width} x {height}"
        report.add("size mismatch", region.where, text)
        return None
    if entry.get("image_rotation"):  # the page turns the image; how it then writes masks is not known to us
        report.add("unsupported shape", region.where, "drawn on an image that was turned on the page")
        return None
    try:
        mask, cut = _draw(region.shape, entry["value"], height, width)
    except (BrokenMask, PromptError) as error:
        report.add("broken mask", region.where, str(error))
        return None
    if cut:
        report.add("cut at the border", region.where, f"the {region.shape} reaches outside the image")
    if not mask.any():
        report.add("zero area", region.where, f"the {region.shape} covers no pixel")
        return None
    return ObjectMask.of(mask, region.label, region.where)


def _draw(shape: str, value: dict[str, Any], height: int, width: int) -> tuple[Mask, bool]:
    """bool [H, W] and whether a part lies outside the image."""
    if shape == "brush":
        if value.get("format") != "rle":
            raise BrokenMask(f"the brush format is {short(value.get('format'))}, not rle")
        return brush_rle.decode(value.get("rle"), height, width), False  # type: ignore[arg-type]
    if shape == "bitmask":
        return _draw_bitmask(value.get("imageDataURL"), height, width), False
    if shape == "ellipse":
        x, y, radius_x, radius_y = _numbers(value, "x", "y", "radiusX", "radiusY")
        turn = math.radians(_number(value.get("rotation") or 0, "rotation"))
        angles = np.linspace(0, 2 * np.pi, 257)[:-1]
        along, across = radius_x * width / 100 * np.cos(angles), radius_y * height / 100 * np.sin(angles)
        points = turned(along, across, turn, x * width / 100, y * height / 100)
    elif shape == "rectangle":
        x, y, w, h = _numbers(value, "x", "y", "width", "height")
        turn = math.radians(_number(value.get("rotation") or 0, "rotation"))  # clockwise about the first corner
        along, across = np.array([0, w, w, 0]) * width / 100, np.array([0, 0, h, h]) * height / 100
        points = turned(along, across, turn, x * width / 100, y * height / 100)
    else:
        given = value.get("points")
        if not isinstance(given, list) or not all(isinstance(p, list) and len(p) == 2 for p in given):
            raise BrokenMask("the points are not pairs of numbers")
        if len(given) < 3:
            raise BrokenMask(f"a polygon of {len(given)} points")
        if len(given) > MAX_POINTS:
            raise BrokenMask(f"a polygon of {len(given)} points; {MAX_POINTS} are read")
        if value.get("closed") is False:
            raise BrokenMask("the polygon was never closed")
        percent = np.array([[_number(x, "x"), _number(y, "y")] for x, y in given])
        points = percent * (width / 100, height / 100)
    room = np.array([width, height]) * _BEYOND / 100
    if (points < -room).any() or (points > np.array([width, height]) + room).any():
        raise BrokenMask(f"the {shape} lies far outside the image")
    cut = bool((points < -0.5).any() or (points > np.array([width, height]) + 0.5).any())
    return fill(points, height, width), cut


def turned(along: Floats, across: Floats, turn: float, x: float, y: float) -> Floats:
    """Points [n, 2] (x, y) in pixels from coordinates along axes that are turned about (x, y)."""
    cos, sin = math.cos(turn), math.sin(turn)
    return np.stack([x + along * cos - across * sin, y + along * sin + across * cos], axis=1)


def fill(points: Floats, height: int, width: int) -> Mask:
    """Pixels whose centre lies inside the polygon, points [n, 2] (x, y); even-odd, row by row.

    OpenCV and Pillow also paint the outline, half a pixel too much on each side: a lot for a thin object.
    """
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    rows = np.arange(height) + 0.5
    mask = np.zeros((height, width + 1), dtype=np.int32)
    for ax, ay, bx, by in zip(x0, y0, x1, y1, strict=True):  # each edge flips everything to its right
        low, high = min(ay, by), max(ay, by)
        first, last = np.searchsorted(rows, (low, high))
        crossed = ax + (rows[first:last] - ay) * ((bx - ax) / (by - ay)) if last > first else rows[:0]
        column = np.clip(np.ceil(crossed - 0.5), 0, width).astype(np.intp)
        np.add.at(mask, (np.arange(first, last), column), 1)
    return np.asarray(np.cumsum(mask, axis=1)[:, :width] % 2 == 1)


def _draw_bitmask(url: Any, height: int, width: int) -> Mask:
    head = "data:image/png;base64,"
    if not isinstance(url, str) or not url.startswith(head):
        raise BrokenMask("the bitmask is not a PNG data URL")
    try:
        data = base64.b64decode(url[len(head) :], validate=True)
        if (shape := decode_image(data).shape[:2]) != (height, width):
            raise BrokenMask(f"the bitmask has {shape[1]} x {shape[0]} pixels")
    except (binascii.Error, ImageError) as error:
        raise BrokenMask(f"the bitmask is broken: {error}") from error
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.ndim != 3 or image.shape != (height, width, 4):
        raise BrokenMask("the bitmask has no alpha channel")
    return np.asarray(image[..., 3] > 0)


def _number(value: Any, name: str) -> float:
    # The comparison also refuses NaN, and whole numbers that are too long for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 < value < 1e9:
        raise BrokenMask(f"{name} is {short(value)}, not a number of percent or degrees")
    return float(value)


def _numbers(value: dict[str, Any], *names: str) -> list[float]:
    return [_number(value.get(name), name) for name in names]


def without_duplicates(masks: Iterable[ObjectMask], report: Report) -> tuple[ObjectMask, ...]:
    kept: list[ObjectMask] = []
    for mask in masks:
        close = (k for k in kept if min(k.area, mask.area) >= SAME_IOU * max(k.area, mask.area))
        if twin := next((k for k in close if k.iou(mask) >= SAME_IOU), None):
            report.add("duplicate mask", mask.where, f"the same as {twin.where}")
        else:
            kept.append(mask)
    return tuple(kept)


def _judge(opinions: Sequence[tuple[ObjectMask, ...]], report: Report) -> tuple[ObjectMask, ...]:
    """The masks of the first opinion; what the others have to say goes into the report."""
    used, *others = opinions
    for other in others:
        for mask in other:
            best = max((mask.iou(mine) for mine in used), default=0.0)
            if best >= AGREE_IOU:
                report.add("second opinion", mask.where, f"agrees with the mask that is used (IoU {best:.2f})")
            else:
                report.add("annotators disagree", mask.where, f"best IoU with the annotation in use is {best:.2f}")
        for mine in used:
            if not any(mine.iou(mask) > 0 for mask in other):
                report.add("annotators disagree", mine.where, "another annotator has no such object; it is used")
    return used


def _check_labels(records: Iterable[Record], report: Report) -> None:
    counts = collections.Counter(mask.label for record in records for mask in record.masks)
    spellings: dict[str, list[str]] = {}
    for label, _ in counts.most_common():
        spellings.setdefault(label.strip().casefold(), []).append(label)
    for first, *others in spellings.values():
        for other in others:
            text = f"{counts[other]} masks, perhaps the same as {short(first)} ({counts[first]} masks)"
            report.add("label spelt in several ways", f"label {short(other)}", text)


def short(value: object, limit: int = 40) -> str:
    """A value from a file for a line of text: printable and short."""
    text = value if isinstance(value, str) else ascii(value)
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


# -- splitting -------------------------------------------------------------------------------------------------------


def split_by_content(records: Sequence[Record], share: float = 0.2) -> tuple[list[Record], list[Record]]:
    """(to train on, held back): by a digest of the pixels, so no picture is in both under any name.

    An image keeps its side when others are added (but for the first few images, of which one must be on each side): a
    model tuned on an earlier export has not seen what is held back now. Images without objects are left out.

    raises   ExportError with fewer than two different images with objects
    """
    usable = [record for record in records if record.masks]
    keys = sorted({record.key for record in usable}, key=_place)
    if len(keys) < 2:
        raise ExportError(
            f"Too few different images with objects: {len(keys)}. Some are trained on, others are held back.",
            "Annotate a few more images.",
        )
    n_held = min(max(1, sum(_place(key) < share for key in keys)), len(keys) - 1)
    held = set(keys[:n_held])
    return [r for r in usable if r.key not in held], [r for r in usable if r.key in held]


def _place(key: str) -> float:
    """A number in [0, 1) that depends on the picture alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
