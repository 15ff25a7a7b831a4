"""From bytes to upright RGB pixels, and between the frame of the image and the square frame of the model.

Decoding, its limits, the content key of an image, and `Frame`: the one place that knows how an image of H x W
pixels lies in the T x T pixels that the network sees. No network and no prompts here, and no fetching.

Letters: H, W height and width of the image; T side of the model frame, "size".
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from inter2former.config import InputConvention
from inter2former.errors import ConfigError, ImageError, PromptError
from inter2former.prompts import Box

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

MAX_PIXELS = 100_000_000
OUTSIDE = -100.0  # logit outside the box that is upsampled, as in the release

# Statistics of ImageNet in 0..255, in RGB order for "fit"; the release applies the same three numbers to B, G, R.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


# ---------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------

# The formats by their first bytes. The plugins are called by name: `PIL.Image.open` would try every format that it
# knows, and its own pixel limit is a process-wide setting that warns where ours refuses.
_MAGIC: tuple[tuple[str, bytes, Callable[[io.BytesIO], Image.Image]], ...] = (
    ("JPEG", b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    ("PNG", b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    ("WebP", b"RIFF", WebPImagePlugin.WebPImageFile),
    ("BMP", b"BM", BmpImagePlugin.BmpImageFile),
    ("TIFF", b"II*\0", TiffImagePlugin.TiffImageFile),
    ("TIFF", b"MM\0*", TiffImagePlugin.TiffImageFile),
    ("TIFF", b"II+\0", TiffImagePlugin.TiffImageFile),
    ("TIFF", b"MM\0+", TiffImagePlugin.TiffImageFile),
    ("GIF", b"GIF87a", GifImagePlugin.GifImageFile),
    ("GIF", b"GIF89a", GifImagePlugin.GifImageFile),
)
FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF")

# What Pillow raises for broken files; MemoryError and programming errors are not in the list on purpose.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    ZeroDivisionError,
    struct.error,
    Image.DecompressionBombError,
    Warning,  # a process that turns warnings into errors gets Pillow's doubts about a file this way
)

# Modes of Pillow that have a rule in `_to_rgb`; others, such as LAB, need a colour profile to mean anything.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I", "F")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8:
    """The picture in `data` as uint8 [H, W, 3], RGB, upright.

    Formats: JPEG, PNG, WebP, BMP, TIFF, GIF (first frame); no other is tried. The size in the header is compared
    with `max_pixels` before any pixel is made. Decoding holds up to 13 bytes a pixel at its peak.

    - EXIF orientation is applied, colour profiles are ignored.
    - Transparency is shown on white, as an annotation page shows it: the mask follows what the annotator sees.
    - 16-bit samples keep their high byte, as browsers do. Float and 32-bit integer grey is stretched so that the
      smallest finite value becomes 0 and the largest 255; NaN becomes 0, infinities go to their end of the range.

    raises  ImageError: another format, over the limit, truncated or broken
    """
    return np.array(_to_rgb(open_upright(data, max_pixels=max_pixels)), dtype=np.uint8)


def open_upright(data: bytes, *, max_pixels: int = MAX_PIXELS, formats: Collection[str] = FORMATS) -> Image.Image:
    """The decoded picture in its own mode (palette, 16 bit, alpha, ...), upright. Limits as in `decode_image`."""
    if not data:
        raise ImageError("The image is empty: 0 bytes.", f"Send {', '.join(formats)}.")
    name, plugin = _recognise(data, formats)
    try:
        with plugin(io.BytesIO(data)) as image:
            width, height = image.size
            _check_size(height, width, max_pixels)
            if image.mode not in _MODES and not image.mode.startswith("I;16"):
                raise ImageError(f"The {name} image has colours of the kind {image.mode}.", "Save it as RGB.")
            image.load()
            orientation = _orientation(image)
            return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    except ImageError:
        raise
    except _BROKEN as error:
        raise ImageError(
            f"The {name} image of {len(data)} bytes is truncated, broken or of an unsupported kind."
        ) from error


def _recognise(data: bytes, formats: Collection[str]) -> tuple[str, Callable[[io.BytesIO], Image.Image]]:
    for name, magic, plugin in _MAGIC:
        if name in formats and data.startswith(magic) and (name != "WebP" or data[8:12] == b"WEBP"):
            return name, plugin
    raise ImageError(f"The {len(data)} bytes are not an image that is read here.", f"Send {', '.join(formats)}.")


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"The image has no pixels: {width} x {height}.")
    if height * width > max_pixels:
        raise ImageError(
            f"The image has {width} x {height} = {height * width} pixels, over the limit of {max_pixels}.",
            "Scale it down, or raise the limit (max_pixels).",
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) when there is none or it is torn: the picture itself may still be whole."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _BROKEN:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as "RGB"."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_stretch(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _stretch(values: npt.NDArray[Any]) -> UInt8:
    """Float or wide integer grey as uint8, by the rule in `decode_image`."""

    def blocks() -> Iterator[npt.NDArray[np.float64]]:  # the whole picture in float64 would be large
        return (values[row : row + 64].astype(np.float64) for row in range(0, len(values), 64))

    low = float(min(np.min(block, where=np.isfinite(block), initial=np.inf) for block in blocks()))
    high = float(max(np.max(block, where=np.isfinite(block), initial=-np.inf) for block in blocks()))
    if low >= high:  # constant, or nothing finite
        return np.zeros(values.shape, np.uint8)
    filled = (np.nan_to_num(block, nan=low, posinf=high, neginf=low) for block in blocks())
    return np.concatenate([np.round((block - low) * (255.0 / (high - low))).astype(np.uint8) for block in filled])


def _on_white(rgba: Image.Image) -> Image.Image:
    page = Image.new("RGB", rgba.size, (255, 255, 255))
    page.paste(rgba, mask=rgba.getchannel("A"))
    return page


def as_rgb(image: bytes | bytearray | memoryview | npt.NDArray[Any], *, max_pixels: int = MAX_PIXELS) -> UInt8:
    """uint8 [H, W, 3] RGB, contiguous, from encoded bytes or from pixels.

    Arrays are uint8 [H, W], [H, W, 1] (grey), [H, W, 3] (RGB) or [H, W, 4] (RGBA, shown on white as in
    `decode_image`). A contiguous RGB array is returned itself, not copied.

    raises  ImageError with the dtype and shape of what was given
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image(bytes(image), max_pixels=max_pixels)
    if not isinstance(image, np.ndarray):
        raise ImageError(f"The image is a {type(image).__name__}.", "Give encoded bytes or a uint8 array.")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"The image array is {image.dtype} {list(image.shape)}.",
            "Give uint8 [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA).",
        )
    _check_size(image.shape[0], image.shape[1], max_pixels)
    if image.ndim == 3 and image.shape[2] == 4:
        return np.array(_on_white(Image.fromarray(np.ascontiguousarray(image))))
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(image)


