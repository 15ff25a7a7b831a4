"""What tests make up: a tiny model that listens to clicks, and pictures. Importable by every test and script here."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import torch

from inter2former.config import ModelConfig, tiny
from inter2former.nn.model import Inter2Former


def make_tiny_model(config: ModelConfig | None = None, seed: int = 0) -> Inter2Former:
    """Random weights, with one path planted from the reference mask to the logits so that clicks move the mask.

    Channel 0 carries "foreground": -2 in every image token, much more where the prompt says so, then on through the
    low-resolution branch and the upsampling. The rest stays random, so image, edges, attention and experts move the
    outline too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Inter2Former(config or tiny())
        with torch.no_grad():
            for lateral in model.canny_net.laterals:
                torch.nn.init.normal_(lateral.weight, std=0.2)
            model.encoder.out_norm.bias[0] = -2.0
            model.prompt.labels.weight[:, 0] = torch.tensor([-30.0, -4.0, 0.0, 8.0, 100.0])
            paths = (
                (model.prompt.convs, 1.0 / 9, 0.0),
                (model.upsampling.low, 1.0, -2.5),
                ([stage.conv for stage in model.upsampling.stages], 1.0 / 9, 0.0),
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


def only_part_differs(before: Inter2Former, after: Inter2Former, part: str, given: torch.nn.Module) -> None:
    """Assert that the submodule `part` is the given one, and every other weight what it was, but for rounding."""
    for key, value in after.state_dict().items():
        kept = given.state_dict().get(key.removeprefix(f"{part}."))
        wanted = before.state_dict()[key] if kept is None else kept
        assert torch.allclose(value, wanted, atol=1e-3), key
