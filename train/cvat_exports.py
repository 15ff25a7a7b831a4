"""CVAT's exports, read as they are: the zip, or the same unpacked as a folder. Four formats, told apart by their files:

    CVAT for images 1.1     annotations.xml, images/             masks, polygons, boxes, ellipses, groups
    COCO 1.0                annotations/instances_*.json         masks, polygons, boxes
    Datumaro 1.0            annotations/*.json with "items"      masks, polygons, boxes, groups
    Segmentation mask 1.1   SegmentationClass/, SegmentationObject/, labelmap.txt

Masks come back pixel for pixel. Parts with one group number are one object. What is said in exports.py holds here
too: pure readers, and nothing is left out silently. Coordinates are pixels of the image; a pixel belongs to a polygon,
box or ellipse when its centre does.
"""

from __future__ import annotations

import collections
import json
import math
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from inter2former.errors import ImageError, PromptError
from inter2former.images import decode_image
from inter2former.masks import rle_decode
from train.exports import (
    BROKEN_FILE,
    MAX_POINTS,
    BrokenMask,
    ExportError,
    Mask,
    ObjectMask,
    Record,
    Report,
    collect,
    fill,
    look,
    short,
    turned,
    without_duplicates,
)

Place: TypeAlias = Path | zipfile.Path
Draw = Callable[[int, int], Mask]  # (height, width) -> bool [H, W]

MAX_FILE_BYTES = 256 * 2**20  # of one file in a zip, which may claim anything
IMAGE_FOLDERS = ("images", "JPEGImages")
_MASKLESS = {"polyline", "points", "tag", "label", "caption", "skeleton"}  # key points, lines and words
_BEYOND = 0.1  # of the image's sides; a shape may hang over the border a little


class Shape(NamedTuple):
    """One annotation of an image, not yet drawn."""

    kind: str
    label: str
    group: int  # 0: none
    draw: Draw | None  # None for a kind that is no mask here


class Item(NamedTuple):
    """One image of an export. size_hw is what the export says of it, None where it says nothing."""

    name: str
    paths: Sequence[str]  # where the image may be, likeliest first, without ending where the format keeps none
    size_hw: tuple[int, int] | None
    shapes: Sequence[Shape]


def read_cvat(
    export: str | Path, images: str | Path | None = None, *, strict: bool = False
) -> tuple[list[Record], Report]:
    """Records of a CVAT export, one an image, in its order.

    export   the zip or its unpacked folder
    images   folder with the photos, for an export without them
    strict   any defect raises, after everything was read
    raises   ExportError: unreadable, none of the formats, no usable image, or (strict) defects
    """
    root, report = _open(Path(export)), Report()
    folders = [root] if images is None else [Path(images), root]
    if images is not None and not Path(images).is_dir():
        raise ExportError(f"{images} is not a folder.", "Give the folder with the photos of the export.")
    files = _Files(folders)

    def found() -> Iterator[tuple[str, Record]]:
        for item in _items(root, report):
            where = f"image {short(item.name, 80)}"
            path = files.find(item.paths)
            if path is None:
                report.add("missing image", where, f"not in the export; {len(item.shapes)} shapes left out")
            elif (looked := look(path, where, report)) is not None:
                key, size_hw = looked
                yield where, Record(path, key, size_hw, _masks(item, size_hw, where, report))

    return collect(found(), report, str(export), strict=strict), report


def _open(path: Path) -> Place:
    if path.is_dir():
        return path
    try:
        return zipfile.Path(zipfile.ZipFile(path))
    except OSError as error:
        raise ExportError(f"Cannot read the export {path}: {error.strerror}.") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ExportError(f"{path} is not a zip.", "Give the zip as CVAT made it, or its unpacked folder.") from error


def _read(place: Place) -> bytes:
    if isinstance(place, zipfile.Path):
        size = place.root.getinfo(place.at).file_size
        if size > MAX_FILE_BYTES:
            raise ExportError(f"{place.name} has {size} bytes in the zip; {MAX_FILE_BYTES} are read.")
    try:
        return place.read_bytes()
    except BROKEN_FILE as error:
        raise ExportError(f"{place.name} in the export cannot be read ({type(error).__name__}).") from error


