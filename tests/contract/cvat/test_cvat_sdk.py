"""The commands for tasks, by the real cvat-sdk against a server of ours: pull, auto-annotate, correct."""

import json
import pathlib

import flask
import numpy as np
import pytest
import torch
from cvat_sdk import Client
from cvat_sdk.core.client import AccessTokenCredentials
from cvat_sdk.masks import decode_mask, encode_mask
from cvat_standin import StandIn, running
from typer.testing import CliRunner

from backends.common.http import FetchError, RequestError
from backends.cvat_nuclio import sdk
from inter2former.checkpoints import save_checkpoint
from inter2former.config import tiny
from inter2former.errors import ImageError
from inter2former.images import decode_image
from inter2former.masks import rgb_to_png
from inter2former.nn.model import Inter2Former
from inter2former.prompts import Box, Click
from inter2former.segmenter import Segmenter
from train.cvat_exports import read_cvat

ROOT = pathlib.Path(__file__).parents[3]
CAT = (ROOT / "tests" / "fixtures" / "cvat" / "cat_226x150.jpg").read_bytes()
W, H = 226, 150
MIRRORED, UPSIDE_DOWN = (
    rgb_to_png(np.ascontiguousarray(decode_image(CAT)[rows, columns]))
    for rows, columns in ((slice(None), slice(None, None, -1)), (slice(None, None, -1), slice(None)))
)
LABELS = {3: "cat", 4: "cushion"}


def new_segmenter():
    torch.manual_seed(0)
    return Segmenter(Inter2Former(tiny()), model_size=256)


def disc(x, y, radius):
    rows, columns = np.mgrid[:H, :W] + 0.5
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


SHAPES = [
    {"type": "mask", "label_id": 3, "frame": 0, "points": [float(n) for n in encode_mask(disc(60, 60, 25))]},
    {"type": "polygon", "label_id": 4, "frame": 0, "points": [150.0, 20.0, 200.0, 20.0, 200.0, 80.0], "group": 2},
    {"type": "rectangle", "label_id": 4, "frame": 0, "points": [150.0, 90.0, 200.0, 140.0], "group": 2},
    {"type": "ellipse", "label_id": 3, "frame": 1, "points": [100.0, 70.0, 140.0, 50.0], "rotation": 20.0},
    {"type": "points", "label_id": 3, "frame": 1, "points": [100.0, 70.0, 120.0, 75.0]},
    {"type": "rectangle", "label_id": 3, "frame": 2, "points": [20.0, 10.0, 90.0, 120.0], "rotation": 30.0},
]


@pytest.fixture
def server():
    server = StandIn()
    frames = [("a/cat.jpg", CAT, W, H), ("cat.jpg", MIRRORED, W, H), ("../../x.jpg", UPSIDE_DOWN, W, H)]
    server.task(7, frames, LABELS, SHAPES)
    server.task(8, [("cat.jpg", CAT, W, H)], LABELS, SHAPES[:1], tracks=[{"label_id": 3, "frame": 0, "shapes": []}])
    server.projects[2] = [7, 8]
    return server


@pytest.fixture
def client(server):
    with server.running() as url, Client(url) as client:
        client.login(AccessTokenCredentials("secret"))
        yield client


# -- pull -------------------------------------------------------------------------------------------------------------


def test_what_is_pulled_is_read_for_training_pixel_for_pixel(client, server, tmp_path):
    server.tasks[8]["tracks"] = []  # and task 8 shows the first picture of task 7 once more
    done = sdk.pull(client, [], [2], tmp_path / "out")
    assert (done.tasks, done.fetched, done.kept, done.shapes, done.tracks) == (2, 4, 0, 7, 0)
    assert (tmp_path / "out" / "images" / "7" / "x.jpg").is_file()  # and not two folders up
    records, report = read_cvat(tmp_path / "out")
    assert set(report.counts()) == {"not a mask", "same image twice", "duplicate mask"}
    assert [len(record.masks) for record in records] == [2, 1, 1]
    masks = {mask.label: mask.pixels() for mask in records[0].masks}
    assert np.array_equal(masks["cat"], disc(60, 60, 25))
    assert masks["cushion"][135, 160]  # the box of the group,
    assert masks["cushion"][30, 190]  # and its polygon, are one object


