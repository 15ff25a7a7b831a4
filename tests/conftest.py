"""Shared by all tests: a tiny model that listens to clicks, synthetic images, one thread, a clean environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
import torch

from inter2former.checkpoints import save_checkpoint
from inter2former.config import ModelConfig, tiny
from inter2former.nn.model import Inter2Former
from inter2former.segmenter import Segmenter

torch.set_num_threads(1)  # before the first tensor: tests run beside each other
cv2.setNumThreads(1)

# The same cases every time, no files beside the tests, no opinion about how fast the machine is.
hypothesis.settings.register_profile(
    "project",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")

# What the program and the platforms' helpers read.
_PREFIXES = ("I2F_", "LABEL_STUDIO_", "LOCAL_FILES_", "CVAT_", "NUCLIO_")


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """No setting of the machine reaches a test, none of a test reaches the next one."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_PREFIXES):
            del os.environ[name]
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def make_tiny_model(config: ModelConfig | None = None, seed: int = 0) -> Inter2Former:
    """Random weights, with one path planted from the reference mask to the logits so that clicks move the mask.

    Channel 0 carries "foreground" through the prompt, the low-resolution branch and the upsampling; all else stays
    random, so image, edges, attention and experts move the outline too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Inter2Former(config or tiny())
        with torch.no_grad():
            for lateral in model.canny_net.laterals:
                torch.nn.init.normal_(lateral.weight, std=0.2)
            model.prompt.labels.weight[:, 0] = torch.tensor([-30.0, -1.0, 1.0, 4.0, 50.0])
            paths = (
                (model.prompt.convs, 1.0 / 9, 0.0),
                (model.upsampling.low, 1.0, -2.5),
                ([stage.conv for stage in model.upsampling.stages], 1.0 / 9, -0.7),
            )
            for convs, gain, last_bias in paths:
                for conv in convs:
                    conv.weight[0] *= 0.3
                    conv.weight[0, 0] += gain
                    conv.bias[0] = 0.0
                conv.bias[0] = last_bias
    return model.eval().requires_grad_(False)


def make_image(height: int = 120, width: int = 160, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]: soft noise with a bright disc, another picture for every seed."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR) // 2
    centre = int(rng.integers(width)), int(rng.integers(height))
    cv2.circle(image, centre, max(min(height, width) // 3, 1), (230, 200, 40), -1)
    return np.ascontiguousarray(image)


def encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    """RGB (or grey) pixels as PNG bytes."""
    stored = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    return cv2.imencode(".png", stored)[1].tobytes()


@pytest.fixture(scope="session")
def tiny_model() -> Inter2Former:
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Inter2Former) -> Path:
    """The tiny model as a file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, tiny_model)
    return path


@pytest.fixture
def segmenter(tiny_model: Inter2Former) -> Segmenter:
    """A fresh Segmenter, T=256."""
    return Segmenter(tiny_model, model_size=256)


@pytest.fixture(scope="session")
def image() -> npt.NDArray[np.uint8]:
    """uint8 [120, 160, 3]."""
    return make_image()


@pytest.fixture(scope="session")
def image_png(image: npt.NDArray[np.uint8]) -> bytes:
    return encode_png(image)
