"""`make demo` with the tiny model: it runs, says what it did and leaves a picture of the photo's size."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import demo
from inter2former import Segmenter
from inter2former.checkpoints import save_checkpoint
from inter2former.config import tiny
from inter2former.images import decode_image
from inter2former.masks import png_to_mask
from inter2former.nn.model import Inter2Former


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Inter2Former(tiny())


def test_demo_writes_its_picture(model, tmp_path, capsys):
    checkpoint = tmp_path / "tiny.safetensors"
    save_checkpoint(checkpoint, model)
    demo.main(out=tmp_path / "out", checkpoint=checkpoint)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" at ")[0] for line in lines[:1]] == ["click 1 (+)"]
    assert sum("IoU" in line for line in lines) == demo.CLICKS
    with Image.open(tmp_path / "out" / "demo.png") as picture:
        assert picture.size == (600, 400)


def test_demo_clicks_the_object_first(model):
    image = decode_image((demo.DATA / "coffee.jpg").read_bytes())
    truth = png_to_mask((demo.DATA / "coffee_mask.png").read_bytes())
    clicks, ious, mask = demo.demo(Segmenter(model, model_size=256), image, truth)
    assert truth[clicks[0].pixel(*truth.shape)]
    assert len(clicks) == len(ious) == demo.CLICKS
    assert mask.dtype == np.bool_


@pytest.mark.parametrize("name", ["coffee_mask.png", "coffee_liquid_mask.png"])
def test_demo_data_fit_together(name):
    image = decode_image((demo.DATA / "coffee.jpg").read_bytes())
    mask = png_to_mask((demo.DATA / name).read_bytes())
    assert mask.shape == image.shape[:2]
    assert 0.02 < mask.mean() < 0.7