def image_key(rgb: UInt8) -> str:
    """The name of an image's content: 32 hex digits over its shape and pixels (uint8 [H, W, 3])."""
    digest = hashlib.blake2b(f"{rgb.dtype}{rgb.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def choose_size(height: int, width: int, auto_sizes: Sequence[int]) -> int:
    """T for "auto": the smallest of `auto_sizes` that holds the longer side, else the largest."""
    longer = max(height, width)
    return min((size for size in auto_sizes if size >= longer), default=max(auto_sizes))


# ---------------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Bilinear samples along one axis: output k is first[k] * (1 - weight[k]) + second[k] * weight[k]."""

    first: npt.NDArray[np.intp]
    second: npt.NDArray[np.intp]
    weight: npt.NDArray[np.float32]

    def __getitem__(self, part: slice) -> _Axis:
        return _Axis(self.first[part], self.second[part], self.weight[part])


def _axis(n_in: int, n_out: int, n_kept: int) -> _Axis:
    """The first `n_kept` outputs of resizing `n_in` samples to `n_out`, pixel centres at .5, border clamped.

    In float32 as in F.interpolate (align_corners=False): at 4000 pixels the rounding of a position shows in the
    fourth digit of its weight. Beyond 2**20 float32 could not tell neighbours apart, so float64.
    """
    real: npt.DTypeLike = np.float32 if max(n_in, n_out) < 2**20 else np.float64
    centres = np.arange(n_kept, dtype=real) + 0.5
    step = np.divide(n_in, n_out, dtype=real)
    position = np.maximum(step * centres - 0.5, 0)
    first = np.minimum(position.astype(np.intp), n_in - 1)
    second = np.minimum(first + 1, n_in - 1)
    weight = np.clip(position - first.astype(real), 0, 1).astype(np.float32)
    return _Axis(first, second, weight)


def _lerp(values: torch.Tensor, dim: int, axis: _Axis) -> torch.Tensor:
    """`values` sampled along `dim`. Two products and a sum, each rounded: the same bits for any slice of the axis."""
    shape = [1] * values.ndim
    shape[dim] = -1
    weight = torch.from_numpy(axis.weight).reshape(shape)
    first = values.index_select(dim, torch.from_numpy(axis.first))
    second = values.index_select(dim, torch.from_numpy(axis.second))
    return first.mul_(1 - weight).add_(second.mul_(weight))


@dataclasses.dataclass(frozen=True)
class Frame:
    """How an image of `height` x `width` pixels lies in the model's square of `size` x `size` pixels.

    "fit": RGB; the longer side fills the square, the rest is 0 at the right or bottom after normalisation.
    "released": exactly the released implementation. BGR; normalised, padded with 0 at the right and bottom to
    multiples of 256, then to a square of S x S; the square is resized to T x T, bilinear without antialiasing.

    raises  ConfigError for an impossible size or convention, ImageError for an empty image
    """

    height: int
    width: int
    size: int
    convention: InputConvention = "fit"

    def __post_init__(self) -> None:
        if self.convention not in ("fit", "released"):
            raise ConfigError(f"Input convention {self.convention!r} is not 'fit' or 'released'.")
        if self.size < 16 or self.size % 16:
            raise ConfigError(f"Model size {self.size} is not a positive multiple of 16.")
        if self.height < 1 or self.width < 1:
            raise ImageError(f"The image has no pixels: {self.width} x {self.height}.")

    @functools.cached_property
    def _square(self) -> int:
        """S: side in image pixels of what fills the model frame."""
        longer = max(self.height, self.width)
        return longer if self.convention == "fit" else -(-longer // 256) * 256

    @property
    def scale(self) -> float:
        """Model pixels per image pixel."""
        return self.size / self._square

    @functools.cached_property
    def valid(self) -> tuple[int, int]:
        """(rows, columns) of the model frame that show the image; the rest is padding."""
        if self.convention == "released":
            return math.ceil(self.height * self.scale), math.ceil(self.width * self.scale)
        return max(1, round(self.height * self.scale)), max(1, round(self.width * self.scale))

    @functools.cached_property
    def _scale_yx(self) -> tuple[float, float]:
        """Model pixels per image pixel along y and x: "fit" rounds the shorter side to whole pixels."""
        if self.convention == "released":
            return self.scale, self.scale
        return self.valid[0] / self.height, self.valid[1] / self.width

    # -- image to model ------------------------------------------------------------------------------------------

    def prepare(self, rgb: UInt8) -> torch.Tensor:
        """uint8 [H, W, 3] to the network's input, float32 [3, T, T]."""
        if rgb.shape != (self.height, self.width, 3):
            raise ImageError(f"The image is {list(rgb.shape)}, the frame expects {[self.height, self.width, 3]}.")
        return self._prepare_fit(rgb) if self.convention == "fit" else self._prepare_released(rgb)

    def picture(self, rgb: UInt8) -> UInt8:
        """uint8 [H, W, 3] to uint8 [rows, columns, 3]: what a "fit" frame shows of the image, see `valid`."""
        rows, columns = self.valid
        if (rows, columns) == rgb.shape[:2]:
            return rgb
        shrinks = self.scale < 1
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return cv2.resize(rgb, (columns, rows), interpolation=how).astype(np.uint8, copy=False)

    def _prepare_fit(self, rgb: UInt8) -> torch.Tensor:
        rows, columns = self.valid
        out = torch.zeros(3, self.size, self.size)
        out[:, :rows, :columns] = _normalised(self.picture(rgb))
        return out

    def _prepare_released(self, rgb: UInt8) -> torch.Tensor:
        out = torch.zeros(3, self.size, self.size)
        if self._square == self.size:
            out[:, : self.height, : self.width] = _normalised(rgb[:, :, ::-1])
            return out
        # The S x S canvas is never made: at most 2 T rows and columns of it are looked at, and S may be 10**8.
        axes = []
        for n_pixels in (self.height, self.width):
            axis = _axis(self._square, self.size, self.size)
            axis = axis[: int(np.searchsorted(axis.first, n_pixels))]  # further on both samples are padding
            seen = np.unique(np.concatenate([axis.first, axis.second]))
            axes.append(
                (seen, _Axis(np.searchsorted(seen, axis.first), np.searchsorted(seen, axis.second), axis.weight))
            )
        (seen_rows, along_y), (seen_columns, along_x) = axes
        inside = (int(np.sum(seen_rows < self.height)), int(np.sum(seen_columns < self.width)))
        looked_at = rgb[seen_rows[: inside[0]]][:, seen_columns[: inside[1]], ::-1]
        canvas = torch.zeros(3, len(seen_rows), len(seen_columns))
        canvas[:, : inside[0], : inside[1]] = _normalised(looked_at)
        shown = _lerp(_lerp(canvas, 1, along_y), 2, along_x)
        out[:, : shown.shape[1], : shown.shape[2]] = shown
        return out

    def model_pixel(self, x: float, y: float) -> tuple[int, int]:
        """(row, column) of the model pixel under an image point; truncated, and kept inside the image's area."""
        scale_y, scale_x = self._scale_yx
        row, column = int(scale_y * y), int(scale_x * x)
        return min(max(row, 0), self.valid[0] - 1), min(max(column, 0), self.valid[1] - 1)

    def box_to_model(self, box: Box) -> tuple[int, int, int, int]:
        """(left, top, right, bottom), half-open: every model pixel that the box touches, at least one."""
        scale_y, scale_x = self._scale_yx
        box = box.clipped(self.height, self.width)
        top, left = self.model_pixel(box.x0, box.y0)
        right = min(max(math.ceil(scale_x * box.x1), left + 1), self.valid[1])
        bottom = min(max(math.ceil(scale_y * box.y1), top + 1), self.valid[0])
        return left, top, right, bottom

    def mask_to_model(self, mask: Bool) -> Bool:
        """bool [H, W] to bool [T, T]: a model pixel is inside when half of it is; what is not empty stays so."""
        if mask.shape != (self.height, self.width) or mask.dtype != np.bool_:
            raise PromptError(
                f"The mask is {mask.dtype} {list(mask.shape)}, the image needs bool {[self.height, self.width]}."
            )
        rows, columns = self.valid
        parts = min(4, math.ceil(1 / self.scale))  # samples along each side of a model pixel
        y, x = (
            np.minimum((np.arange(n * parts) + 0.5) / (parts * scale), limit - 1).astype(np.intp)
            for n, scale, limit in zip(self.valid, self._scale_yx, mask.shape, strict=True)
        )
        samples = mask[y][:, x].view(np.uint8) * np.uint8(255)
        out = np.zeros((self.size, self.size), np.bool_)
        out[:rows, :columns] = cv2.resize(samples, (columns, rows), interpolation=cv2.INTER_AREA) > 127
        if not out.any() and mask.any():  # thinner than half a model pixel everywhere
            at_y, at_x = np.nonzero(mask)
            scale_y, scale_x = self._scale_yx
            out[
                np.minimum((at_y * scale_y).astype(np.intp), rows - 1),
                np.minimum((at_x * scale_x).astype(np.intp), columns - 1),
            ] = True
        return out

    # -- model to image ------------------------------------------------------------------------------------------

    @functools.cached_property
    def _back(self) -> tuple[_Axis, _Axis]:
        """For each row and column of the image, the two of the model frame that it lies between."""
        if self.convention == "released":
            return _axis(self.size, self._square, self.height), _axis(self.size, self._square, self.width)
        return _axis(self.valid[0], self.height, self.height), _axis(self.valid[1], self.width, self.width)

    def logits_to_image(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [T, T] to float32 [H, W], bilinear."""
        self._check_logits(logits, (self.size, self.size))
        along_y, along_x = self._back
        return _lerp(_lerp(logits, 0, along_y), 1, along_x)

    def mask_from_logits(self, logits: torch.Tensor, box: tuple[int, int, int, int] | None = None) -> Bool:
        """bool [H, W], equal to `logits_to_image(logits) > 0`, but much cheaper.

        With a `box` (left, top, right, bottom; in tokens) `logits` are those of its pixels, float32 [16 h, 16 w];
        they are OUTSIDE everywhere else. Between four logits of one sign the sign is known, so only the pixels along
        the outline are interpolated.
        """
        left, top, right, bottom = (16 * side for side in box) if box else (0, 0, self.size, self.size)
        self._check_logits(logits, (bottom - top, right - left))
        mask = np.zeros((self.height, self.width), np.bool_)
        rows, along_y = _between(self._back[0], top, bottom)
        columns, along_x = _between(self._back[1], left, right)
        if rows.start == rows.stop or columns.start == columns.stop:
            return mask
        values = logits.numpy()
        # One cell for each pair of neighbouring model rows and columns that meet in the part.
        y0, y1 = int(along_y.first[0]), int(along_y.second[-1]) + 1
        x0, x1 = int(along_x.first[0]), int(along_x.second[-1]) + 1
        above, below = max(y0, top), min(y1, bottom)
        before, behind = max(x0, left), min(x1, right)
        positive = np.zeros((y1 - y0, x1 - x0), np.uint8)
        positive[above - y0 : below - y0, before - x0 : behind - x0] = (
            values[above - top : below - top, before - left : behind - left] > 0
        )
        pairs = positive.copy()
        pairs[:-1] += positive[1:]
        pairs[-1] += positive[-1]
        corners = pairs.copy()
        corners[:, :-1] += pairs[:, 1:]
        corners[:, -1] += pairs[:, -1]
        spread = corners[:, along_x.first - x0][along_y.first - y0]
        spread -= 1
        part = spread == 3
        at = np.flatnonzero(spread < 3)  # one to three positive corners; none has become 255
        at_y, at_x = np.divmod(at, part.shape[1])
        part.reshape(-1)[at] = _bilinear_at(values, (top, left), along_y, along_x, at_y, at_x) > 0
        mask[rows, columns] = part
        return mask

    def _check_logits(self, logits: torch.Tensor, shape_hw: tuple[int, int]) -> None:
        if logits.shape != shape_hw or logits.dtype != torch.float32:
            raise ConfigError(
                f"Logits are {logits.dtype} {list(logits.shape)}, expected torch.float32 {list(shape_hw)}."
            )


def _normalised(pixels: UInt8) -> torch.Tensor:
    """uint8 [h, w, 3] to float32 [3, h, w], (x - mean) / std with the constants in the order of the channels."""
    planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).to(torch.float32)
    return planes.sub_(torch.tensor(MEAN).reshape(3, 1, 1)).div_(torch.tensor(STD).reshape(3, 1, 1))


def _between(axis: _Axis, start: int, stop: int) -> tuple[slice, _Axis]:
    """The outputs of `axis` that look at any input in [start, stop)."""
    part = slice(int(np.searchsorted(axis.second, start)), int(np.searchsorted(axis.first, stop)))
    part = slice(part.start, max(part.start, part.stop))
    return part, axis[part]


def _bilinear_at(
    values: npt.NDArray[np.float32],
    origin: tuple[int, int],
    along_y: _Axis,
    along_x: _Axis,
    at_y: npt.NDArray[np.intp],
    at_x: npt.NDArray[np.intp],
) -> npt.NDArray[np.float32]:
    """Single outputs of the two `_lerp` in `Frame.logits_to_image`, in the same order and thus with the same bits.

    `values` are the logits from `origin` (row, column) on; OUTSIDE beyond.
    """

    def look(rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        rows, columns = rows - origin[0], columns - origin[1]
        here = (rows >= 0) & (rows < values.shape[0]) & (columns >= 0) & (columns < values.shape[1])
        found = np.full(len(rows), OUTSIDE, np.float32)
        found[here] = values[rows[here], columns[here]]
        return found

    first_y, second_y, weight_y = along_y.first[at_y], along_y.second[at_y], along_y.weight[at_y]
    first_x, second_x, weight_x = along_x.first[at_x], along_x.second[at_x], along_x.weight[at_x]
    one = np.float32(1)
    before = look(first_y, first_x) * (one - weight_y) + look(second_y, first_x) * weight_y
    after = look(first_y, second_x) * (one - weight_y) + look(second_y, second_x) * weight_y
    out: npt.NDArray[np.float32] = before * (one - weight_x) + after * weight_x
    return out


__all__ = ["MAX_PIXELS", "OUTSIDE", "Frame", "as_rgb", "choose_size", "decode_image", "image_key", "open_upright"]
