"""Work on the tasks of a CVAT server from a command line, by the cvat-sdk: python -m backends.cvat_nuclio.sdk COMMAND

    pull            images and annotations into a folder that `python -m train finetune --export` reads
    auto-annotate   boxes or points of a task become masks
    correct         clicks change a mask that is there: what CVAT's page cannot ask an interactor for

CVAT_URL and CVAT_ACCESS_TOKEN say which server and who. Each command may be stopped at any moment and run again: what
is there is not fetched, computed or written twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

import cvat_sdk
import numpy as np
import typer
import urllib3.exceptions
from cvat_sdk import Client, models
from cvat_sdk.core.client import AccessTokenCredentials
from cvat_sdk.core.proxies.annotations import AnnotationUpdateAction
from cvat_sdk.exceptions import ApiException, CvatSdkException, OpenApiException
from cvat_sdk.masks import decode_mask
from rich.console import Console
from rich.progress import track

from backends.common.http import FetchError, RequestError
from backends.common.server import warm_segmenter
from backends.common.settings import load_settings
from backends.cvat_nuclio import contract
from inter2former.errors import ConfigError, ImageError, Inter2FormerError
from inter2former.files import write_atomically
from inter2former.prompts import Click
from inter2former.segmenter import KnownImage, Segmenter

SMALLEST_AREA = 3  # pixels; CVAT's page draws nothing smaller
ALLOWS_MASKS = ("any", "mask")  # types of labels

app = typer.Typer(help="Work on the tasks of a CVAT server.", no_args_is_help=True, add_completion=False)


# -- the server -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """A cvat_sdk.Client by the settings. What goes wrong with the server inside becomes an error of ours."""
    settings = load_settings()
    if settings.cvat_url is None or settings.cvat_access_token is None:
        raise ConfigError(
            "CVAT_URL and CVAT_ACCESS_TOKEN are not both set.", "The token is made in CVAT's profile page."
        )
    try:
        with Client(settings.cvat_url, check_server_version=False) as client:
            client.login(AccessTokenCredentials(settings.cvat_access_token.get_secret_value()))
            yield client
    except ApiException as problem:
        raise FetchError(*_api_sentence(problem.status)) from None
    except (OpenApiException, CvatSdkException) as problem:
        raise FetchError(
            f"CVAT's answers do not fit cvat-sdk {cvat_sdk.__version__} ({type(problem).__name__}).",
            "Is CVAT_URL the address of CVAT? If so, install the cvat-sdk of its version.",
        ) from None
    except urllib3.exceptions.HTTPError as problem:
        raise FetchError(f"CVAT at {settings.cvat_url} cannot be reached ({type(problem).__name__}).") from None


def _api_sentence(status: int | None) -> tuple[str, str]:
    known = {
        401: ("CVAT does not accept the access token (401).", "Make a new one in CVAT's profile page."),
        403: ("CVAT does not let this user do that (403).", "Ask for the right to the task."),
        404: ("CVAT has no such task, project or shape, or hides it from this user (404).", "Check the number."),
    }
    return known.get(status or 0, (f"CVAT answered with status {status}.", "Run the command again to continue."))


def _shapes_by_frame(task: Any) -> tuple[dict[int, list[Any]], int]:
    """Shapes by frame, in their order, and the number of tracks, which are left alone."""
    annotations = task.get_annotations()
    by_frame: dict[int, list[Any]] = {}
    for shape in annotations.shapes:
        by_frame.setdefault(int(shape.frame), []).append(shape)
    return by_frame, len(annotations.tracks)


class Frame(NamedTuple):
    """A picture of a task, as CVAT describes it."""

    name: str
    width: int
    height: int


def _frame(meta: Any, number: int) -> Frame:
    """A frame by its number; all frames of a video have one entry, which names the video."""
    if len(meta.frames) == 1 < meta.size:
        video = meta.frames[0]
        return Frame(f"{PurePosixPath(video.name).stem}/frame_{number:06d}.png", video.width, video.height)
    found = meta.frames[number]
    return Frame(found.name, found.width, found.height)


def _image(task: Any, frame: Frame, number: int, segmenter: Segmenter) -> KnownImage:
    """The picture of a frame; ImageError when it cannot be read, or has not the size that shapes refer to."""
    image = segmenter.known(task.get_frame(number, quality="original").read())
    width, height = image.info.width, image.info.height
    if (width, height) != (frame.width, frame.height):
        raise ImageError(f"{frame.name} has {width} x {height} pixels, and in CVAT {frame.width} x {frame.height}.")
    return image


# -- pull -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pulled:
    """What a pull did. Images that were there already are counted as kept."""

    tasks: int = 0
    fetched: int = 0
    kept: int = 0
    shapes: int = 0
    tracks: int = 0


def pull(client: Any, tasks: Sequence[int], projects: Sequence[int], out: Path) -> Pulled:
    """Images and shapes as "CVAT for images 1.1": out/annotations.xml and out/images/TASK/NAME.

    The annotations are written last and always anew, the images only where they are missing.
    raises   FetchError, OSError; ApiException and urllib3's errors (see `connected`)
    """
    done, root = Pulled(), ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    found = [client.tasks.retrieve(number) for number in tasks]
    found += [task for number in projects for task in client.projects.retrieve(number).get_tasks()]
    for task in found:
        done.tasks += 1
        labels = {label.id: label.name for label in task.get_labels()}
        by_frame, n_tracks = _shapes_by_frame(task)
        done.tracks += n_tracks
        meta = task.get_meta()
        numbers = [number for number in range(meta.size) if number not in set(meta.deleted_frames)]
        for number in _progress(numbers, f"task {task.id}"):
            frame = _frame(meta, number)
            name = f"{task.id}/{_safe_name(frame.name, number)}"
            path = out / "images" / name
            if path.is_file():
                done.kept += 1
            else:
                write_atomically(path, task.get_frame(number, quality="original").read())
                done.fetched += 1
            image = ElementTree.SubElement(
                root, "image", id=str(len(root) - 1), name=name, width=str(frame.width), height=str(frame.height),
                task_id=str(task.id),
            )  # fmt: skip
            for shape in by_frame.get(number, ()):
                image.append(to_element(shape, labels.get(shape.label_id, "")))
                done.shapes += 1
    ElementTree.indent(root)
    write_atomically(out / "annotations.xml", ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
    return done


def _safe_name(name: str, number: int) -> str:
    """The frame's name as a path that stays in its folder."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    return "/".join(parts) or f"frame_{number:06d}"