class _Files:
    """The files by their path, with and without ending and outermost folder."""

    def __init__(self, roots: Sequence[Place]) -> None:
        self._by_path: dict[str, Place] = {}
        for root in roots:
            for path, place in _walk(root):
                if isinstance(place, zipfile.Path) and place.root.getinfo(place.at).file_size > MAX_FILE_BYTES:
                    continue
                inner = path.partition("/")[2]  # where everything is in one folder
                for known_as in (path, path.rpartition(".")[0], inner, inner.rpartition(".")[0]):
                    self._by_path.setdefault(known_as, place)

    def find(self, paths: Iterable[str]) -> Place | None:
        return next((self._by_path[path] for path in paths if path in self._by_path), None)


def _walk(root: Place) -> Iterator[tuple[str, Place]]:
    """(path with slashes, file) of everything below a folder or in a zip; links are not followed."""
    if isinstance(root, zipfile.Path):
        for name in root.root.namelist():
            if not name.endswith("/"):
                yield name, zipfile.Path(root.root, name)
    else:
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix(), path


def _items(root: Place, report: Report) -> Iterator[Item]:
    """The images of whichever format this is."""
    names = sorted(path for path, _ in _walk(root))
    folder = "" if "annotations.xml" in names or "labelmap.txt" in names else _only_folder(names)
    tables = [n for n in names if n.startswith(f"{folder}annotations/") and n.endswith(".json")]
    if f"{folder}annotations.xml" in names:
        yield from _cvat_items(_read(root / f"{folder}annotations.xml"), report)
    elif tables:
        for name in tables:
            yield from _table_items(_json(root / name), name, report)
    elif any(n.startswith(f"{folder}SegmentationObject/") for n in names):
        yield from _painted_items(root / folder if folder else root, names, folder, report)
    else:
        raise ExportError(
            "This is none of CVAT's formats that hold masks.",
            "Export as CVAT for images 1.1, COCO 1.0, Datumaro 1.0 or Segmentation mask 1.1.",
        )


def _only_folder(names: Sequence[str]) -> str:
    """The one folder that everything is in, with a slash; people pack what they unpacked."""
    tops = {name.partition("/")[0] for name in names if "/" in name}
    inside = {"annotations", "images", "SegmentationObject", "SegmentationClass", "ImageSets", "JPEGImages"}
    return f"{tops.pop()}/" if len(tops) == 1 and not tops & inside else ""


def _json(place: Place) -> dict[str, Any]:
    try:
        table = json.loads(_read(place))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{place.name} is not JSON.") from error
    return table if isinstance(table, dict) else {}


def _image_paths(name: str, subset: str = "") -> list[str]:
    subsets = [f"{subset}/", ""] if subset else [""]
    return [f"{folder}{part}{name}" for folder in (*(f"{f}/" for f in IMAGE_FOLDERS), "") for part in subsets]


# -- CVAT for images 1.1 ----------------------------------------------------------------------------------------------


def _cvat_items(data: bytes, report: Report) -> Iterator[Item]:
    try:
        tree = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError) as error:
        raise ExportError(f"annotations.xml is not XML: {error}.") from error
    if tree.find("track") is not None:
        raise ExportError("This is CVAT for video.", "Export as CVAT for images 1.1: every frame then has its shapes.")
    for image in tree.iter("image"):
        name = image.get("name") or ""
        try:
            size = int(image.get("height") or ""), int(image.get("width") or "")
        except ValueError:
            report.add("broken entry", f"image {short(name, 80)}", "its width or height is not a number")
            continue
        shapes = [_cvat_shape(element) for element in image]
        yield Item(name, _image_paths(name, image.get("subset") or ""), size, shapes)


def _cvat_shape(element: ElementTree.Element) -> Shape:
    draws: dict[str, Callable[[ElementTree.Element, int, int], Mask]] = {
        "mask": _cvat_mask,
        "polygon": lambda e, h, w: _polygon(_cvat_points(e.get("points") or ""), h, w),
        "box": _cvat_box,
        "ellipse": _cvat_ellipse,
    }
    draw = draws.get(element.tag)
    group = element.get("group_id") or "0"
    return Shape(
        element.tag,
        element.get("label") or "",
        int(group) if group.isdecimal() and len(group) < 12 else 0,
        None if draw is None else lambda height, width: draw(element, height, width),
    )


