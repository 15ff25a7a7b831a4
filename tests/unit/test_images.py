"""Decoding within limits (R28), upright frames (R5), and the two input conventions against their definition."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from inter2former.errors import ConfigError, ImageError, Inter2FormerError, PromptError
from inter2former.images import Frame, as_rgb, choose_size, decode_image, image_key
from inter2former.prompts import Box


def smooth(height: int, width: int) -> np.ndarray:
    """A picture that lossy formats keep within a few steps."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) % 64 + 96], 2).astype(
        np.uint8
    )


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(picture: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with_header(width: int, height: int, *more: bytes, body: bytes = b"") -> bytes:
    """An 8-bit grey PNG whose header says what we like."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(more)
        + png_chunk(b"IDAT", zlib.compress(body))
        + png_chunk(b"IEND", b"")
    )


LOSSLESS: dict[str, Callable[[np.ndarray], bytes]] = {
    "png": lambda p: encoded(p, "PNG"),
    "png interlaced by opencv": lambda p: cv2.imencode(".png", p[:, :, ::-1])[1].tobytes(),
    "bmp": lambda p: encoded(p, "BMP"),
    "tiff": lambda p: encoded(p, "TIFF"),
    "tiff lzw": lambda p: encoded(p, "TIFF", compression="tiff_lzw"),
    "bigtiff": lambda p: encoded(p, "TIFF", big_tiff=True),
    "webp": lambda p: encoded(p, "WEBP", lossless=True),
}
LOSSY: dict[str, Callable[[np.ndarray], bytes]] = {
    "jpeg": lambda p: encoded(p, "JPEG", quality=95, subsampling=0),
    "progressive jpeg": lambda p: encoded(p, "JPEG", quality=95, subsampling=0, progressive=True),
    "webp": lambda p: encoded(p, "WEBP", quality=95),
    "cmyk jpeg": lambda p: encoded(Image.fromarray(p).convert("CMYK"), "JPEG", quality=95),
}


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (37, 23)])
def test_r28_lossless_formats_give_the_pixels_back(name: str, size: tuple[int, int]) -> None:
    picture = noise(*size)
    decoded = decode_image(LOSSLESS[name](picture))
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, picture)


@pytest.mark.parametrize("name", LOSSY)
def test_r28_lossy_formats_come_close(name: str) -> None:
    picture = smooth(48, 64)
    decoded = decode_image(LOSSY[name](picture)).astype(int)
    assert decoded.shape == picture.shape
    assert np.abs(decoded - picture).mean() < 4


def test_r28_a_gif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(data), np.broadcast_to([255, 0, 0], (7, 9, 3)))


def test_r28_kinds_of_grey() -> None:
    grey = noise(12, 10)[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, 2)
    np.testing.assert_array_equal(decode_image(encoded(grey, "PNG")), expected)
    bits = grey > 127
    np.testing.assert_array_equal(decode_image(encoded(bits, "PNG")), np.repeat(bits[:, :, None], 3, 2) * np.uint8(255))
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(grey).quantize(256), "PNG")), expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_r28_sixteen_bits_keep_the_high_byte(format: str) -> None:
    values = np.array([[0, 255, 256, 257, 32768, 65279, 65280, 65535]], np.uint16)
    decoded = decode_image(encoded(values, format))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 1, 1, 128, 254, 255, 255])
    np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


@pytest.mark.parametrize("extension", [".png", ".tiff"])
def test_r28_sixteen_bit_colour(extension: str) -> None:
    values = noise(6, 5).astype(np.uint16) << 8
    data = cv2.imencode(extension, values[:, :, ::-1].copy())[1].tobytes()
    np.testing.assert_array_equal(decode_image(data), values >> 8)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([[0.0, 0.5, 1.0]], [0, 128, 255], id="unit range"),
        pytest.param([[-1000.0, 0.0, 1000.0]], [0, 128, 255], id="wide"),
        pytest.param([[np.nan, 2.0, 4.0]], [0, 0, 255], id="nan is darkest"),
        pytest.param([[-np.inf, np.inf, 1.0, 3.0]], [0, 255, 0, 255], id="infinities clip"),
        pytest.param([[7.0, 7.0]], [0, 0], id="constant"),
        pytest.param([[np.nan, np.inf]], [0, 0], id="nothing finite"),
    ],
)
def test_r28_float_grey_is_stretched(values: list[list[float]], expected: list[int]) -> None:
    decoded = decode_image(encoded(np.array(values, np.float32), "TIFF"))
    np.testing.assert_array_equal(decoded[0, :, 0], expected)


def test_r28_wide_integers_are_stretched() -> None:
    decoded = decode_image(encoded(np.array([[-70000, 0, 70000]], np.int32), "TIFF"))
    np.testing.assert_array_equal(decoded[0, :, 1], [0, 128, 255])


def test_r28_transparency_is_shown_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    expected = [[200, 0, 0], [255, 255, 255], [127, 127, 127]]
    for data in (rgba, encoded(rgba, "PNG"), encoded(rgba, "TIFF"), encoded(rgba, "WEBP", lossless=True)):
        np.testing.assert_array_equal(as_rgb(data)[0], expected)
    grey_alpha = Image.merge("LA", (Image.new("L", (1, 1), 10), Image.new("L", (1, 1), 0)))
    np.testing.assert_array_equal(decode_image(encoded(grey_alpha, "PNG"))[0, 0], [255, 255, 255])


def test_r28_a_transparent_palette_entry_is_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode_image(encoded(picture, "PNG", transparency=0)), [[[255] * 3, [200, 100, 50]]])
    colour_key = encoded(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), "PNG", transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode_image(colour_key), [[[255] * 3, [4, 5, 6]]])


def test_r28_a_colour_profile_is_ignored() -> None:
    picture = noise(5, 5)
    np.testing.assert_array_equal(decode_image(encoded(picture, "PNG", icc_profile=b"not a profile" * 40)), picture)


def test_r28_colours_without_a_rule_are_refused() -> None:
    with pytest.raises(ImageError, match="colours of the kind LAB"):
        decode_image(encoded(Image.new("LAB", (3, 3)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_r5_every_exif_orientation_comes_out_upright(orientation: int, format: str) -> None:
    """A dark picture with one bright block; the block is found where a viewer shows it."""
    upright = np.zeros((48, 80, 3), np.uint8)
    upright[8:16, 56:72] = 255
    stored = {  # how a camera stores the upright picture under each tag value
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = encoded(np.ascontiguousarray(stored), format, exif=exif, **options)
    decoded = decode_image(data)
    assert decoded.shape == upright.shape
    np.testing.assert_array_equal(decoded > 127, upright > 127)


@pytest.mark.parametrize("orientation", [0, 9, 4711])
def test_r5_an_unknown_orientation_means_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = noise(4, 6)
    np.testing.assert_array_equal(decode_image(encoded(picture, "PNG", exif=exif)), picture)


def test_r28_torn_exif_does_not_cost_the_picture() -> None:
    picture = noise(4, 6)
    np.testing.assert_array_equal(
        decode_image(encoded(picture, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")), picture
    )


@pytest.mark.parametrize("sixteenth", range(16))
@pytest.mark.parametrize("name", [*LOSSLESS, "jpeg", "progressive jpeg", "lossy webp", "gif"])
def test_r28_a_truncated_file_is_an_error(name: str, sixteenth: int) -> None:
    picture = noise(40, 50)
    makers = {**LOSSY, **LOSSLESS, "lossy webp": LOSSY["webp"], "gif": lambda p: encoded(p, "GIF")}
    data = makers[name](picture)
    with pytest.raises(ImageError, match=r"bytes"):
        decode_image(data[: len(data) * sixteenth // 16])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_r28_flipped_bytes_give_a_picture_or_an_image_error(name: str, seed: int) -> None:
    data = bytearray({**LOSSY, **LOSSLESS}[name](noise(20, 30)))
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(data), 5):
        data[at] ^= 1 << rng.integers(8)
    try:
        decoded = decode_image(bytes(data), max_pixels=1_000_000)
    except ImageError:
        return
    assert decoded.ndim == 3
    assert decoded.size <= 3_000_000


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0", id="one byte"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", id="EPS renamed .jpg"),
        pytest.param(b"\xc5\xd0\xd3\xc6" + b"\0" * 60, id="EPS with a DOS header"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", id="SVG"),
        pytest.param(b"8BPS\0\x01" + b"\0" * 60, id="PSD"),
        pytest.param(b"SIMPLE  =                    T" + b" " * 50, id="FITS"),
        pytest.param(b"P6 2 2 255 " + b"\0" * 12, id="PPM"),
        pytest.param(b"\0\0\x01\0\x01\0\x10\x10" + b"\0" * 60, id="ICO"),
        pytest.param(b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 60, id="JPEG 2000"),
        pytest.param(b"\0\0\0\x1cftypavif" + b"\0" * 60, id="AVIF"),
        pytest.param(b"RIFF\x24\0\0\0WAVEfmt ", id="WAV"),
        pytest.param(b"PK\x03\x04" + b"\0" * 60, id="zip"),
        pytest.param(b"<!DOCTYPE html><title>Sign in</title>", id="a login page"),
    ],
)
def test_r28_other_formats_are_not_even_tried(data: bytes) -> None:
    with pytest.raises(ImageError, match="Send JPEG, PNG, WebP, BMP, TIFF, GIF"):
        decode_image(data)


def test_r28_the_limit_holds_from_the_header_and_is_named() -> None:
    picture = noise(10, 10)
    assert decode_image(encoded(picture, "PNG"), max_pixels=100).shape == (10, 10, 3)
    for format in ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"):
        with pytest.raises(ImageError, match="10 x 10 = 100 pixels, over the limit of 99"):
            decode_image(encoded(picture, format), max_pixels=99)
    with pytest.raises(ImageError, match="10 x 10 = 100 pixels, over the limit of 99"):
        as_rgb(picture, max_pixels=99)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (20_000, 20_000, "400000000 pixels, over the limit of 100000000"),
        (2**31 - 1, 2**31 - 1, "over the limit"),
        (9_500, 9_500, "truncated, broken"),  # Pillow alone would warn about it
        (64, 64, "truncated, broken"),
        (0, 5, "broken|no pixels"),
    ],
)
def test_r28_a_header_that_lies(width: int, height: int, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(png_with_header(width, height, body=b"\0" * 100))


def test_r28_compressed_text_cannot_blow_up() -> None:
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 30_000_000, 9))
    with pytest.raises(ImageError, match="truncated, broken"):
        decode_image(png_with_header(2, 2, bomb, body=b"\0" * 6))


def test_r28_a_bomb_takes_no_memory() -> None:
    """The process that refuses a picture of 30 000 x 30 000 pixels grows by less than a tenth of what it would hold."""
    script = (
        "import resource, sys\n"
        "from inter2former.errors import ImageError\n"
        "from inter2former.images import decode_image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data = sys.stdin.buffer.read(); before = peak()\n"
        "try: decode_image(data)\n"
        "except ImageError: print(peak() - before)\n"
    )
    data = png_with_header(30_000, 30_000, body=b"\0" * 30_001 * 100)
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert int(done.stdout) < 90_000  # KiB


def test_text_of_pngs_is_no_obstacle() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 1000, zip=True)
    picture = noise(3, 3)
    np.testing.assert_array_equal(decode_image(encoded(picture, "PNG", pnginfo=info)), picture)


# -- pixels that are already there ---------------------------------------------------------------------------------


def test_as_rgb_takes_what_numpy_users_have() -> None:
    rgb = noise(5, 4)
    assert as_rgb(rgb) is rgb
    np.testing.assert_array_equal(as_rgb(rgb[:, ::-1]), rgb[:, ::-1])
    assert as_rgb(rgb[:, ::-1]).flags.c_contiguous
    grey = rgb[:, :, 0]
    np.testing.assert_array_equal(as_rgb(grey), np.stack([grey] * 3, 2))
    np.testing.assert_array_equal(as_rgb(grey[:, :, None]), np.stack([grey] * 3, 2))
    data = encoded(rgb, "PNG")
    for given in (data, bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(as_rgb(given), rgb)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"uint8 \[4, 4, 2\]"),
        (np.zeros(4, np.uint8), r"uint8 \[4\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"uint8 \[1, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels: 4 x 0"),
        (np.zeros((4, 4), np.bool_), r"bool \[4, 4\]"),
        ("photo.jpg", "a str"),
        (None, "a NoneType"),
    ],
)
def test_as_rgb_names_what_it_cannot_take(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        as_rgb(image)


def test_the_key_names_the_content() -> None:
    picture = noise(6, 4)
    key = image_key(picture)
    assert len(key) == 32
    assert key == image_key(picture.copy()) == image_key(np.asfortranarray(picture))
    assert key != image_key(picture.reshape(4, 6, 3))
    changed = picture.copy()
    changed[5, 3, 2] ^= 1
    assert key != image_key(changed)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(1, 1, 512), (512, 300, 512), (513, 300, 768), (300, 1024, 1024), (1500, 1025, 1536), (9000, 9, 2048)],
)
def test_auto_size_is_the_smallest_that_holds_the_longer_side(height: int, width: int, size: int) -> None:
    assert choose_size(height, width, (512, 768, 1024, 1536, 2048)) == size


# -- frames --------------------------------------------------------------------------------------------------------

MEAN = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)
SIZES = [(1, 1), (100, 77), (256, 256), (257, 256), (300, 500), (1, 900), (700, 3), (1030, 514)]


def resized(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(picture[None], size=size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("size", [256, 512, 1024])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_released_input_is_the_whole_canvas_resized(height: int, width: int, size: int) -> None:
    """Against the definition, step by step: BGR, normalise, pad to multiples of 256, pad to a square, resize."""
    rgb = noise(height, width)
    bgr = torch.from_numpy(rgb[:, :, ::-1].copy()).permute(2, 0, 1).float()
    side = max(-(-height // 256), -(-width // 256)) * 256
    canvas = torch.nn.functional.pad((bgr - MEAN) / STD, (0, side - width, 0, side - height))
    expected = canvas if side == size else resized(canvas, (size, size))
    # 1e-5: positions are rounded once more or less by fused multiply-adds, depending on the CPU.
    torch.testing.assert_close(Frame(height, width, size, "released").prepare(rgb), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [256, 1024])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_released_logits_go_back_through_the_canvas(height: int, width: int, size: int) -> None:
    logits = torch.randn(size, size, generator=torch.Generator().manual_seed(3))
    side = max(-(-height // 256), -(-width // 256)) * 256
    expected = resized(logits[None], (side, side))[0, :height, :width]
    back = Frame(height, width, size, "released").logits_to_image(logits)
    torch.testing.assert_close(back, expected, rtol=0, atol=1e-4)


def test_released_geometry_is_that_of_the_padded_square() -> None:
    frame = Frame(300, 500, 1024, "released")
    assert frame.scale == 2.0
    assert frame.model_pixel(499.9, 299.9) == (599, 999)
    assert frame.valid == (600, 1000)
    assert frame.box_to_model(Box(10.2, 20.2, 30.4, 40.6)) == (20, 40, 61, 82)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fit_input_is_normalised_rgb_and_zero_elsewhere(height: int, width: int) -> None:
    frame = Frame(height, width, 256)
    rgb = np.broadcast_to(np.array([200, 100, 50], np.uint8), (height, width, 3)).copy()
    prepared = frame.prepare(rgb)
    rows, columns = frame.valid
    assert max(rows, columns) == 256
    assert prepared.dtype == torch.float32
    colour = (torch.tensor([200.0, 100.0, 50.0]).reshape(3, 1, 1) - MEAN) / STD
    torch.testing.assert_close(prepared[:, :rows, :columns], colour.expand(3, rows, columns))
    assert not prepared[:, rows:].any()
    assert not prepared[:, :, columns:].any()


def test_fit_leaves_pixels_of_the_right_size_alone() -> None:
    rgb = noise(100, 256)
    expected = (torch.from_numpy(rgb).permute(2, 0, 1).float() - MEAN) / STD
    torch.testing.assert_close(Frame(100, 256, 256).prepare(rgb)[:, :100], expected)


def test_fit_shrinks_with_antialiasing() -> None:
    checkerboard = np.indices((1024, 1024)).sum(0) % 2 * np.uint8(255)
    prepared = Frame(1024, 1024, 256).prepare(as_rgb(checkerboard.astype(np.uint8)))
    spread = prepared.amax((1, 2)) - prepared.amin((1, 2))
    assert spread.max() < 0.02


@pytest.mark.parametrize("convention", ["fit", "released"])
def test_preparing_does_not_touch_the_image_and_takes_read_only_ones(convention: Any) -> None:
    rgb = noise(300, 200)
    before = rgb.copy()
    rgb.flags.writeable = False
    for size in (256, 512):
        Frame(300, 200, size, convention).prepare(rgb)
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize("convention", ["fit", "released"])
@pytest.mark.parametrize(("height", "width"), [(1, 2_000_000), (2_000_000, 1)])
def test_r28_the_longest_of_images_needs_no_square_canvas(convention: Any, height: int, width: int) -> None:
    frame = Frame(height, width, 256, convention)
    assert frame.prepare(np.full((height, width, 3), 255, np.uint8)).shape == (3, 256, 256)
    assert frame.model_pixel(width - 1, height - 1) in ((0, 255), (255, 0), (0, 254), (254, 0))
    assert frame.mask_from_logits(torch.ones(256, 256)).all()
    assert frame.mask_to_model(np.ones((height, width), np.bool_)).sum() in (255, 256)


@pytest.mark.parametrize("convention", ["fit", "released"])
def test_a_mask_survives_the_way_to_the_model_and_back(convention: Any) -> None:
    y, x = np.mgrid[:300, :420]
    mask = (y - 140) ** 2 + (x - 200) ** 2 < 90**2
    for size in (256, 512, 1024):
        frame = Frame(300, 420, size, convention)
        there = frame.mask_to_model(mask)
        assert there.shape == (size, size)
        back = frame.mask_from_logits(torch.from_numpy(there).float() - 0.5)
        assert (mask & back).sum() / (mask | back).sum() > 0.97


def test_a_mask_of_one_pixel_does_not_vanish_on_the_way_to_the_model() -> None:
    mask = np.zeros((3000, 2000), np.bool_)
    mask[1501, 999] = True
    frame = Frame(3000, 2000, 256)
    assert np.argwhere(frame.mask_to_model(mask)).tolist() == [list(frame.model_pixel(999, 1501))]
    assert not frame.mask_to_model(np.zeros_like(mask)).any()


def test_r5_a_coloured_pixel_is_seen_where_the_click_on_it_goes() -> None:
    for convention in ("fit", "released"):
        for height, width, x, y in [(200, 256, 255, 199), (500, 400, 0, 0), (90, 133, 77, 31), (40, 600, 300, 39)]:
            frame = Frame(height, width, 1024, convention)  # type: ignore[arg-type]
            rgb = np.zeros((height, width, 3), np.uint8)
            rgb[y, x] = 255
            prepared = frame.prepare(rgb)[0]
            shown = prepared[: frame.valid[0], : frame.valid[1]] - prepared[: frame.valid[0], : frame.valid[1]].min()
            assert shown[frame.model_pixel(x + 0.5, y + 0.5)] > 0.4 * shown.max()  # the rest went to neighbours


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Frame(0, 5, 256), ImageError, "no pixels: 5 x 0"),
        (lambda: Frame(5, 5, 250), ConfigError, "250 is not a positive multiple of 16"),
        (lambda: Frame(5, 5, 0), ConfigError, "0 is not"),
        (lambda: Frame(5, 5, 256, "stretch"), ConfigError, "'stretch'"),  # type: ignore[arg-type]
        (lambda: Frame(5, 6, 256).prepare(np.zeros((6, 5, 3), np.uint8)), ImageError, r"\[6, 5, 3\]"),
        (lambda: Frame(5, 6, 256).mask_to_model(np.zeros((6, 5), np.bool_)), PromptError, r"\[6, 5\]"),
        (lambda: Frame(5, 6, 256).mask_to_model(np.zeros((5, 6), np.uint8)), PromptError, "uint8"),  # type: ignore[arg-type]
        (lambda: Frame(5, 6, 256).logits_to_image(torch.zeros(5, 6)), ConfigError, r"\[5, 6\]"),
        (lambda: Frame(5, 6, 256).mask_from_logits(torch.zeros(256, 256).double()), ConfigError, "float64"),
        (lambda: Frame(5, 6, 256).mask_from_logits(torch.zeros(256, 256), (0, 1, 2, 3)), ConfigError, r"\[32, 32\]"),
    ],
)
def test_frames_refuse_what_does_not_fit(
    make: Callable[[], object], error: type[Inter2FormerError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_frames_compare_by_value() -> None:
    first, second = Frame(5, 6, 256), Frame(5, 6, 256)
    assert first.valid == (213, 256)  # computed once, no part of the value
    assert first == second
    assert hash(first) == hash(second)
