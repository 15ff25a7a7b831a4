"""The backend attached to a real Label Studio 1.23.2, through the REST calls that its labeling page makes."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from label_studio_real import Client, Photo, backend, checked_mask, click, forgotten, free_port, metric, rectangle
from PIL import Image, ImageDraw, ImageOps

from backends.label_studio.__main__ import main
from inter2former import brush_rle

MakePhoto = Callable[[str], Photo]
PHOTOS = Path(__file__).resolve().parents[1] / "fixtures" / "label_studio" / "images"


def test_clicks_become_masks_that_keep_them(client: Client, server: str, photo: MakePhoto) -> None:
    cat = photo("chelsea.jpg")
    project = client.project([cat], server)
    first, second, third = click(35, 40, cat.size), click(10, 15, cat.size, False), click(72, 43, cat.size)
    task = project.tasks[0]
    one = project.mask(task, [first])
    project.mask(task, [first, second])
    project.mask(task, [first, second, third])
    assert np.array_equal(project.mask(task, [first]), one)  # two undone


def test_every_rectangle_and_label_is_an_object(client: Client, server: str, photo: MakePhoto) -> None:
    coffee = photo("coffee.jpg")
    project = client.project([coffee], server)
    task, cup = project.tasks[0], rectangle(20, 10, 55, 75, coffee.size, "Cup")
    for region in project.regions(task, [cup]):  # a poor model may find nothing in it
        assert region["value"]["brushlabels"] == ["Cup"]
        assert (region["original_width"], region["original_height"]) == coffee.size
    project.mask(task, [click(45, 50, coffee.size, label="Cup")])
    project.mask(task, [click(45, 50, coffee.size, label="Cat")])


def test_what_says_nothing_is_answered_with_nothing(client: Client, server: str, photo: MakePhoto) -> None:
    rocket = photo("rocket.jpg")
    project = client.project([rocket], server)
    before = metric(server, "inter2former_encodes_total")
    assert project.regions(project.tasks[0], [click(50, 50, rocket.size, False)]) == []
    assert project.regions(project.tasks[0], []) == []
    end = time.monotonic() + 120  # a task without clicks was opened: its image is looked at ahead
    while metric(server, "inter2former_encodes_total") == before:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_an_image_is_encoded_once(client: Client, server: str, photo: MakePhoto) -> None:
    photos = [photo("chelsea.jpg"), photo("rocket.jpg")]
    project = client.project(photos, server)
    before = metric(server, "inter2former_encodes_total")
    context: dict[int, list[dict[str, object]]] = {task: [] for task in project.tasks}
    for x, y, positive in ((50, 50, True), (5, 5, False), (60, 45, True)):
        for task, (_, size) in zip(project.tasks, photos, strict=True):
            context[task].append(click(x, y, size, positive))
            project.mask(task, context[task])
    assert metric(server, "inter2former_encodes_total") - before == len(photos)


def test_signs_survive_a_reload_of_the_page(client: Client, server: str, photo: MakePhoto) -> None:
    cat = photo("chelsea.jpg")
    project = client.project([cat], server)
    first, second, third = click(35, 40, cat.size), click(60, 60, cat.size, False), click(72, 43, cat.size)
    project.mask(project.tasks[0], [first, second])
    wanted = project.mask(project.tasks[0], [first, second, third])
    got = project.mask(project.tasks[0], [forgotten(first), forgotten(second), third])
    assert np.array_equal(got, wanted)


def test_a_turned_photo_is_segmented_as_it_is_shown(client: Client, server: str) -> None:
    turned = Photo(PHOTOS / "chelsea_exif6.jpg", (300, 451))  # stored as 451 x 300
    project = client.project([turned], server)
    project.mask(project.tasks[0], [click(60, 35, turned.size), click(95, 97, turned.size, False)])


def test_a_missing_image_is_an_error_of_one_click(client: Client, server: str, photo: MakePhoto) -> None:
    cat = photo("chelsea.jpg")
    project = client.project([cat], server)
    client.call("POST", f"/api/projects/{project.id}/import", json=[{"image": "/data/upload/1/nothing-here.jpg"}])
    broken = next(task["id"] for task in client.tasks(project.id) if task["id"] not in project.tasks)
    assert project.ask(broken, [click(50, 50, cat.size)]).get("errors")
    project.mask(project.tasks[0], [click(50, 50, cat.size)])


def test_predictions_of_many_tasks_are_empty_ones(client: Client, server: str, photo: MakePhoto) -> None:
    project = client.project([photo("chelsea.jpg"), photo("coffee.jpg"), photo("rocket.jpg")], server)
    everything = {"selectedItems": {"all": True, "excluded": []}, "project": project.id}
    client.call("POST", f"/api/dm/actions?id=retrieve_tasks_predictions&project={project.id}", json=everything)
    stored = client.call("GET", f"/api/predictions?project={project.id}")
    assert sorted(one["task"] for one in stored) == project.tasks
    assert {(str(one["result"]), one["model_version"]) for one in stored} == {("[]", project.model_version)}


def test_the_platform_reads_the_mask_as_we_do(client: Client, server: str, photo: MakePhoto) -> None:
    cat = photo("chelsea.jpg")
    project = client.project([cat], server)
    task, context = project.tasks[0], [click(45, 50, cat.size), click(5, 5, cat.size, False)]
    regions = project.regions(task, context)
    client.call("POST", f"/api/tasks/{task}/annotations", json={"result": regions})
    picture = client.call("GET", f"/api/projects/{project.id}/export?exportType=BRUSH_TO_PNG")  # one mask: no archive
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    assert np.array_equal(pixels > 0, project.mask(task, context))


def test_tokens_passwords_and_a_restart(
    client: Client, server: str, photo: MakePhoto, logs: Path, weights: dict[str, str]
) -> None:
    """Legacy tokens off, a password on the backend, and a restart of it between two clicks."""
    cat = photo("chelsea.jpg")
    settings = weights | {
        "LABEL_STUDIO_URL": client.address,
        "LABEL_STUDIO_API_KEY": client.personal_access_token(),
        "I2F_BASIC_AUTH_USER": "platform",
        "I2F_BASIC_AUTH_PASS": "a-password",
    }
    form = {"auth_method": "BASIC_AUTH", "basic_auth_user": "platform"}
    first, second, third = click(35, 40, cat.size), click(60, 60, cat.size, False), click(72, 43, cat.size)
    log, port = logs / "locked.txt", free_port()
    client.allow_legacy_tokens(False)
    try:
        with backend(log, port=port, **settings) as locked:
            with pytest.raises(AssertionError, match="HTTP 400"):
                client.project([], locked, **form, basic_auth_pass="not-the-password")
            project = client.project([cat], locked, **form, basic_auth_pass="a-password")
            task = project.tasks[0]
            project.mask(task, [first, second])
            wanted = project.mask(task, [first, second, third])
        # The new process knows no project and no click; signs come from the draft that the page has saved.
        client.call("POST", f"/api/tasks/{task}/drafts", json={"result": [first, second], "lead_time": 1})
        with backend(log, port=port, **settings):
            got = project.mask(task, [forgotten(first), forgotten(second), third])
        assert np.array_equal(got, wanted)
        # Without a personal access token the platform's own is all there is, and it is of no use now.
        other = client.project([photo("coffee.jpg")], server)
        assert other.ask(other.tasks[0], [first]).get("errors")
    finally:
        client.allow_legacy_tokens(True)


KINDS = (
    "jpg", "jpg L", "jpg CMYK", "png", "png L", "png LA", "png P", "png RGBA", "png 1", "png I;16", "webp", "webp RGBA",
    "bmp", "gif", *(f"jpg exif {orientation}" for orientation in range(2, 9)),
)  # fmt: skip


def test_exported_masks_are_the_served_ones_whatever_the_file(
    client: Client, server: str, tmp_path: Path, weights: dict[str, str]
) -> None:
    made = [_photo(tmp_path, number, kind) for number, kind in enumerate(KINDS)]
    photos, truths = [photo for photo, _ in made], [truth for _, truth in made]
    project = client.project(photos, server)
    assert len(photos) >= 20
    served = {}
    for task, (_, size), truth in zip(project.tasks, photos, truths, strict=True):
        (x, y), (away_x, away_y) = (
            100 * (np.argwhere(part).mean(0) + 0.5)[::-1] / size for part in (truth, _corner(truth))
        )
        context = [click(x, y, size), click(away_x, away_y, size, False)]
        regions = project.regions(task, context)
        served[task] = checked_mask(regions, context)
        client.call("POST", f"/api/tasks/{task}/annotations", json={"result": regions})
    exported = {one["id"]: one["annotations"][0]["result"] for one in client.export(project.id)}
    assert sorted(exported) == project.tasks
    ious = []
    for task, (_, (width, height)), truth in zip(project.tasks, photos, truths, strict=True):
        (entry,) = exported[task]
        assert served[task].shape == truth.shape == (height, width)
        mask = brush_rle.decode(entry["value"]["rle"], height, width)
        assert np.array_equal(mask, served[task])
        ious.append(_iou(mask, truth))
        assert ious[-1] == _iou(served[task], truth)
    if not weights:  # those that are shipped have learned something
        assert np.mean(ious) > 0.5, ious
    # The platform's own reading of them.
    archive = client.call("GET", f"/api/projects/{project.id}/export?exportType=BRUSH_TO_PNG")
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        names = [name for name in files.namelist() if name.endswith(".png")]
        for name in names:
            task = int(name.split("task-")[1].split("-")[0])
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(files.read(name)))) > 0, served[task]), name
    assert len(names) == len(photos)


def _iou(mask: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def _corner(truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The part of an image that is farthest away from an object."""
    away = cv2.distanceTransform((~truth).astype(np.uint8), cv2.DIST_L2, 5)
    return np.asarray(away == away.max())