def _cvat_mask(element: ElementTree.Element, height: int, width: int) -> Mask:
    left, top, w, h = (int(_number(element.get(name), name)) for name in ("left", "top", "width", "height"))
    try:
        runs = np.array((element.get("rle") or "").split(",")).astype(np.int64)
    except (ValueError, OverflowError):
        raise BrokenMask("the run lengths are not whole numbers") from None
    return paste_runs(runs, (left, top, w, h), height, width)


def paste_runs(runs: npt.NDArray[np.int64], box: tuple[int, int, int, int], height: int, width: int) -> Mask:
    """bool [height, width] of runs in row order inside the box (left, top, width, height), zeros first."""
    left, top, w, h = box
    if not (0 <= left <= left + w <= width and 0 <= top <= top + h <= height and w > 0 and h > 0):
        raise BrokenMask(f"its box {w} x {h} at ({left}, {top}) is not inside the image")
    if runs.size > w * h + 1 or runs.min() < 0 or runs.max() > w * h or int(runs.sum()) != w * h:
        raise BrokenMask(f"the run lengths do not fill the box of {w} x {h} pixels")
    mask = np.zeros((height, width), np.bool_)
    mask[top : top + h, left : left + w] = np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(h, w)
    return mask


def _cvat_points(text: str) -> list[float]:
    return [_number(number, "a coordinate") for pair in text.split(";") for number in pair.split(",")]


def _cvat_box(element: ElementTree.Element, height: int, width: int) -> Mask:
    x0, y0, x1, y1 = (_number(element.get(name), name) for name in ("xtl", "ytl", "xbr", "ybr"))
    return _box(x0, y0, x1, y1, _number(element.get("rotation") or "0", "rotation"), height, width)


def _cvat_ellipse(element: ElementTree.Element, height: int, width: int) -> Mask:
    cx, cy, rx, ry = (_number(element.get(name), name) for name in ("cx", "cy", "rx", "ry"))
    if rx <= 0 or ry <= 0:
        return np.zeros((height, width), np.bool_)
    turn = math.radians(_number(element.get("rotation") or "0", "rotation"))
    y, x = np.arange(height)[:, None] + 0.5 - cy, np.arange(width)[None] + 0.5 - cx
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    return np.asarray((along / rx) ** 2 + (across / ry) ** 2 <= 1)


# -- COCO 1.0 and Datumaro 1.0 ----------------------------------------------------------------------------------------


def _table_items(table: dict[str, Any], name: str, report: Report) -> Iterator[Item]:
    subset = name.rpartition("/")[2].removesuffix(".json")
    if isinstance(table.get("items"), list):
        yield from _datumaro_items(table, subset, report)
    elif isinstance(table.get("images"), list) and isinstance(table.get("annotations"), list):
        yield from _coco_items(table, subset.removeprefix("instances_"), report)
    else:
        report.add("broken entry", name, "neither a COCO nor a Datumaro table")


def _coco_items(table: dict[str, Any], subset: str, report: Report) -> Iterator[Item]:
    labels = {one["id"]: one.get("name") for one in _dicts(table.get("categories")) if isinstance(one.get("id"), int)}
    by_image: dict[Any, list[Shape]] = collections.defaultdict(list)
    for one in _dicts(table["annotations"]):
        if isinstance(one.get("image_id"), int | str):
            label = labels.get(one.get("category_id")) if isinstance(one.get("category_id"), int) else None
            by_image[one["image_id"]].append(_coco_shape(one, str(label or "")))
        else:
            report.add("broken entry", f"annotation {short(one.get('id'))}", "it names no image")
    for image in _dicts(table["images"]):
        name, key = image.get("file_name"), image.get("id")
        size = image.get("height"), image.get("width")
        if not isinstance(name, str) or not isinstance(key, int | str) or not all(isinstance(n, int) for n in size):
            report.add("broken entry", f"image {short(key)}", "without file name, id or size")
            continue
        yield Item(name, _image_paths(name, subset), (size[0], size[1]), by_image.pop(key, []))  # type: ignore[arg-type]
    for key, shapes in by_image.items():
        report.add("missing image", f"image id {short(key)}", f"not in the list; {len(shapes)} shapes left out")