def test_an_ellipse_and_a_turned_box_keep_their_place(client, server, tmp_path):
    server.task(9, [("a.jpg", CAT, W, H)], LABELS, [
        {"type": "ellipse", "label_id": 3, "frame": 0, "points": [100.0, 70.0, 140.0, 50.0]},
        {"type": "rectangle", "label_id": 4, "frame": 0, "points": [20.0, 20.0, 40.0, 80.0], "rotation": 90.0},
    ])  # fmt: skip
    sdk.pull(client, [9], [], tmp_path)
    (record,), report = read_cvat(tmp_path)
    ellipse, box = (mask.pixels() for mask in record.masks)
    rows, columns = np.nonzero(ellipse)
    assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (60, 140, 50, 90)
    rows, columns = np.nonzero(box)
    assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (0, 60, 40, 60)
    assert report.findings == []


def test_a_second_pull_fetches_only_what_is_missing(client, server, tmp_path):
    sdk.pull(client, [7], [], tmp_path)
    (tmp_path / "images" / "7" / "cat.jpg").unlink()
    before = server.count("GET", "type=frame")
    done = sdk.pull(client, [7], [], tmp_path)
    assert (done.fetched, done.kept) == (1, 2)
    assert server.count("GET", "type=frame") == before + 1


def test_deleted_frames_are_left_out(client, server, tmp_path):
    server.tasks[7]["deleted"] = [1]
    done = sdk.pull(client, [7], [], tmp_path)
    assert (done.fetched, done.shapes) == (2, 4)


def test_every_frame_of_a_video_is_pulled_and_annotated(client, server, tmp_path):
    frames = [("", image, W, H) for image in (CAT, MIRRORED, UPSIDE_DOWN)]
    server.task(9, frames, LABELS, SHAPES, video="clips/cat.mp4")
    done = sdk.pull(client, [9], [], tmp_path)
    assert (done.fetched, done.shapes) == (3, 6)
    names = [path.relative_to(tmp_path / "images").as_posix() for path in (tmp_path / "images").rglob("*.png")]
    assert sorted(names) == [f"9/cat/frame_00000{n}.png" for n in range(3)]
    records, _ = read_cvat(tmp_path)
    assert [len(record.masks) for record in records] == [2, 1, 1]
    done = sdk.auto_annotate(client, 9, new_segmenter(), tmp_path / "state.json")
    assert (done.prompts, done.broken) == (3, [])
    assert (1, 3, 0) in masks_of(server, 9)


# -- auto-annotate ----------------------------------------------------------------------------------------------------


def masks_of(server, task=7):
    shapes = [shape for shape in server.tasks[task]["shapes"] if shape["source"] == "semi-auto"]
    return {
        (shape["frame"], shape["label_id"], shape["group"]): decode_mask(shape["points"], image_width=W, image_height=H)
        for shape in shapes
    }


def test_boxes_and_points_become_the_masks_that_a_click_would_make(client, server, tmp_path):
    done = sdk.auto_annotate(client, 7, new_segmenter(), tmp_path / "state.json")
    made, alone = masks_of(server), new_segmenter()
    assert done.prompts == 3
    assert done.made == len(made) == 3 - done.empty
    expected = {
        (0, 4, 2): alone.segment(CAT, box=Box(150, 90, 200, 140)).mask,
        (1, 3, 0): alone.segment(MIRRORED, [Click(100, 70), Click(120, 75)]).mask,
    }
    for where, mask in expected.items():
        if mask.sum() >= 3:
            assert np.array_equal(made[where], mask)
    assert (1, 3, 0) in made  # a positive click is never empty
    assert [s["type"] for s in server.tasks[7]["shapes"][: len(SHAPES)]] == [s["type"] for s in SHAPES]


