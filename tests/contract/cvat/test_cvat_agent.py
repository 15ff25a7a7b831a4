"""The function for CVAT's agents: by its interface, and run by the real cvat-cli against a server of ours."""

import io
import os
import pathlib
import subprocess
import sys

import cvat_sdk.auto_annotation as cvataa
import numpy as np
import PIL.Image
import pytest
import torch
from cvat_cli._internal.agent_driver_interaction import _InteractionPromptsImpl as Prompts
from cvat_sdk.masks import decode_mask
from cvat_standin import StandIn

from backends.cvat_nuclio.agent import InteractionFunction
from inter2former.checkpoints import load_checkpoint, save_checkpoint
from inter2former.config import tiny
from inter2former.images import decode_image
from inter2former.nn.model import Inter2Former
from inter2former.prompts import Box, Click
from inter2former.segmenter import Segmenter

ROOT = pathlib.Path(__file__).parents[3]
CAT = (ROOT / "tests" / "fixtures" / "cvat" / "cat_226x150.jpg").read_bytes()
W, H = 226, 150
POS, NEG = ((112.5, 61.5), (60.0, 80.0)), ((10.0, 20.0),)


def new_segmenter():
    torch.manual_seed(0)
    return Segmenter(Inter2Former(tiny()), model_size=256)


@pytest.fixture
def function():
    return InteractionFunction(new_segmenter())


def prompts(pos=(), neg=(), box=None):
    return Prompts(pos_points=pos, neg_points=neg, bounding_box=box)


def picture(data=CAT):
    return PIL.Image.open(io.BytesIO(data))


def masks(shapes, width=W, height=H):
    assert all(shape.type == "mask" and all(type(n) is int for n in shape.points) for shape in shapes)
    return [decode_mask(shape.points, image_width=width, image_height=height) for shape in shapes]


def test_the_agents_mask_is_the_cores_for_the_same_prompts(function):
    assert isinstance(function.spec, cvataa.InteractionFunctionSpec)
    name = function.preprocess_image(None, picture())
    assert name.nbytes < 100  # the agent keeps these without a limit
    clicks = [Click(*p) for p in POS] + [Click(*p, positive=False) for p in NEG]
    alone = new_segmenter()
    for box, given in ((None, None), (Box(20, 10, 200, 140), ((200.0, 10.0), (20.0, 140.0)))):
        (mask,) = masks(function.detect(None, name, prompts(POS, NEG, given)))
        assert np.array_equal(mask, alone.segment(CAT, clicks, box=box).mask)
    for count in (1, 2):
        (mask,) = masks(function.detect(None, name, prompts(POS[:count])))
        assert np.array_equal(mask, alone.segment(CAT, clicks[:count]).mask)
    assert function.segmenter.encodes == 1


def test_c3_nothing_to_segment_is_an_empty_list(function):
    name = function.preprocess_image(None, picture())
    assert function.detect(None, name, prompts()) == []
    assert function.detect(None, name, prompts(neg=NEG)) == []
    assert function.segmenter.encodes == 0


def test_c4_a_wrong_point_is_a_sentence_that_the_agent_passes_on(function):
    name = function.preprocess_image(None, picture())
    with pytest.raises(cvataa.BadFunctionError, match=r"pos_points\[0\].*226 x 150"):
        function.detect(None, name, prompts(((500.0, 3.0),)))


def test_an_image_that_made_room_is_asked_for_again():
    function = InteractionFunction(new_segmenter(), pixel_bytes=0)
    first = function.preprocess_image(None, picture())
    assert len(function.detect(None, first, prompts(POS))) == 1  # the last one is always there
    function.preprocess_image(None, picture().crop((0, 0, 100, 90)))
    assert function.detect(None, first, prompts(POS)) is None
    assert function.preprocess_image(None, picture()) == first


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "CMYK", "I;16", "1", "F"])
def test_c9_every_mode_is_the_same_image_as_its_file(function, mode):
    rgb = picture().resize((40, 30))
    if mode == "I;16":
        image = PIL.Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 200)
    elif mode == "PA":
        image = rgb.convert("LA").convert("PA")
    else:
        image = rgb.convert(mode)
    assert image.mode == mode
    name = function.preprocess_image(None, image)
    assert (name.height, name.width) == (30, 40)
    if mode in ("RGB", "RGBA", "L", "LA", "I;16", "1"):
        file = io.BytesIO()
        image.save(file, "PNG")
        assert function.segmenter.identify(decode_image(file.getvalue())) == name