def to_element(shape: Any, label: str) -> ElementTree.Element:
    """A shape of the API as an element of "CVAT for images 1.1"; kinds that are no area keep their name alone."""
    kind = str(shape.type)
    points = [float(number) for number in shape.points]
    attributes = {"label": label, "source": str(shape.source or "manual"), "occluded": str(int(shape.occluded))}
    if shape.group:
        attributes["group_id"] = str(shape.group)
    if kind == "mask":
        runs, (left, top, right, bottom) = [int(n) for n in points[:-4]], [int(n) for n in points[-4:]]
        attributes |= {"rle": ", ".join(map(str, runs)), "left": str(left), "top": str(top)}
        attributes |= {"width": str(right - left + 1), "height": str(bottom - top + 1)}
    elif kind == "rectangle":
        kind = "box"
        attributes |= dict(zip(("xtl", "ytl", "xbr", "ybr"), map(repr, points), strict=True))
    elif kind == "ellipse":  # the API has the centre, the rightmost x and the topmost y
        cx, cy, x, y = points
        attributes |= {"cx": repr(cx), "cy": repr(cy), "rx": repr(x - cx), "ry": repr(cy - y)}
    elif kind == "polygon":
        attributes["points"] = ";".join(f"{x!r},{y!r}" for x, y in zip(points[::2], points[1::2], strict=True))
    if shape.rotation and kind in ("box", "ellipse"):
        attributes["rotation"] = repr(float(shape.rotation))
    return ElementTree.Element(kind, {**attributes, "z_order": str(shape.z_order or 0)})


