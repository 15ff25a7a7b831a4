"""Shared by all tests: one thread, a clean environment, fixtures for the tiny model and a picture (synthetic.py)."""

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
from synthetic import encode_png, make_image, make_tiny_model

from inter2former.checkpoints import save_checkpoint
from inter2former.nn.model import Inter2Former
from inter2former.segmenter import Segmenter

UInt8 = npt.NDArray[np.uint8]

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
def image() -> UInt8:
    """uint8 [120, 160, 3]."""
    return make_image()


@pytest.fixture(scope="session")
def image_png(image: UInt8) -> bytes:
    return encode_png(image)