def _photo(folder: Path, number: int, kind: str) -> tuple[Photo, npt.NDArray[np.bool_]]:
    """A file of a kind, each of another size, with the size that a browser shows; and the disc in it, as shown."""
    suffix, _, mode = kind.partition(" ")
    with Image.open(PHOTOS / "chelsea.jpg") as picture:
        image = picture.convert("RGB").resize((120 + 3 * number, 91 + 2 * number))
    width, height = image.size
    disc = Image.new("L", image.size)
    ImageDraw.Draw(disc).ellipse([0.2 * width, 0.3 * height, 0.6 * width, 0.9 * height], fill=255)
    image.paste((250, 240, 40), mask=disc)
    options: dict[str, Any] = {"quality": 90} if suffix in ("jpg", "webp") else {}
    shown = image.size
    if mode.startswith("exif"):
        exif = Image.Exif()
        exif[0x0112] = disc.getexif()[0x0112] = int(mode[-1])
        disc = ImageOps.exif_transpose(disc)
        options["exif"] = exif
        shown = shown[::-1] if int(mode[-1]) >= 5 else shown
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode:
        image = image.convert(mode)
    path = folder / f"{number:02d}.{suffix}"
    image.save(path, **options)
    return Photo(path, shown), np.asarray(disc) > 0