def _coco_shape(one: dict[str, Any], label: str) -> Shape:
    """`iscrowd: 1` says that CVAT stored a mask, no crowd."""
    parts = one.get("segmentation")
    if isinstance(parts, dict):
        return Shape("mask", label, 0, lambda height, width: _coco_mask(parts, height, width))
    if isinstance(parts, list) and parts:
        return Shape("polygon", label, 0, lambda height, width: _union(parts, height, width))
    return Shape("box", label, 0, lambda height, width: _xywh(one, height, width))


def _datumaro_items(table: dict[str, Any], subset: str, report: Report) -> Iterator[Item]:
    categories = table.get("categories")
    listed = categories.get("label") if isinstance(categories, dict) else None
    labels = [one.get("name") for one in _dicts(listed.get("labels") if isinstance(listed, dict) else None)]
    for item in _dicts(table["items"]):
        known = item.get("image") if isinstance(item.get("image"), dict) else item.get("media")
        image: dict[str, Any] = known if isinstance(known, dict) else {}
        name = image.get("path") or item.get("id")
        if not isinstance(name, str):
            report.add("broken entry", f"item {short(item.get('id'))}", "it names no image")
            continue
        size, shapes = image.get("size"), []
        for one in _dicts(item.get("annotations")):
            number = one.get("label_id")
            known_label = isinstance(number, int) and 0 <= number < len(labels)
            shapes.append(_datumaro_shape(one, str(labels[number] or "") if known_label else ""))  # type: ignore[index]
        fits = isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size)
        yield Item(name, _image_paths(name, subset), (size[0], size[1]) if fits else None, shapes)  # type: ignore[index]


def _datumaro_shape(one: dict[str, Any], label: str) -> Shape:
    kind, group = str(one.get("type")), one.get("group")
    draws: dict[str, Draw] = {
        "mask": lambda height, width: _coco_mask(one.get("rle"), height, width),
        "polygon": lambda height, width: _polygon(one.get("points"), height, width),
        "bbox": lambda height, width: _xywh(one, height, width),
    }
    return Shape(kind, label, group if isinstance(group, int) else 0, draws.get(kind))


def _coco_mask(rle: Any, height: int, width: int) -> Mask:
    mask = rle_decode(rle, max_pixels=height * width)
    if mask.shape != (height, width):
        raise BrokenMask(f"the mask has {mask.shape[1]} x {mask.shape[0]} pixels, the image {width} x {height}")
    return mask


def _xywh(one: dict[str, Any], height: int, width: int) -> Mask:
    numbers, attributes = one.get("bbox"), one.get("attributes")
    if not isinstance(numbers, list) or len(numbers) != 4:
        raise BrokenMask("the box is not four numbers")
    x, y, w, h = (_number(number, "a side of the box") for number in numbers)
    rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
    return _box(x, y, x + w, y + h, _number(rotation or 0, "rotation"), height, width)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


# -- Segmentation mask 1.1 --------------------------------------------------------------------------------------------


def _painted_items(root: Place, names: Sequence[str], folder: str, report: Report) -> Iterator[Item]:
    """One colour of SegmentationObject is one object; SegmentationClass and labelmap.txt say of which label."""
    labels = _labelmap(_read(root / "labelmap.txt")) if f"{folder}labelmap.txt" in names else {}
    start = f"{folder}SegmentationObject/"
    for path in names:
        if not path.startswith(start) or not path.endswith(".png"):
            continue
        name = path.removeprefix(start).removesuffix(".png")
        try:
            objects = _colours(_read(root / "SegmentationObject" / f"{name}.png"))
            classes = objects
            if f"{folder}SegmentationClass/{name}.png" in names:
                classes = _colours(_read(root / "SegmentationClass" / f"{name}.png"))
            if classes.shape != objects.shape:
                raise BrokenMask("SegmentationClass and SegmentationObject differ in size")
        except (BrokenMask, ImageError) as error:
            report.add("broken mask", f"image {short(name, 80)}", str(error))
            continue
        shapes = []
        for colour in np.unique(objects[objects > 0]).tolist():
            inside = objects == colour
            label, _ = collections.Counter(classes[inside].tolist()).most_common(1)[0]
            shapes.append(Shape("mask", labels.get(label, ""), 0, lambda height, width, inside=inside: inside))  # type: ignore[misc]
        yield Item(name, _image_paths(name), (objects.shape[0], objects.shape[1]), shapes)