# -- auto-annotate ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Made:
    """What auto-annotate did, or would do."""

    prompts: int = 0
    made: int = 0
    done_before: int = 0
    empty: int = 0
    no_masks_allowed: int = 0
    frames: int = 0
    broken: list[str] = dataclasses.field(
        default_factory=list
    )  # names of images that cannot be read, or not as CVAT does


PROMPT_SHAPES = {"boxes": ("rectangle",), "points": ("points",), "both": ("rectangle", "points")}


def auto_annotate(
    client: Any,
    number: int,
    segmenter: Segmenter | None,
    state: Path,
    *,
    source: Literal["boxes", "points", "both"] = "both",
    labels: Sequence[str] = (),
    replace: bool = False,
) -> Made:
    """Each rectangle, or each set of points, of a task becomes a mask of the same label, frame and group.

    segmenter   None: count only, nothing is computed or written
    state       a file that remembers which prompts were turned; frame by frame
    labels      only these; all when empty
    replace     take the box or the points away once its mask is there
    raises      RequestError for an unknown label or a foreign file as `state`; FetchError, OSError; see `connected`
    """
    task = client.tasks.retrieve(number)
    known = {label.id: label for label in task.get_labels()}
    names = {label.name for label in known.values()}
    if unknown := sorted(set(labels) - names):
        raise RequestError(f"The task has no label {', '.join(unknown)}.", f"It has {', '.join(sorted(names))}.")
    by_frame, _ = _shapes_by_frame(task)
    finished = _notes(state)
    done, work = Made(), []
    for frame, shapes in sorted(by_frame.items()):
        prompts = []
        for shape in shapes:
            label = known.get(shape.label_id)
            if str(shape.type) not in PROMPT_SHAPES[source] or label is None or (labels and label.name not in labels):
                continue
            done.prompts += 1
            if str(label.type) not in ALLOWS_MASKS:
                done.no_masks_allowed += 1
            elif _key(shape) in finished:
                done.done_before += 1
            else:
                prompts.append(shape)
        if prompts:
            work.append((frame, prompts, [shape for shape in shapes if str(shape.type) == "mask"]))
    done.frames = len(work)
    if segmenter is None:
        return done
    meta = task.get_meta()
    for frame, prompts, masks in _progress(work, f"task {number}"):
        described = _frame(meta, frame)
        try:
            image = _image(task, described, frame, segmenter)
        except ImageError:
            done.broken.append(described.name)
            continue
        there = {(mask.label_id, tuple(map(int, mask.points))) for mask in masks}
        new, turned = [], []
        for shape in prompts:
            points = contract.run_lengths(_mask_of(shape, segmenter, image))
            if sum(points[1:-4:2]) < SMALLEST_AREA:
                done.empty += 1
                continue
            turned.append(shape)
            # Equal prompts give equal masks: one that is there was made by a run that was stopped before it took notes.
            if (shape.label_id, tuple(points)) not in there:
                new.append(_request(shape, points))
        if new:
            _change(task, new, AnnotationUpdateAction.CREATE)
        if replace and turned:
            _change(task, [_same(shape) for shape in turned], AnnotationUpdateAction.DELETE)
        done.made += len(new)
        finished |= {_key(shape) for shape in prompts}
        write_atomically(state, json.dumps(sorted(finished)).encode())
    return done


def _notes(state: Path) -> set[str]:
    """The keys of what was done; RequestError when the file is another one."""
    if not state.exists():
        return set()
    try:
        return set(json.loads(state.read_bytes()))
    except (ValueError, TypeError):
        raise RequestError(f"{state} holds no notes of auto-annotate.", "Give another --state.") from None


def _key(shape: Any) -> str:
    """Names a prompt by what it asks for; one that was moved is another."""
    asked = [shape.id, int(shape.frame), str(shape.type), shape.label_id, [float(number) for number in shape.points]]
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=12).hexdigest()