def test_connect_doctor_and_precompute(
    client: Client,
    photo: MakePhoto,
    logs: Path,
    weights: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    photos = [photo("chelsea.jpg"), photo("rocket.jpg"), photo("coffee.jpg")]
    token = client.personal_access_token()
    settings = weights | {"LABEL_STUDIO_URL": client.address, "LABEL_STUDIO_API_KEY": token}
    settings |= {"I2F_AHEAD_TASKS": "2", "I2F_CACHE_DIR": str(tmp_path / "encodings")}
    with backend(logs / "tools.txt", **settings) as ours:
        project = client.project(photos, ours)
        client.call("DELETE", f"/api/ml/{project.ml}")
        brush = '<BrushLabels name="b" toName="image"><Label value="Dog"/></BrushLabels>'
        bad = f'<View><Image name="image" value="$image"/>{brush}</View>'
        client.call("PATCH", f"/api/projects/{project.id}", json={"label_config": bad})
        common = [
            "--label-studio-url",
            client.address,
            "--token",
            token,
            "--backend",
            ours,
            "--project",
            str(project.id),
        ]
        assert main(["doctor", *common]) == 1
        told = capsys.readouterr().out
        assert "Run `connect`" in told
        assert "<KeyPointLabels" in told  # the config that it suggests
        assert main(["connect", *common, "--set-config"]) == 0
        assert main(["connect", *common]) == 0  # once more changes nothing
        assert main(["doctor", *common]) == 0
        told = capsys.readouterr().out
        assert "gave a mask" in told
        assert token not in told
        before = metric(ours, "inter2former_encodes_total")  # doctor has clicked on the first
        assert main(["precompute", *common]) == 0
        assert "3 of 3 images are known" in capsys.readouterr().err
        assert metric(ours, "inter2former_encodes_total") == before + 2
        assert main(["precompute", *common]) == 0
        assert metric(ours, "inter2former_encodes_total") == before + 2
    with backend(logs / "tools.txt", port=int(ours.rpartition(":")[2]), **settings):  # what is on disk is there again
        before = metric(ours, "inter2former_encodes_total")
        assert main(["precompute", *common]) == 0
        assert metric(ours, "inter2former_encodes_total") == before
        assert metric(ours, "inter2former_folder_hits_total") == 3


def test_opening_a_task_looks_at_the_next_ones(
    client: Client, photo: MakePhoto, logs: Path, weights: dict[str, str]
) -> None:
    photos = [photo(name) for name in ("chelsea.jpg", "rocket.jpg", "coffee.jpg", "astronaut.jpg")]
    settings = weights | {"LABEL_STUDIO_URL": client.address, "LABEL_STUDIO_API_KEY": client.personal_access_token()}
    with backend(logs / "ahead.txt", **settings, I2F_AHEAD_TASKS="2") as ours:
        project = client.project(photos, ours)
        before = metric(ours, "inter2former_encodes_total")
        client.call("GET", f"/api/tasks/{project.tasks[0]}?project={project.id}")  # as the page does
        end = time.monotonic() + 120
        while metric(ours, "inter2former_encodes_total") < before + 3:
            assert time.monotonic() < end, (logs / "ahead.txt").read_text()
            time.sleep(0.5)
        project.mask(project.tasks[2], [click(50, 50, photos[2].size)])
        assert metric(ours, "inter2former_encodes_total") == before + 3