def test_a_run_that_was_stopped_continues_without_making_anything_twice(client, server, tmp_path):
    whole = StandIn()
    whole.tasks = {7: {**server.tasks[7], "shapes": list(server.tasks[7]["shapes"])}}
    with whole.running() as url, Client(url) as other:
        other.login(AccessTokenCredentials("secret"))
        sdk.auto_annotate(other, 7, new_segmenter(), tmp_path / "whole.json")

    state, segmenter = tmp_path / "state.json", new_segmenter()
    server.fail_after = 1
    with pytest.raises(Exception, match="500"):
        sdk.auto_annotate(client, 7, segmenter, state)
    server.fail_after = None
    state.write_text("[]")  # it was stopped between the writing and its notes
    done = sdk.auto_annotate(client, 7, segmenter, state)
    assert done.done_before == 0
    again = sdk.auto_annotate(client, 7, segmenter, state)
    assert (again.made, again.done_before) == (0, 3)
    made, expected = masks_of(server), masks_of(whole)
    assert set(made) == set(expected)
    assert all(np.array_equal(made[key], expected[key]) for key in made)
    assert len(server.tasks[7]["shapes"]) == len(whole.tasks[7]["shapes"])


def test_a_broken_image_is_passed_over(client, server, tmp_path):
    server.tasks[7]["frames"][0] = ("a/cat.jpg", CAT[:3000], W, H)
    done = sdk.auto_annotate(client, 7, new_segmenter(), tmp_path / "state.json")
    assert done.broken == ["a/cat.jpg"]
    assert (1, 3, 0) in masks_of(server)
    assert sdk.auto_annotate(client, 7, None, tmp_path / "state.json").frames == 1  # it is tried again next time


def test_an_image_of_another_size_than_cvat_says_is_passed_over(client, server, tmp_path):
    server.task(9, [("turned.jpg", CAT, H, W)], LABELS, SHAPES[:3])
    done = sdk.auto_annotate(client, 9, new_segmenter(), tmp_path / "state.json")
    assert (done.made, done.broken) == (0, ["turned.jpg"])
    with pytest.raises(ImageError, match=r"226 x 150 pixels, and in CVAT 150 x 226"):
        sdk.correct(client, 9, 100, [Click(5, 5)], new_segmenter(), dry=True)


def test_a_dry_run_reads_and_changes_nothing(client, server, tmp_path):
    done = sdk.auto_annotate(client, 7, None, tmp_path / "state.json")
    assert (done.prompts, done.made, done.frames) == (3, 0, 3)
    assert not (tmp_path / "state.json").exists()
    assert server.count("PATCH", "") == 0
    assert server.count("GET", "type=frame") == 0


def test_only_some_labels_only_points_and_in_place(client, server, tmp_path):
    done = sdk.auto_annotate(
        client, 7, new_segmenter(), tmp_path / "s.json", source="points", labels=["cat"], replace=True
    )
    assert (done.prompts, done.made) == (1, 1)
    kinds = [(shape["frame"], shape["type"]) for shape in server.tasks[7]["shapes"]]
    assert (1, "points") not in kinds
    assert kinds.count((1, "mask")) == 1
    with pytest.raises(RequestError, match=r"no label dog.*cat, cushion"):
        sdk.auto_annotate(client, 7, None, tmp_path / "s.json", labels=["dog"])


@pytest.mark.parametrize("text", ["", "{", "5", "[[]]", "\xff"])
def test_a_foreign_file_is_not_taken_for_notes(client, server, tmp_path, text):
    state = tmp_path / "s.json"
    state.write_text(text, "latin-1")
    with pytest.raises(RequestError, match=r"s\.json holds no notes"):
        sdk.auto_annotate(client, 7, None, state)
    assert state.read_text("latin-1") == text


# -- correct ----------------------------------------------------------------------------------------------------------


