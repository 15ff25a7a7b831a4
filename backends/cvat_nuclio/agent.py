"""The interactor as a function for CVAT's agents: CVAT Online and Enterprise, without an open port (cvat-sdk >= 2.71).

    cvat-cli function create-native Inter2Former --function-module backends.cvat_nuclio.agent
    cvat-cli function run-agent ID --function-module backends.cvat_nuclio.agent

The agent fetches the frame and hands it over as a PIL image, once; of it the agent keeps what `preprocess_image`
returns, for ten minutes and without a limit. So that is a name alone; pixels and encodings are in caches of ours.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageOps
from cvat_sdk import auto_annotation as cvataa

from backends.common.log import configure
from backends.common.server import warm_segmenter
from backends.common.settings import load_settings
from backends.cvat_nuclio import contract
from inter2former.errors import Inter2FormerError
from inter2former.images import UInt8, decode_image
from inter2former.runtime.cache import ByteCache
from inter2former.segmenter import ImageInfo, KnownImage, Segmenter

PIXEL_BYTES = 512 * 2**20  # pixels of the last images, needed again when an encoding has made room: 14 of 12 megapixels


class InteractionFunction:
    """What cvat_sdk.auto_annotation.InteractionFunction asks for. One request at a time, as the agent calls it."""

    spec = cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=0)

    def __init__(self, segmenter: Segmenter, *, pixel_bytes: int = PIXEL_BYTES) -> None:
        self.segmenter = segmenter
        self._pixels = ByteCache(pixel_bytes)
        self._last: KnownImage | None = None

    def preprocess_image(self, context: cvataa.InteractionFunctionContext, image: PIL.Image.Image) -> ImageInfo:
        """The image's name and size; its encoding is begun by the first click."""
        known = self.segmenter.known(_rgb(image))
        self._last = self._pixels.get_or_make(known.info, lambda: known)
        return known.info

    def detect(
        self, context: cvataa.InteractionFunctionContext, pp_image: ImageInfo, prompts: cvataa.InteractionPrompts
    ) -> list[cvataa.InteractionResultShape] | None:
        """The mask as the one shape, or none for an empty mask.

        returns  None when the image has made room for others; the agent (cvat-cli 2.71 to 2.80) then fetches it again
        raises   BadFunctionError, the only sentence that the agent passes on to a person
        """
        image = self._last if self._last and self._last.info == pp_image else self._pixels.get(pp_image)
        if image is None:
            return None
        try:
            points = contract.run_lengths(self._mask(image, prompts))
        except Inter2FormerError as error:
            raise cvataa.BadFunctionError(str(error)) from None
        return [cvataa.InteractionResultShape(type="mask", points=points)] if points else []

    def _mask(self, image: KnownImage, prompts: cvataa.InteractionPrompts) -> contract.Mask:
        request = contract.Request(
            b"",
            positive=_pairs(prompts.pos_points),
            negative=_pairs(prompts.neg_points),
            corners=None if prompts.bounding_box is None else (*prompts.bounding_box[0], *prompts.bounding_box[1]),
        )
        clicks, box = contract.prompts(request, image.info.height, image.info.width)
        if not contract.wants_mask(clicks, box):
            return np.zeros((image.info.height, image.info.width), np.bool_)
        return self.segmenter.segment(image, clicks, box=box).mask


def create() -> InteractionFunction:
    """For cvat-cli: settings from the environment, weights loaded and warm.

    raises  ConfigError, CheckpointError
    """
    settings = load_settings()
    configure(as_json=settings.log_json, known_secrets=settings.secrets())
    return InteractionFunction(warm_segmenter(settings))


def _pairs(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), float(y)) for x, y in points)


def _rgb(image: PIL.Image.Image) -> UInt8:
    """uint8 [H, W, 3] upright, by the rules that the core has for files: the agent hands over any mode, unturned."""
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return np.array(image)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    file = io.BytesIO()
    image.save(file, "TIFF")
    return decode_image(file.getvalue())
