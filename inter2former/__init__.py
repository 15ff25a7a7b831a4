"""Interactive segmentation for annotators: clicks on a photo become a mask.

    segmenter = load_segmenter()
    result = segmenter.segment(image, [Click(120, 80), Click(40, 60, positive=False)])
    result.mask  # bool [H, W]

The public API, nothing else: what is not in `__all__` is private.
"""

from inter2former.config import ModelConfig
from inter2former.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    Inter2FormerError,
    NumericError,
    PromptError,
)
from inter2former.prompts import Box, Click
from inter2former.segmenter import Segmentation, Segmenter, load_segmenter

__all__ = [
    "Box",
    "CheckpointError",
    "Click",
    "ConfigError",
    "ImageError",
    "Inter2FormerError",
    "ModelConfig",
    "NumericError",
    "PromptError",
    "Segmentation",
    "Segmenter",
    "load_segmenter",
]
