"""Segmenter: an image and ordered prompts become a mask. The only object of the core that doors talk to.

Pixels of the image, the frame of the model and the memory of what is known meet here; the network, the reference
mask, the frames and the cache live in their own files. No web, no platform, no files except the checkpoint.

How a mask is made (paper 3.3, and the click loop of the released implementation):

    R = start(box, initial mask)             the reference mask, uint8 [T, T]
    for each click:  R = paint(R, click);  logits = walk(decode(encoding, R));  R = apply(R, logits > 0)
    mask = (logits of the last decoder pass, resized to the image) > 0, then every click is kept

A box or an initial mask without clicks is decoded once as it is. Above the configuration's coarse size masks are found
at that size. Where the configuration says so, a random walk goes over the photo from each pass's logits
(random_walk.py), they are cut where that suits them best (level.py), small islands that nobody clicked are left out,
and a late click changes its surroundings alone. In what is shown small holes are filled, outlines are drawn again in
the picture at T (refinement.py), and in large photos they are smoothed. Each step depends on the one before and on
nothing else, so (R, logits) after a step, and what is shown then, are cached under a digest of all that led to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch

from inter2former import level, random_walk, reference_mask, refinement, score
from inter2former.checkpoints import STARTER, load_checkpoint
from inter2former.errors import ConfigError, Inter2FormerError, NumericError, PromptError
from inter2former.images import MAX_PIXELS, OUTSIDE, Frame, as_rgb, choose_size, image_key
from inter2former.nn.layers import rope_tables
from inter2former.nn.model import ImageEncoding, Inter2Former
from inter2former.prompts import Box, Click, check_clicks
from inter2former.runtime import compute, native
from inter2former.runtime.cache import ByteCache, CacheInfo
from inter2former.runtime.decoder import CompactEncoding, FusedDecoder
from inter2former.runtime.encoding_folder import EncodingFolder, FolderInfo
from inter2former.runtime.outline import NativeOutline
from inter2former.runtime.packing import pack
from inter2former.small_parts import LEAST

Mask = npt.NDArray[np.bool_]
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
ModelSize = int | Literal["auto"]
TokenBox = tuple[int, int, int, int]  # left, top, right, bottom; half-open
ModelClick = tuple[int, int, bool]  # row, column, positive; model pixels

CACHE_BYTES = 512 * 2**20  # twenty images at T=1024 of the base model, hundreds at T=256 of the starter
SIZE_STEP, MIN_SIZE, MAX_SIZE = 256, 256, 4096
ASIDE_S = 0.5  # an encode takes so much longer at most because clicks go first: on two cores, again as long as alone
STAGES = ("decode_image", "prepare", "encode", "click", "resize")

_TOKEN = 16  # model pixels a token side
HOLE = 0.05  # of the share below which islands are left out: holes are real more often, between spokes and roads
# Where a photo is enlarged so many times from the frame, a model pixel is a tooth that people see at an outline: logits
# are blurred before, by this sigma in model pixels. Smaller photos are best as they are (-0.2 at ten clicks).
ENLARGED, BLUR = 2.0, 0.7
# Outlines far from a late click change where the outline network is so sure, in logits. From the third to the tenth
# click IoU falls for 4.5 % of 146 objects with every change and for 2.5 % with these, and mIoU@10 is 0.8 higher.
CERTAIN = 2.5


class ImageInfo(NamedTuple):
    """What is known of an image without its pixels: the content key, height and width."""

    key: str
    height: int
    width: int

    @property
    def nbytes(self) -> int:
        return len(self.key) + 16


@dataclasses.dataclass(frozen=True, eq=False)
class KnownImage:
    """An image that was named by `Segmenter.known`: passed instead of its bytes or pixels, it is not hashed again.

    `image` may be replaced by another form of the same picture: pixels for now, the file's bytes to keep.
    """

    info: ImageInfo
    image: bytes | UInt8 = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        return len(self.image) if isinstance(self.image, bytes) else self.image.nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """One answer.

    mask        bool [H, W] in the image, read-only
    score       predicted IoU, 0..1; 0 when the network found nothing
    evidence    the numbers that the prediction is made from, see `score.EVIDENCE`; None when nothing was found
    clicks      the clicks that it answers
    image_key   name of the image's content
    model_size  T that was used
    encoded     whether this request had to run the image encoder
    timing      seconds by stage (`STAGES`); 0 for what was not needed. Waiting for another request is part of a stage
    """

    mask: Mask
    score: float
    evidence: tuple[float, ...] | None
    clicks: tuple[Click, ...]
    image_key: str
    model_size: int
    encoded: bool
    timing: dict[str, float]
    _frame: Frame = dataclasses.field(repr=False)
    _found: _Found | None = dataclasses.field(repr=False)

    def logits(self) -> Float32:
        """float32 [H, W] in the image; `logits() > 0` equals `mask`. Made on demand: 4 bytes a pixel."""
        if self._found is None:
            return np.full(self.mask.shape, OUTSIDE, np.float32)
        logits = self._frame.logits_to_image(self._found.logits(self._frame.size)).numpy()
        moved = (logits > 0) != self.mask
        logits[moved] = np.where(self.mask[moved], np.float32(LEAST), np.float32(-LEAST))
        return logits


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """A decoder pass: logits inside the token box, float32 [16 h, 16 w]; they are -100 outside."""

    inside: Float32
    box: TokenBox

    def logits(self, size: int) -> torch.Tensor:
        """float32 [T, T]."""
        logits = np.full((size, size), OUTSIDE, np.float32)
        logits[self.pixels] = self.inside
        return torch.from_numpy(logits)

    def walked(self, links: Float32, reference: UInt8, trust: float) -> _Found:
        """After a random walk over the photo's colours, see random_walk.py."""
        return _Found(native.walk(links, self.inside, self.box, reference, trust), self.box)

    def cut_at(self, level: float) -> _Found:
        """With another level as zero."""
        return self if level == 0 else _Found(self.inside - np.float32(level), self.box)

    def without_small(self, share: float, spoken: Mask, *, inside: bool) -> _Found:
        """Small islands, or else small holes, change their side, but not those that meet `spoken`, bool [T, T]; see
        small_parts.py."""
        logits = native.flip_small_parts(self.inside, spoken[self.pixels], share, inside=inside)
        return self if logits is None else _Found(logits, self.box)

    def changed_at(self, before: _Found, click: ModelClick, radius: int, certain: float = math.inf) -> _Found:
        """What was found before, but for the parts of the change that come within `radius` of the click, and pixels
        whose logits are farther from zero than `certain`.

        A late click is about one place. What the network thinks anew far from it nobody asked for, and it is worse as
        often as better.
        """
        x0, y0, x1, y1 = (pick(a, b) for pick, a, b in zip((min, min, max, max), self.box, before.box, strict=True))
        box = (x0, y0, x1, y1)
        now, then = refinement.over(self.spread, box), refinement.over(before.spread, box)
        changed = (now > 0) != (then > 0)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        if len(rows) == 0:
            return self
        top, left = int(rows[0]), int(columns[0])
        cut = (slice(top, int(rows[-1]) + 1), slice(left, int(columns[-1]) + 1))
        count, part = cv2.connectedComponents(np.ascontiguousarray(changed[cut]).view(np.uint8), connectivity=8)
        row, column = click[0] - _TOKEN * y0 - top, click[1] - _TOKEN * x0 - left
        near = tuple(slice(max(place - radius, 0), max(place + radius + 1, 0)) for place in (row, column))
        elsewhere = np.ones(count, np.bool_)
        elsewhere[part[near]] = False
        elsewhere[0] = False
        if not elsewhere.any():
            return self
        kept = elsewhere[part]
        if certain < math.inf:
            kept &= np.abs(now[cut]) <= certain
        now[cut][kept] = then[cut][kept]
        return _Found(now, box)

    @property
    def spread(self) -> refinement.Spread:
        return refinement.Spread(self.inside, self.box)

    def without_teeth(self) -> _Found:
        """With outlines that are smooth at the scale of a model pixel."""
        return _Found(
            np.asarray(cv2.GaussianBlur(self.inside, (0, 0), BLUR, borderType=cv2.BORDER_REPLICATE)), self.box
        )

    @property
    def pixels(self) -> tuple[slice, slice]:
        """The box in model pixels."""
        left, top, right, bottom = (_TOKEN * side for side in self.box)
        return slice(top, bottom), slice(left, right)

    def within(self, valid: tuple[int, int]) -> Float32:
        """The logits of the box's pixels that show the image."""
        rows, columns = self.pixels
        return self.inside[: max(valid[0] - rows.start, 0), : max(valid[1] - columns.start, 0)]

    def shown(self, valid: tuple[int, int], step: int = 1) -> Float32:
        """Logits of every `step`-th of the first `valid` rows and columns, float32 [ceil(rows / step), ...]."""
        shown = np.full([-(-side // step) for side in valid], OUTSIDE, np.float32)
        rows, columns = self.pixels
        inside = self.inside[-rows.start % step :: step, -columns.start % step :: step]
        part = shown[-(-rows.start // step) :, -(-columns.start // step) :][: inside.shape[0], : inside.shape[1]]
        part[...] = inside[: part.shape[0], : part.shape[1]]
        return shown


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """What is known after a prefix of the clicks: the decoder pass, what it says about its quality, and the reference
    mask after its prediction."""

    found: _Found
    evidence: tuple[float, ...] | None
    told: UInt8  # the reference mask inside the tight box of pixels that are not possible background
    origin: tuple[int, int]  # row and column where that box begins

    @classmethod
    def after(cls, reference: UInt8, found: _Found, evidence: tuple[float, ...] | None) -> _State:
        prediction = np.zeros(reference.shape, np.bool_)
        np.greater(found.inside, 0, out=prediction[found.pixels])
        after = native.apply_prediction(reference, prediction)
        told = after != reference_mask.POSSIBLE_BACKGROUND
        rows, columns = np.flatnonzero(told.any(1)), np.flatnonzero(told.any(0))
        if len(rows) == 0:
            return cls(found, evidence, np.zeros((0, 0), np.uint8), (0, 0))
        inside = after[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return cls(found, evidence, inside.copy(), (int(rows[0]), int(columns[0])))

    def reference(self, size: int) -> UInt8:
        """uint8 [T, T]."""
        (top, left), (height, width) = self.origin, self.told.shape
        reference = reference_mask.initial(size, reference_mask.POSSIBLE_BACKGROUND)
        reference[top : top + height, left : left + width] = self.told
        return reference

    @property
    def nbytes(self) -> int:
        return self.found.inside.nbytes + self.told.nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """What the first step builds upon, in the model frame."""

    box: tuple[int, int, int, int] | None
    mask: Mask | None

    def reference(self, size: int, initial: int) -> UInt8:
        """R before the first click: a given mask or `initial` everywhere; outside a box it is possible background."""
        if self.mask is not None:
            state = reference_mask.from_mask(self.mask)
        else:  # a box says that something is inside of it: unknown, also for a model that starts from background
            state = reference_mask.initial(size, initial if self.box is None else reference_mask.UNKNOWN)
        return state if self.box is None else reference_mask.limit_to_box(state, self.box)

    def found(self) -> _Found | None:
        """A given mask, what of it lies in the box, as if it had been found; None when there is none."""
        if self.mask is None:
            return None
        inside, side = self.mask, len(self.mask) // _TOKEN
        if self.box is not None:
            unknown = reference_mask.initial(len(inside), reference_mask.UNKNOWN)
            inside = inside & (reference_mask.limit_to_box(unknown, self.box) == reference_mask.UNKNOWN)
        return _Found(np.where(inside, np.float32(1), np.float32(-1)), (0, 0, side, side))

    @property
    def worth(self) -> int:
        """Clicks that this tells as much as."""
        return 0 if self.box is None and self.mask is None else random_walk.WORTH

    def said(self, size: int, clicks: Sequence[ModelClick], *, inside: bool) -> Mask:
        """bool [T, T]: what clicks, and the mask that they correct, say is inside; or what they say is outside."""
        if self.mask is None:
            said = np.zeros((size, size), np.bool_)
        else:
            said = self.mask.copy() if inside else ~self.mask
        for row, column, positive in clicks:
            if positive == inside:
                said[row, column] = True
        return said

    def key(self) -> bytes:
        digest = hashlib.blake2b(repr(self.box).encode(), digest_size=16)
        if self.mask is not None:
            digest.update(np.packbits(self.mask).data)
        return digest.digest()


@dataclasses.dataclass(frozen=True, eq=False)
class _Shown:
    """What is shown after a prefix of the clicks, in the frame at T; None when nothing was found."""

    found: _Found | None

    @property
    def nbytes(self) -> int:
        return 0 if self.found is None else self.found.inside.nbytes


class _Passes(NamedTuple):
    """Names of the steps, what is known after those that were looked at, the last one among them, and whether the image
    had to be encoded."""

    keys: list[bytes]
    states: dict[int, _State]
    encoded: bool

    @property
    def last(self) -> _State:
        return self.states[len(self.keys) - 1]


class Segmenter:
    """Masks from prompts, for any number of images and threads.

    The mask is a function of the image's pixels, the ordered prompts, the weights and T, and of nothing else; the
    cache only makes things faster. A cache belongs to one Segmenter, so to one set of weights. Two requests for one
    image encode it once, requests for different images run side by side: whoever needs a queue puts it in front.

    model        weights; put into evaluation mode, not to be changed afterwards
    model_size   T, a multiple of 256 in 256..4096, or "auto": by the longer side of the image, from the config
    cache_bytes  budget for image encodings and click states together
    max_pixels   larger images are refused, from the header where there is one
    digest       name of the weights, for logs and replies

    raises  ConfigError for an impossible model_size or cache_bytes
    """

    def __init__(
        self,
        model: Inter2Former,
        *,
        model_size: ModelSize = "auto",
        cache_bytes: int = CACHE_BYTES,
        max_pixels: int = MAX_PIXELS,
        digest: str = "",
    ) -> None:
        self._model = model.eval()
        self._model_size = _check_size(model_size, ConfigError)
        self._cache = ByteCache(cache_bytes)
        self._on_disk: EncodingFolder | None = None
        self._max_pixels = max_pixels
        self._encodes = 0
        self._at_work = 0  # requests that compute
        self._counter = threading.Lock()
        self.config = model.config
        self.digest = digest

    # -- questions ---------------------------------------------------------------------------------------------------

    @property
    def encodes(self) -> int:
        """How often the image encoder has run."""
        return self._encodes

    def cache_info(self) -> CacheInfo:
        return self._cache.info()

    def keep_encodings(self, folder: Path, budget_bytes: int) -> None:
        """Keep encodings in a folder too, over restarts and beyond the memory, with a budget of its own.

        Those of other weights are not used, and leave it in their turn.

        raises  ConfigError for a folder that cannot be used, or weights without a digest
        """
        # The native decoder has an encoding of its own, laid out as its version wants it.
        maker = f"native{native.INTERFACE}" if native.status().available else "torch"
        owner = f"{self.digest[:16]}-{maker}" if self.digest else ""
        self._on_disk = EncodingFolder(folder, budget_bytes, owner, (ImageEncoding, CompactEncoding))

    def folder_info(self) -> FolderInfo | None:
        """Of the encodings on disk; None when none are kept there."""
        return None if self._on_disk is None else self._on_disk.info()

    def clear_cache(self) -> None:
        """Forget everything that was computed. No mask depends on it."""
        self._cache.clear()

    def identify(self, image: bytes | npt.NDArray[np.uint8]) -> ImageInfo:
        """Key, height and width of an image; encoded bytes that were seen before are not decoded again.

        raises  ImageError
        """
        return _Pixels(self, image, _Clock()).info

    def known(self, image: bytes | npt.NDArray[np.uint8]) -> KnownImage:
        """The image with its name, for a caller that keeps it over many clicks: pixels when it had to be decoded for
        its name, else what was given. Nobody may change them afterwards.

        raises  ImageError
        """
        pixels = _Pixels(self, image, _Clock())
        return KnownImage(pixels.info, image if pixels.decoded is None else pixels.decoded)

    def is_encoded(self, image: bytes | KnownImage, *, model_size: ModelSize | None = None) -> bool:
        """Whether a click on these encoded bytes would find the image's encoding ready. Looks, and decodes nothing.

        raises  PromptError for an impossible model_size
        """
        info: ImageInfo | None
        if isinstance(image, KnownImage):
            info = image.info
        else:
            info = self._cache.get(("bytes", hashlib.sha256(image).digest()))
        if info is None:
            return False
        frame = self._frame(info, model_size)
        kept = [("encoding", info.key, self._coarse(frame).size)]
        if self._outlines:
            kept.append(("picture", info.key, frame.size))
        return all(self._cache.get(key) is not None for key in kept)

    # -- work --------------------------------------------------------------------------------------------------------

    def prefetch(
        self, image: bytes | npt.NDArray[np.uint8] | KnownImage, *, model_size: ModelSize | None = None
    ) -> str:
        """Encode an image before its first click; returns its key.

        raises  ImageError, NumericError, PromptError for an impossible model_size
        """
        pixels = _Pixels(self, image, _Clock())
        frame = self._frame(pixels.info, model_size)
        self._encoding(pixels, self._coarse(frame))
        if self._outlines:
            self._picture(pixels, frame)
        return pixels.info.key

    def segment(
        self,
        image: bytes | npt.NDArray[np.uint8] | KnownImage,
        clicks: Sequence[Click] = (),
        *,
        box: Box | None = None,
        initial_mask: Mask | None = None,
        model_size: ModelSize | None = None,
    ) -> Segmentation:
        """The mask for ordered clicks and, if given, a box around the object and a mask to correct.

        image         encoded bytes (JPEG, PNG, WebP, BMP, TIFF, GIF; EXIF applied) or uint8 pixels, see
                      `images.as_rgb`; or what `known` made of them
        clicks        image pixels, x to the right, y down; the order matters
        box           image pixels; may reach over the image's border
        initial_mask  bool [H, W]; one that is False everywhere says nothing
        model_size    T for this request; by default the Segmenter's

        A clicked pixel ends on the side of its (last) click. Without a positive click, a box and an initial mask
        nothing is inside: negative clicks alone give an empty mask without asking the network.

        raises  ImageError; PromptError for no prompt at all, a prompt outside the image or of a wrong type or shape;
                NumericError when the network's values are not finite
        """
        clock = _Clock()
        clicks = check_clicks(clicks)
        if box is not None and not isinstance(box, Box):
            raise PromptError(f"box is a {type(box).__name__}; give Box(x0, y0, x1, y1).")
        if not clicks and box is None and initial_mask is None:
            raise PromptError("There is no prompt.", "Give a click, a box or an initial mask.")
        pixels = _Pixels(self, image, clock)
        info = pixels.info
        frame = self._frame(info, model_size)
        coarse = self._coarse(frame)
        clicked = [(*click.pixel(info.height, info.width), click.positive) for click in clicks]
        start = _Start(
            box=None if box is None else coarse.box_to_model(box),
            mask=_mask_in_model(initial_mask, coarse),
        )

        state, encoded, found = None, False, None
        if any(click.positive for click in clicks) or box is not None or start.mask is not None:
            groups = [[click] for click in _clicks_in(coarse, clicks)] or [[]]
            with self._among_others():
                passes = self._run(pixels, coarse, start, groups)
                state, encoded = passes.last, passes.encoded
                found = self._shown(pixels, coarse, frame, start, groups, passes, _clicks_in(frame, clicks))

        with clock("resize"):
            if found is None:
                mask = np.zeros((info.height, info.width), np.bool_)
            else:
                if self.config.island_share and frame.scale * ENLARGED < 1:
                    found = found.without_teeth()
                mask = frame.mask_from_logits(torch.from_numpy(found.inside), found.box)
            _keep_clicks(mask, clicked)
            mask.flags.writeable = False
        return Segmentation(
            mask=mask,
            score=self._score(state, coarse),
            evidence=None if state is None else state.evidence,
            clicks=clicks,
            image_key=info.key,
            model_size=frame.size,
            encoded=encoded,
            timing=clock.seconds,
            _frame=frame,
            _found=found,
        )

    @contextlib.contextmanager
    def _among_others(self) -> Iterator[None]:
        """Clicks at the same time share the threads. One that began alone has them all until its end."""
        with self._counter:
            self._at_work += 1
            callers = self._at_work
        try:
            with native.among(callers):
                yield
        finally:
            with self._counter:
                self._at_work -= 1

    def _score(self, state: _State | None, frame: Frame) -> float:
        if state is None:
            return 0.0
        if not self.config.score_weights:
            return score.promise(state.found.within(frame.valid))
        return 0.0 if state.evidence is None else score.predict(state.evidence, self.config.score_weights)

    def _run(self, pixels: _Pixels, frame: Frame, start: _Start, groups: Sequence[Sequence[ModelClick]]) -> _Passes:
        """All steps from the start, one group of clicks each; what is known already is not computed again."""
        # A chain of digests: 16 bytes name the image, T, the start and every click so far.
        keys: list[bytes] = []
        previous = f"{pixels.info.key} {frame.size} ".encode() + start.key()
        for group in groups:
            packed = b"".join(struct.pack("<ii?", *click) for click in group)
            previous = hashlib.blake2b(previous + packed, digest_size=16).digest()
            keys.append(previous)

        state: _State | None = None
        known = len(keys)
        while known and (state := self._cache.get(keys[known - 1])) is None:
            known -= 1
        encoding: ImageEncoding | None = None  # held until the end: the cache may be too small to keep it
        encoded = False

        def step(before: _State | None, clicks: Sequence[Sequence[ModelClick]]) -> _State:
            nonlocal encoding, encoded
            if encoding is None:
                encoding, encoded = self._encoding(pixels, frame)
            with self._first():
                return self._step(encoding, frame, start, before, clicks)

        states = {} if state is None else {known - 1: state}
        for n in range(known, len(keys)):
            with pixels.clock("click"):
                state = self._cache.get_or_make(keys[n], functools.partial(step, state, groups[: n + 1]))
            states[n] = state
        return _Passes(keys, states, encoded)

    def _step(
        self,
        encoding: ImageEncoding,
        frame: Frame,
        start: _Start,
        before: _State | None,
        clicks: Sequence[Sequence[ModelClick]],
    ) -> _State:
        """What is known after the last group of clicks, from what was known before it."""
        if before is None:
            reference = start.reference(frame.size, self.config.initial_reference)
        else:
            reference = before.reference(frame.size)
        reference = reference_mask.paint_clicks(reference, clicks[-1], self.config.click_radius)
        made = [click for group in clicks for click in group]
        found = self._decode(encoding, reference)
        if made:
            found = self._walked(found, encoding, reference, start.worth + len(made), frame)
        previous = None if before is None else before.found
        if made and not start.worth:
            found = found.cut_at(self._level(found, encoding, made, previous, frame))
        if self.config.island_share:
            asked = start.said(frame.size, made, inside=True)
            found = found.without_small(self.config.island_share, asked, inside=True)
        corrected = start.found() if previous is None else previous
        if made and corrected is not None and 0 < self.config.local_from <= start.worth + len(made):
            found = found.changed_at(corrected, made[-1], self.config.click_radius)
        return _State.after(reference, found, _evidence(found, made, previous, start, frame))

    def _walked(self, found: _Found, encoding: ImageEncoding, reference: UInt8, clicks: int, frame: Frame) -> _Found:
        """A pass after the random walk, where there is one, with the trust of so many clicks."""
        if not self.config.walk_trust or random_walk.is_thin(found.inside, frame.size):
            return found
        trust = random_walk.trust(self.config.walk_trust, clicks)
        return found.walked(encoding.links.numpy(), reference, trust)

    def _level(
        self,
        found: _Found,
        encoding: ImageEncoding,
        clicks: Sequence[ModelClick],
        previous: _Found | None,
        frame: Frame,
    ) -> float:
        """Where the logits of a pass are cut, see level.py. A box or a given mask says how large the object is."""
        if not self.config.level_weights:
            return 0.0
        return level.choose(at_levels(found, encoding, clicks, previous, frame), self.config.level_weights)

    def _shown(
        self,
        pixels: _Pixels,
        coarse: Frame,
        frame: Frame,
        start: _Start,
        groups: Sequence[Sequence[ModelClick]],
        passes: _Passes,
        clicks: Sequence[ModelClick],
    ) -> _Found | None:
        """What is shown after the last step, in the frame at T; None for nothing.

        groups   of the coarse frame, a step each, and the `passes` that they led to
        clicks   the same ones in the frame at T
        """

        def found(n: int) -> _Found:
            state = passes.states.get(n) or self._run(pixels, coarse, start, groups[: n + 1]).last
            if not self.config.island_share:
                return state.found
            with pixels.clock("resize"):
                made = [click for group in groups[: n + 1] for click in group]
                refused = start.said(coarse.size, made, inside=False)
                return state.found.without_small(HOLE * self.config.island_share, refused, inside=False)

        last = len(groups) - 1
        if not self._outlines:
            return found(last) if coarse is frame else self._spread(found(last), coarse, frame)

        def late(n: int) -> bool:  # a step whose click changes its surroundings alone
            return bool(clicks) and 0 < self.config.local_from <= start.worth + n + 1

        def key(n: int) -> tuple[Any, ...]:
            return ("shown", passes.keys[n], frame.size, tuple(clicks[: n + 1]))

        def show(n: int, before: _Found | None) -> _Shown:
            drawn = self._drawn(pixels, found(n), before, coarse, frame, clicks[: n + 1])
            if late(n) and drawn is not None and before is not None:
                with pixels.clock("click"):
                    drawn = drawn.changed_at(before, clicks[n], self.config.click_radius, CERTAIN)
            return _Shown(drawn)

        first = last
        known: _Shown | None = self._cache.get(key(last))
        while known is None and first > 0:
            first -= 1
            known = self._cache.get(key(first))
        before: _Found | None = None
        if known is not None:
            first, before = first + 1, known.found
        elif (given := start.found()) is not None:
            before = self._spread(given, coarse, frame)
        for n in range(first, last + 1):
            made: _Shown = self._cache.get_or_make(key(n), functools.partial(show, n, before))
            before = made.found
        return before

    @staticmethod
    def _spread(found: _Found, coarse: Frame, frame: Frame) -> _Found | None:
        spread = refinement.spread(found.inside, found.box, coarse, frame)
        return None if spread is None else _Found(*spread)

    def _drawn(
        self,
        pixels: _Pixels,
        found: _Found,
        before: _Found | None,
        coarse: Frame,
        frame: Frame,
        clicks: Sequence[ModelClick],
    ) -> _Found | None:
        """What was found in the coarse frame, in the one at T, with its outlines drawn again; None for nothing.

        before  what was shown before the latest click
        """
        with pixels.clock("click"):
            spread = refinement.spread(found.inside, found.box, coarse, frame)
            if spread is None:
                return None
            shown = None if before is None else before.spread
            view = refinement.view(spread, shown, self._picture(pixels, frame), clicks)
            draw = self._model.draw
            if isinstance(draw, NativeOutline):
                with self._first():
                    logits, finite = draw.drawn(view)
            else:
                change = compute.run(lambda: draw(refinement.look(view)))
                logits, finite = refinement.drawn(view, change).logits, bool(np.isfinite(change).all())
            if not finite:
                raise NumericError("The outline network's values are not finite.", "The weights may be damaged.")
            return _Found(logits, view.box)

    @property
    def _outlines(self) -> bool:
        return bool(self.config.outline_widths)

    def _picture(self, pixels: _Pixels, frame: Frame) -> UInt8:
        """What the frame shows of the image, uint8 [rows, columns, 3]; from the cache, or made now."""

        def make() -> UInt8:
            rgb = pixels.rgb()
            with pixels.clock("prepare"):
                return frame.picture(rgb)

        return self._cache.get_or_make(("picture", pixels.info.key, frame.size), make)

    def _coarse(self, frame: Frame) -> Frame:
        """The frame in which masks are found: itself unless the configuration names a smaller one."""
        size = self.config.coarse_size
        return frame if size == 0 or frame.size <= size else dataclasses.replace(frame, size=size)

    def _frame(self, info: ImageInfo, model_size: ModelSize | None) -> Frame:
        size = self._model_size if model_size is None else _check_size(model_size, PromptError)
        if size == "auto":
            size = choose_size(info.height, info.width, self.config.auto_sizes)
        return Frame(info.height, info.width, size, self.config.input_convention)

    def _encoding(self, pixels: _Pixels, frame: Frame) -> tuple[ImageEncoding, bool]:
        """From the cache, or made now; the second value says which."""
        made = False

        def make() -> ImageEncoding:
            nonlocal made
            name = f"{pixels.info.key}-{frame.size}"
            known: ImageEncoding | None = None if self._on_disk is None else self._on_disk.load(name)
            if known is not None:
                return known
            made = True
            rgb = pixels.rgb()
            with pixels.clock("prepare"):
                image = compute.run(lambda: frame.prepare(rgb))
            with pixels.clock("encode"):
                encoding = compute.run(lambda: self._encode(image, frame), aside_s=ASIDE_S)
            if self._on_disk is not None:
                self._on_disk.store(name, encoding)
            return encoding

        with pixels.clock("encode"):  # waiting for another request's encode, if any
            encoding = self._cache.get_or_make(("encoding", pixels.info.key, frame.size), make)
        return encoding, made

    @torch.inference_mode()
    def _encode(self, image: torch.Tensor, frame: Frame) -> ImageEncoding:
        encoding = self._model.encode(image)
        if self.config.walk_trust:
            links = self._links(image, encoding, frame)
            encoding = encoding._replace(links=torch.from_numpy(links))
        with self._counter:
            self._encodes += 1
        # A sum is finite when all its parts are, and costs one pass over the memory.
        if not all(math.isfinite(float(part.sum())) for part in (encoding.tokens, *encoding.edges)):
            raise NumericError("The image encoding is not finite.", "The weights may be damaged.")
        if isinstance(encoding, CompactEncoding):  # the first click finds its tables made
            config, (rows, columns, _) = self.config, encoding.tokens.shape
            rope_tables(rows, columns, config.attention_dim, encoding.tokens.device, config.position_span)
        return encoding

    def _links(self, image: torch.Tensor, encoding: ImageEncoding, frame: Frame) -> Float32:
        """What the random walk is to know of an image."""
        if self.config.affinity_width:
            return random_walk.within(encoding.links.numpy(), frame.valid, frame.size)
        height, width = frame.valid
        return random_walk.links(image[:, :height, :width], frame.size)

    def _native_decoder(self) -> FusedDecoder | None:
        decoder = getattr(self._model.decode, "__self__", None)
        return decoder if isinstance(decoder, FusedDecoder) else None

    def _first(self) -> contextlib.AbstractContextManager[None]:
        """Encodes stand aside for what runs inside. In PyTorch a click would wait behind the very encode that does."""
        return contextlib.nullcontext() if self._native_decoder() is None else compute.first()

    def _decode(self, encoding: ImageEncoding, reference: UInt8) -> _Found:
        """One pass, see Inter2Former.decode. The native one runs where it is called: no click waits for an encode."""
        native_decoder = self._native_decoder()
        if native_decoder is not None:
            inside, box, low = native_decoder.click(encoding, reference)
        else:
            inside, box, low = compute.run(lambda: self._decode_in_torch(encoding, reference))
        if not (np.isfinite(inside).all() and np.isfinite(low).all()):
            raise NumericError("The network's logits are not finite.", "The weights may be damaged.")
        return _Found(inside, box)

    @torch.inference_mode()
    def _decode_in_torch(self, encoding: ImageEncoding, reference: UInt8) -> tuple[Float32, TokenBox, Float32]:
        decoded = self._model.decode(encoding, reference)
        left, top, right, bottom = (_TOKEN * side for side in decoded.box)
        return decoded.logits[top:bottom, left:right].numpy().copy(), decoded.box, decoded.low.numpy()


def load_segmenter(
    path: str | os.PathLike[str] | None = None,
    *,
    model_size: ModelSize = "auto",
    cache_bytes: int = CACHE_BYTES,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    precision: Literal["float32", "bfloat16", "auto"] = "float32",
) -> Segmenter:
    """A Segmenter from a checkpoint file; without a path from the starter weights inside the package.

    threads    of the whole process, for torch, OpenCV and the native module; None leaves them as they are
    precision  of a click's large products: bfloat16 is faster where the CPU has it, and moves some pixels at outlines.
               "auto" takes it there. Masks then depend on the precision, so the digest of the weights names it
    raises     CheckpointError, ConfigError
    """
    try:
        chosen = native.choose_precision(precision)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ConfigError(f"threads is {threads!r}.", "Give a whole number from 1 on, or None.")
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        native.set_threads(threads)
    loaded = load_checkpoint(STARTER if path is None else path)
    return Segmenter(
        compute.run(lambda: pack(loaded.model, chosen)),
        model_size=model_size,
        cache_bytes=cache_bytes,
        max_pixels=max_pixels,
        digest=loaded.digest if chosen == "float32" else f"bf16-{loaded.digest}",
    )


class _Clock:
    """Seconds by stage. A stage inside another one is not counted twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._inner = 0.0

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began, outer = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[stage] += spent - self._inner
            self._inner = outer + spent


class _Pixels:
    """The image of one request: named at once, decoded only when somebody looks at its pixels."""

    def __init__(self, segmenter: Segmenter, image: Any, clock: _Clock) -> None:
        self.clock = clock
        self._image = image
        self._max_pixels = segmenter._max_pixels
        self.decoded: UInt8 | None = None
        with clock("decode_image"):
            if isinstance(image, bytearray | memoryview):
                image = bytes(image)
            if isinstance(image, KnownImage):
                self._image, self.info = image.image, image.info
            elif isinstance(image, bytes):
                # Every click brings the bytes again: SHA-256 has instructions of its own, twice as fast as BLAKE2.
                alias = hashlib.sha256(image).digest()
                self.info = segmenter._cache.get_or_make(("bytes", alias), self._identify)
            else:
                self.info = self._identify()

    def _identify(self) -> ImageInfo:
        rgb = self.rgb()
        return ImageInfo(image_key(rgb), rgb.shape[0], rgb.shape[1])

    def rgb(self) -> UInt8:
        """uint8 [H, W, 3]."""
        if self.decoded is None:
            with self.clock("decode_image"):
                self.decoded = as_rgb(self._image, max_pixels=self._max_pixels)
        return self.decoded


def _check_size(size: Any, error: type[Inter2FormerError]) -> ModelSize:
    if size == "auto":
        return "auto"
    whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    if not whole or not MIN_SIZE <= size <= MAX_SIZE or size % SIZE_STEP:
        raise error(
            f"model_size is {size!r}.", f"Give a multiple of {SIZE_STEP} from {MIN_SIZE} to {MAX_SIZE}, or 'auto'."
        )
    return int(size)


def _mask_in_model(mask: Any, frame: Frame) -> Mask | None:
    """bool [T, T], or None when there is nothing inside."""
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray):
        raise PromptError(f"initial_mask is a {type(mask).__name__}; give a bool array [H, W].")
    if mask.dtype != np.bool_ or mask.shape != (frame.height, frame.width):
        raise PromptError(
            f"initial_mask is {mask.dtype} {list(mask.shape)}, the image needs bool {[frame.height, frame.width]}."
        )
    return frame.mask_to_model(mask) if mask.any() else None


def _clicks_in(frame: Frame, clicks: Sequence[Click]) -> list[ModelClick]:
    return [(*frame.model_pixel(click.x, click.y), click.positive) for click in clicks]


def at_levels(
    found: _Found, encoding: ImageEncoding, clicks: Sequence[ModelClick], previous: _Found | None, frame: Frame
) -> list[tuple[float, ...] | None]:
    """What a decoder pass looks like at each of level.LEVELS."""
    step = frame.size // random_walk.CELLS
    thinned = [(row // step, column // step, positive) for row, column, positive in clicks]
    before = None if previous is None else previous.shown(frame.valid, step) > 0
    return native.describe(found.shown(frame.valid, step), encoding.links.numpy(), thinned, before)


def _evidence(
    found: _Found, clicks: Sequence[ModelClick], previous: _Found | None, start: _Start, frame: Frame
) -> tuple[float, ...] | None:
    """What a decoder pass says about its quality. At the first click a given mask is the one that it corrects."""
    step = -(-frame.size // score.SIDE)
    thinned = [(row // step, column // step, positive) for row, column, positive in clicks]
    before = None
    if previous is not None:
        before = previous.shown(frame.valid, step) > 0
    elif start.mask is not None:
        before = start.mask[: frame.valid[0] : step, : frame.valid[1] : step]
    return native.evidence(found.shown(frame.valid, step), thinned, before)


def _keep_clicks(mask: Mask, clicked: Sequence[tuple[int, int, bool]]) -> None:
    """Put every clicked pixel (row, column, positive) on its side of the mask (bool [H, W], changed in place).

    Where the network disagrees with a click, the 3 x 3 pixels around it follow it, but never a pixel that was clicked
    itself. The last click on a pixel counts, and the later click where two neighbourhoods meet.
    """
    height, width = mask.shape
    sides: dict[tuple[int, int], bool] = {}
    for row, column, positive in clicked:
        sides.pop((row, column), None)
        sides[row, column] = positive
    for (row, column), positive in sides.items():
        if mask[row, column] == positive:
            continue
        mask[row, column] = positive
        for y in range(max(row - 1, 0), min(row + 2, height)):
            for x in range(max(column - 1, 0), min(column + 2, width)):
                if (y, x) not in sides:
                    mask[y, x] = positive


__all__ = [
    "CACHE_BYTES",
    "STAGES",
    "CacheInfo",
    "ImageInfo",
    "KnownImage",
    "ModelSize",
    "Segmentation",
    "Segmenter",
    "load_segmenter",
]
