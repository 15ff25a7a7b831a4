"""The backend attached to a real Label Studio 1.23.2, through the REST calls that its labeling page makes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from label_studio_real import Client, Photo, backend, click, forgotten, free_port, metric, rectangle
from PIL import Image

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
    assert project.regions(project.tasks[0], [click(50, 50, rocket.size, False)]) == []
    assert project.regions(project.tasks[0], []) == []


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