def _mask_of(shape: Any, segmenter: Segmenter, image: KnownImage) -> contract.Mask:
    """The mask for a rectangle (the box around it, when it is turned) or for points, all of them positive."""
    points = np.array(shape.points, np.float64).reshape(-1, 2)
    height, width = image.info.height, image.info.width
    if str(shape.type) == "points":
        request = contract.Request(b"", tuple((x, y) for x, y in points.tolist()), (), None)
    else:
        if shape.rotation:
            turn = np.radians(float(shape.rotation))
            centre, half = points.mean(0), np.abs(points[1] - points[0]) / 2
            reach = np.array([[abs(np.cos(turn)), abs(np.sin(turn))], [abs(np.sin(turn)), abs(np.cos(turn))]]) @ half
            points = np.stack([centre - reach, centre + reach])
        request = contract.Request(b"", (), (), tuple(points.ravel().tolist()))  # type: ignore[arg-type]
    clicks, box = contract.prompts(request, height, width)
    if not contract.wants_mask(clicks, box):
        return np.zeros((height, width), np.bool_)
    return segmenter.segment(image, clicks, box=box).mask


def _request(shape: Any, points: Sequence[int], **more: Any) -> Any:
    """A mask in place of a shape."""
    return models.LabeledShapeRequest(
        type="mask", frame=int(shape.frame), label_id=shape.label_id, points=[float(n) for n in points],
        source="semi-auto", occluded=bool(shape.occluded), z_order=int(shape.z_order or 0), group=shape.group or 0,
        **more,
    )  # fmt: skip


def _same(shape: Any) -> Any:
    """The shape as it is, to be named in a deletion."""
    return models.LabeledShapeRequest(
        type=shape.type, frame=int(shape.frame), label_id=shape.label_id, points=list(shape.points), id=shape.id
    )


def _change(task: Any, shapes: list[Any], action: Any) -> None:
    task.update_annotations(models.PatchedLabeledDataRequest(shapes=shapes), action=action)


# -- correct ----------------------------------------------------------------------------------------------------------


def correct(
    client: Any, number: int, shape_id: int, clicks: Sequence[Click], segmenter: Segmenter, *, dry: bool
) -> str:
    """Clicks on a mask of a task, which is written back in its place; returns a sentence about it.

    raises   RequestError for no such mask or an empty result; ImageError, PromptError, FetchError; see `connected`
    """
    task = client.tasks.retrieve(number)
    masks = {shape.id: shape for shape in task.get_annotations().shapes if str(shape.type) == "mask"}
    if shape_id not in masks:
        labels = {label.id: label.name for label in task.get_labels()}
        known = [f"{s.id} ({labels.get(s.label_id, '')}, frame {s.frame})" for s in masks.values()]
        listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        raise RequestError(f"Task {number} has no mask with the number {shape_id}.", f"It has: {listed or 'none'}.")
    shape = masks[shape_id]
    image = _image(task, _frame(task.get_meta(), int(shape.frame)), int(shape.frame), segmenter)
    try:
        before = decode_mask(shape.points, image_width=image.info.width, image_height=image.info.height)
    except ValueError as wrong:
        raise RequestError(f"Mask {shape_id} is broken: {wrong}.", "Draw it anew in CVAT.") from None
    after = segmenter.segment(image, clicks, initial_mask=before).mask
    points = contract.run_lengths(after)
    if sum(points[1:-4:2]) < SMALLEST_AREA:
        raise RequestError("Nothing would be left of the mask.", "Delete it in CVAT, if that is what you want.")
    if not dry:
        attributes = [models.AttributeValRequest(spec_id=a.spec_id, value=a.value) for a in shape.attributes]
        new = _request(shape, points, id=shape.id, attributes=attributes)
        _change(task, [new], AnnotationUpdateAction.UPDATE)
    return f"mask {shape_id}: {int(before.sum())} pixels before, {int(after.sum())} after" + (", not written" * dry)


# -- command line -----------------------------------------------------------------------------------------------------