def _colours(png: bytes) -> npt.NDArray[np.int32]:
    """int32 [H, W]: red, green and blue as one number; 0 is the background."""
    rgb = decode_image(png).astype(np.int32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _labelmap(data: bytes) -> dict[int, str]:
    """Labels by colour, of lines name:r,g,b:parts:actions. Names may hold colons."""
    labels = {}
    for line in data.decode("utf-8", "replace").splitlines():
        parts = line.rsplit(":", 3)
        numbers = parts[1].split(",") if len(parts) == 4 else []
        if not line.startswith("#") and len(numbers) == 3 and all(number.strip().isdecimal() for number in numbers):
            red, green, blue = (int(number) for number in numbers)
            labels[red << 16 | green << 8 | blue] = parts[0]
    return labels


# -- drawing ----------------------------------------------------------------------------------------------------------


def _masks(item: Item, size_hw: tuple[int, int], where: str, report: Report) -> tuple[ObjectMask, ...]:
    """The objects of one image: its shapes drawn, parts of a group joined."""
    if item.size_hw is not None and item.size_hw != size_hw:
        said = f"{item.size_hw[1]} x {item.size_hw[0]}"
        text = f"drawn on {said} pixels, the image has {size_hw[1]} x {size_hw[0]}; {len(item.shapes)} shapes left out"
        report.add("size mismatch", where, text)
        return ()
    drawn: dict[object, list[tuple[Mask, str, str]]] = collections.defaultdict(list)
    for number, shape in enumerate(item.shapes, start=1):
        place = f"{where}, {short(shape.kind)} {number}"
        if shape.draw is None:
            report.add("not a mask" if shape.kind in _MASKLESS else "unsupported shape", place, short(shape.kind))
            continue
        try:
            mask = shape.draw(*size_hw)
        except (BrokenMask, PromptError) as error:
            report.add("broken mask", place, str(error))
            continue
        if mask.any():
            drawn[("group", shape.group) if shape.group else number].append((mask, shape.label, place))
        else:
            report.add("zero area", place, "it covers no pixel")
    objects = []
    for parts in drawn.values():
        whole = np.logical_or.reduce([mask for mask, _, _ in parts])
        objects.append(ObjectMask.of(whole, parts[0][1], parts[0][2]))
    return without_duplicates(objects, report)


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise BrokenMask(f"{name} is {short(value)}, not a number") from None
    if not -1e9 < number < 1e9:
        raise BrokenMask(f"{name} is {short(value)}, not a number of pixels or degrees")
    return number


def _box(x0: float, y0: float, x1: float, y1: float, rotation: float, height: int, width: int) -> Mask:
    """Turned by `rotation` degrees about its centre, clockwise on the screen."""
    along, across = np.array([-1, 1, 1, -1]) * (x1 - x0) / 2, np.array([-1, -1, 1, 1]) * (y1 - y0) / 2
    return _filled(turned(along, across, math.radians(rotation), (x0 + x1) / 2, (y0 + y1) / 2), height, width)


def _polygon(flat: Any, height: int, width: int) -> Mask:
    if not isinstance(flat, list) or len(flat) < 6 or len(flat) % 2:
        raise BrokenMask("a polygon needs three points of two numbers at least")
    if len(flat) > 2 * MAX_POINTS:
        raise BrokenMask(f"a polygon of {len(flat) // 2} points; {MAX_POINTS} are read")
    points = np.array([_number(number, "a coordinate") for number in flat]).reshape(-1, 2)
    return _filled(points, height, width)


def _filled(points: npt.NDArray[np.float64], height: int, width: int) -> Mask:
    size = np.array([width, height])
    if (points < -_BEYOND * size).any() or (points > (1 + _BEYOND) * size).any():
        raise BrokenMask("it lies far outside the image")
    return fill(points, height, width)


def _union(polygons: list[Any], height: int, width: int) -> Mask:
    return np.asarray(np.logical_or.reduce([_polygon(flat, height, width) for flat in polygons]))