def test_a_mask_is_corrected_by_clicks_in_its_place(client, server):
    clicks = [Click(90.5, 60.5), Click(60.5, 60.5, positive=False)]
    before = json.dumps(server.tasks[7]["shapes"])
    said = sdk.correct(client, 7, 100, clicks, new_segmenter(), dry=True)
    assert said.endswith("not written")
    assert json.dumps(server.tasks[7]["shapes"]) == before
    sdk.correct(client, 7, 100, clicks, new_segmenter(), dry=False)
    (shape,) = [shape for shape in server.tasks[7]["shapes"] if shape["id"] == 100]
    mask = decode_mask(shape["points"], image_width=W, image_height=H)
    assert np.array_equal(mask, new_segmenter().segment(CAT, clicks, initial_mask=disc(60, 60, 25)).mask)
    assert (mask[60, 90], mask[60, 60]) == (True, False)
    assert (shape["label_id"], shape["frame"], len(server.tasks[7]["shapes"])) == (3, 0, len(SHAPES))
    shape["points"] = [0.0, 5.0, 0.0, 0.0, 9.0, 9.0]
    with pytest.raises(RequestError, match="Mask 100 is broken"):
        sdk.correct(client, 7, 100, clicks, new_segmenter(), dry=True)
    for wrong in (101, 999):
        with pytest.raises(RequestError, match=rf"{wrong}\. It has: 100 \(cat, frame 0\)"):
            sdk.correct(client, 7, wrong, clicks, new_segmenter(), dry=False)


def test_what_is_no_cvat_or_another_version_is_a_sentence(server, monkeypatch):
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", "secret")
    server.tasks[7]["shapes"][0]["type"] = "of next year"
    with server.running() as url:
        monkeypatch.setenv("CVAT_URL", url)
        with pytest.raises(FetchError, match=r"do not fit cvat-sdk \d"), sdk.connected() as client:
            client.tasks.retrieve(7).get_annotations()
    app = flask.Flask("something else")
    app.add_url_rule("/", "all", lambda path="": "<html>", defaults={"path": ""})
    app.add_url_rule("/<path:path>", "all")
    with running(app) as url:
        monkeypatch.setenv("CVAT_URL", url)
        with pytest.raises(FetchError), sdk.connected() as client:
            client.tasks.retrieve(7)


# -- the command line -------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(sdk.app, list(arguments))


def test_the_commands(server, tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "tiny.safetensors", Inter2Former(tiny()))
    monkeypatch.chdir(tmp_path)
    said = run("pull", "--task", "7", "--out", "out")
    assert (said.exit_code, "CVAT_URL" in said.stderr) == (1, True)
    with server.running() as url:
        for name, value in (
            ("CVAT_URL", url), ("CVAT_ACCESS_TOKEN", "secret"), ("I2F_CHECKPOINT", str(tmp_path / "tiny.safetensors")),
            ("I2F_MODEL_SIZE", "256"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        said = run("pull", "--task", "7", "--task", "8", "--out", "out")
        assert said.exit_code == 0, said.stderr
        assert "2 tasks, 4 images fetched, 0 there already, 7 shapes; 1 tracks left out" in said.stdout
        said = run("auto-annotate", "--task", "7", "--dry-run")
        assert "3 boxes and points: 3 masks to make on 3 frames, 0 done before" in said.stdout
        said = run("auto-annotate", "--task", "7", "--from", "points")
        assert "1 masks made" in said.stdout
        assert (tmp_path / "auto-annotate-task-7.json").is_file()
        said = run("correct", "--task", "7", "--shape", "100", "--click", "90,60", "--click", "60,60,-", "--dry-run")
        assert "pixels before" in said.stdout, said.stderr
        for arguments, text in (
            (["pull", "--out", "x"], "--task or --project"),
            (["pull", "--task", "99", "--out", "x"], "no such task"),
            (["correct", "--task", "7", "--shape", "100", "--click", "9"], "X,Y"),
            (["auto-annotate", "--task", "7", "--label", "dog", "--dry-run"], "no label dog"),
        ):
            said = run(*arguments)
            assert (said.exit_code, text in said.stderr) == (1, True), said.stderr
        monkeypatch.setenv("CVAT_ACCESS_TOKEN", "wrong-token")
        said = run("pull", "--task", "7", "--out", "x")
        assert "does not accept the access token" in said.stderr
        assert "wrong-token" not in said.stderr
    monkeypatch.setattr("urllib3.util.Retry.DEFAULT", 0, raising=False)
    said = run("pull", "--task", "7", "--out", "x")
    assert (said.exit_code, "cannot be reached" in said.stderr) == (1, True), said.stderr
    assert FetchError