def _progress(items: Sequence[Any], title: str) -> Iterable[Any]:
    """The items with a bar on standard error; quiet where that is no terminal."""
    console = Console(stderr=True)
    return track(items, title, console=console, disable=not console.is_terminal, transient=True)


@contextlib.contextmanager
def _errors_as_sentences() -> Iterator[None]:
    try:
        yield
    except (Inter2FormerError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


Task = Annotated[int, typer.Option("--task", help="Number of the task, as in its address.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@app.command("pull")
def pull_command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for images and annotations.")],
    task: Annotated[list[int] | None, typer.Option(help="Number of a task; may be repeated.")] = None,
    project: Annotated[list[int] | None, typer.Option(help="Number of a project: all its tasks.")] = None,
) -> None:
    """Fetch images and annotations for training; run it again to continue or to bring annotations up to date."""
    with _errors_as_sentences():
        if not task and not project:
            raise RequestError("Nothing to pull.", "Give --task or --project.")
        with connected() as client:
            done = pull(client, task or [], project or [], out)
        print(
            f"{done.tasks} tasks, {done.fetched} images fetched, {done.kept} there already, {done.shapes} shapes"
            + (f"; {done.tracks} tracks left out" if done.tracks else "")
            + f". Next: python -m train finetune --export {out} --out RUN"
        )


@app.command("auto-annotate")
def auto_annotate_command(
    task: Task,
    source: Annotated[str, typer.Option("--from", help="What becomes a mask: boxes, points or both.")] = "both",
    label: Annotated[list[str] | None, typer.Option(help="Only this label; may be repeated.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take boxes and points away when they have masks.")
    ] = False,
    state: Annotated[Path | None, typer.Option(help="Notes for continuing [auto-annotate-task-N.json].")] = None,
    dry_run: DryRun = False,
) -> None:
    """Turn a task's boxes and points into masks; stopped and run again it continues."""
    if source not in PROMPT_SHAPES:
        raise typer.BadParameter(f"{source!r} is not one of {', '.join(PROMPT_SHAPES)}.", param_hint="--from")
    with _errors_as_sentences(), connected() as client:
        segmenter = None if dry_run else warm_segmenter(load_settings())
        done = auto_annotate(
            client, task, segmenter, state or Path(f"auto-annotate-task-{task}.json"),
            source=source, labels=label or [], replace=replace,  # type: ignore[arg-type]
        )  # fmt: skip
        left = done.prompts - done.done_before - done.no_masks_allowed
        made = (
            f"{left} masks to make on {done.frames} frames"
            if dry_run
            else f"{done.made} masks made, {done.empty} empty"
        )
        print(
            f"{done.prompts} boxes and points: {made}, {done.done_before} done before"
            + (f", {done.no_masks_allowed} of labels that allow no masks" if done.no_masks_allowed else "")
            + (f"; images that cannot be read: {', '.join(done.broken)}" if done.broken else "")
        )


@app.command("correct")
def correct_command(
    task: Task,
    shape: Annotated[int, typer.Option(help="Number of the mask: serverID in CVAT's object URL. 0 names them all.")],
    click: Annotated[list[str], typer.Option(metavar="X,Y[,-]", help="Part of the object, or with ,- not part of it.")],
    dry_run: DryRun = False,
) -> None:
    """Correct a mask that is there by clicks, and write it back in its place."""
    with _errors_as_sentences(), connected() as client:
        clicks = [parse_click(text) for text in click]
        print(correct(client, task, shape, clicks, warm_segmenter(load_settings()), dry=dry_run))


def parse_click(text: str) -> Click:
    """X,Y or X,Y,- (not part of the object); RequestError for anything else."""
    x, y, *sign = text.split(",")[:4] + [""] * (text.count(",") == 0)
    try:
        if sign not in ([], ["+"], ["-"]):
            raise ValueError
        return Click(float(x), float(y), positive=sign != ["-"])
    except ValueError:
        raise RequestError(f"--click {text!r} is not X,Y or X,Y,-.") from None


if __name__ == "__main__":
    app(prog_name="python -m backends.cvat_nuclio.sdk")