def test_c9_an_image_that_lies_on_its_side_is_turned(function):
    file = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture().save(file, "JPEG", exif=exif)
    name = function.preprocess_image(None, picture(file.getvalue()))
    assert (name.height, name.width) == (W, H)
    assert function.segmenter.identify(file.getvalue()) == name


@pytest.mark.soak
def test_the_real_command_line_creates_the_function_and_runs_the_agent(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "tiny.safetensors", Inter2Former(tiny()))
    server = StandIn()
    server.task(7, [("cat.jpg", CAT, W, H), ("crop.jpg", CAT, W, H)], {3: "cat"})
    clicks = {
        "a1": {"task": 7, "frame": 0, "pos_points": [POS[0]], "neg_points": [], "obj_bbox": []},
        "a2": {"task": 7, "frame": 0, "pos_points": list(POS), "neg_points": list(NEG), "obj_bbox": []},
        "a3": {"task": 7, "frame": 0, "pos_points": [], "neg_points": [], "obj_bbox": [[20, 10], [200, 140]]},
        "a4": {"task": 7, "frame": 1, "pos_points": [[30, 30]], "neg_points": [], "obj_bbox": [],
               "roi": [40, 20, 200, 140]},
        "a5": {"task": 7, "frame": 0, "pos_points": [[900, 30]], "neg_points": [], "obj_bbox": []},
        "a6": {"task": 7, "frame": 0, "pos_points": [], "neg_points": list(NEG), "obj_bbox": []},
    }  # fmt: skip
    server.queue = list(clicks.items())
    with server.running() as url:
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("I2F_", "CVAT_"))} | {
            "CVAT_ACCESS_TOKEN": "secret", "I2F_CHECKPOINT": str(tmp_path / "tiny.safetensors"),
            "I2F_MODEL_SIZE": "256", "I2F_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
        }  # fmt: skip

        def cvat_cli(*arguments):
            command = [sys.executable, "-m", "cvat_cli", "--server-host", url, "function", *arguments]
            return subprocess.run(command, cwd=tmp_path, env=environ, text=True, capture_output=True, timeout=300)

        module = ["--function-module", "backends.cvat_nuclio.agent"]
        created = cvat_cli("create-native", "Inter2Former", *module)
        assert created.returncode == 0, created.stderr
        number = created.stdout.strip()
        ran = cvat_cli("run-agent", number, "--burst", *module)
        assert ran.returncode == 0, ran.stderr
    made = server.functions[int(number)]
    assert (made["kind"], made["min_pos_points"], made["min_neg_points"]) == ("interactor", 0, 0)
    assert made["startswith_box_optional"] is True
    assert {name: how for name, (how, _) in server.results.items()} == dict.fromkeys(clicks, "complete") | {
        "a5": "fail"
    }
    assert "pos_points[0] (900, 30) is outside" in server.results["a5"][1]["exc_info"]
    assert server.results["a6"][1]["shapes"] == []

    alone = Segmenter(load_checkpoint(tmp_path / "tiny.safetensors").model, model_size=256)
    first, positive = Click(*POS[0]), [Click(*p) for p in POS]
    crop = np.array(picture().convert("RGB").crop((40, 20, 200, 140)))
    for name, expected in (
        ("a1", alone.segment(CAT, [first]).mask),
        ("a2", alone.segment(CAT, [*positive, Click(*NEG[0], positive=False)]).mask),
        ("a3", alone.segment(CAT, box=Box(20, 10, 200, 140)).mask),
        ("a4", alone.segment(crop, [Click(30, 30)]).mask),
    ):
        shapes = server.results[name][1]["shapes"]
        found = [
            decode_mask(s["points"], image_width=expected.shape[1], image_height=expected.shape[0]) for s in shapes
        ]
        assert np.array_equal(found[0] if found else np.zeros_like(expected), expected)
    assert server.count("GET", "/api/tasks/7/data/?") == 2  # one download a frame, whatever was clicked
