"""Masks in and out: known answers, round trips of the hard shapes (R6), hostile input (R29), pictures."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from inter2former.errors import PromptError
from inter2former.masks import (
    MAX_POLYGONS,
    MAX_VERTICES,
    boundary,
    mask_to_png,
    mask_to_polygons,
    overlay,
    png_to_mask,
    polygons_to_mask,
    rle_decode,
    rle_encode,
)
from inter2former.prompts import Box, Click


def drawn(*rows: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in row] for row in rows])


def ring(radius: int, hole: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x**2 + y**2 <= radius**2) & (x**2 + y**2 >= hole**2)


SHAPES = {
    "empty": np.zeros((5, 7), np.bool_),
    "full": np.ones((5, 7), np.bool_),
    "one pixel": drawn("...", ".#.", "..."),
    "1x1 in": np.ones((1, 1), np.bool_),
    "1x1 out": np.zeros((1, 1), np.bool_),
    "checkerboard": np.indices((8, 9)).sum(0) % 2 == 0,
    "hole": drawn("#####", "#...#", "#.#.#", "#...#", "#####"),
    "hole of one pixel": drawn("###", "#.#", "###"),
    "bridge": drawn("##...##", "#######", "##...##"),
    "diagonal": np.eye(6, dtype=np.bool_),
    "holes that touch": drawn("####", "#.##", "##.#", "####"),
    "hole at a corner": drawn("####", "#.#.", "####", "###."),
    "one row": drawn("#..##.#"),
    "one column": drawn("#..##.#").T,
    "ring": ring(40, 25),
}


@pytest.mark.parametrize("name", SHAPES)
def test_r6_what_is_written_can_be_read_back(name: str) -> None:
    mask = SHAPES[name]
    np.testing.assert_array_equal(rle_decode(rle_encode(mask)), mask)
    np.testing.assert_array_equal(png_to_mask(mask_to_png(mask)), mask)
    np.testing.assert_array_equal(polygons_to_mask(mask_to_polygons(mask, 0), *mask.shape), mask)


@pytest.mark.parametrize("name", SHAPES)
def test_r6_slices_and_read_only_masks_are_masks(name: str) -> None:
    mask = np.repeat(np.repeat(SHAPES[name], 2, 0), 2, 1)[::2, ::2]
    mask.flags.writeable = False
    np.testing.assert_array_equal(rle_decode(rle_encode(mask)), mask)
    np.testing.assert_array_equal(png_to_mask(mask_to_png(mask)), mask)
    np.testing.assert_array_equal(polygons_to_mask(mask_to_polygons(mask, 0), *mask.shape), mask)
    assert not (boundary(mask) & ~mask).any()


# -- COCO run lengths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        (drawn("..", ".#"), [3, 1]),
        (drawn("#.", ".."), [0, 1, 3]),
        (drawn(".#.", ".#."), [2, 2, 2]),
        (drawn("...", "..."), [6]),
        (drawn("###", "###"), [0, 6]),
    ],
)
def test_rle_runs_down_the_columns_and_starts_outside(mask: np.ndarray, counts: list[int]) -> None:
    rle = rle_encode(mask)
    assert rle == {"size": list(mask.shape), "counts": counts}
    assert all(type(number) is int for values in rle.values() for number in values)  # json.dumps takes nothing else


def test_rle_reads_other_writers() -> None:
    expected = drawn(".#.", ".#.")
    for counts in ([2, 2, 2], (2, 2, 2), np.array([2, 2, 2]), [2, 0, 0, 2, 2], "222", b"222"):
        np.testing.assert_array_equal(rle_decode({"size": [2, 3], "counts": counts}), expected)


def compressed(counts: list[int]) -> str:
    """COCO's text form of run lengths, written out from its description."""
    text = ""
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
            if not more:
                break
    return text


@pytest.mark.parametrize("name", SHAPES)
def test_rle_reads_cocos_compressed_text(name: str) -> None:
    rle = rle_encode(SHAPES[name])
    text = compressed(rle["counts"])
    np.testing.assert_array_equal(rle_decode({"size": rle["size"], "counts": text}), SHAPES[name])


def test_rle_reads_a_compressed_mask_of_another_writer() -> None:
    """Written by CVAT's Datumaro 1.0 export; its COCO 1.0 export says 4811 pixels for the same mask."""
    text = (
        "[g9?T46K4L4L4M2N2N2N2N2N2N2N2N2N2O0O2O0O2N2O0O2O000O2O0O2O00000O2O00000OeNjM9U2GkM9U2GkM9U2GkM9U2GkM9U2GkM9U2GkM"
        "9U2GkM9U2GkM9U2GkM9U2GkM9U2GkM9U2T100000000000000001N1000001N1000001N101N10001N101N2N101N101N2N2N2N2N2N2N2N2N2N3"
        "L4L4L5J^e6FoZI000000000\\i2"
    )
    mask = rle_decode({"size": [150, 226], "counts": text})
    assert mask.sum() == 4811
    assert compressed(rle_encode(mask)["counts"]) == text


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        pytest.param(None, "object with 'size' and 'counts'", id="nothing"),
        pytest.param([1, 2], "object with", id="a list"),
        pytest.param({"counts": [4]}, "object with", id="no size"),
        pytest.param({"size": [2, 2]}, "object with", id="no counts"),
        pytest.param({"size": "22", "counts": [4]}, "is \\[height, width\\]", id="size is text"),
        pytest.param({"size": [2, 2, 1], "counts": [4]}, "is \\[height, width\\]", id="three sizes"),
        pytest.param({"size": [2.0, 2], "counts": [4]}, "height is 2.0", id="float size"),
        pytest.param({"size": [True, 4], "counts": [4]}, "height is True", id="bool size"),
        pytest.param({"size": [0, 4], "counts": [0]}, "height is 0", id="no rows"),
        pytest.param({"size": [4, -1], "counts": [4]}, "width is -1", id="negative size"),
        pytest.param({"size": [2, 2], "counts": [3]}, "cover 3 pixels; 2 x 2 are 4", id="too few"),
        pytest.param({"size": [2, 2], "counts": [3, 3]}, "cover 6 pixels", id="too many"),
        pytest.param({"size": [2, 2], "counts": []}, "list of run lengths", id="no runs"),
        pytest.param({"size": [2, 2], "counts": 4}, "list of run lengths", id="a number"),
        pytest.param({"size": [2, 2], "counts": {"a": 1}}, "list of run lengths", id="an object"),
        pytest.param({"size": [2, 2], "counts": [2, -1, 3]}, "run of -1", id="negative run"),
        pytest.param({"size": [2, 2], "counts": [2**62, 2**62, 4]}, "run of", id="sum overflows"),
        pytest.param({"size": [2, 2], "counts": [2**64, 4]}, "whole numbers", id="beyond 64 bits"),
        pytest.param({"size": [2, 2], "counts": [10**400]}, "whole numbers", id="beyond everything"),
        pytest.param({"size": [2, 2], "counts": [1.5, 2.5]}, "whole numbers", id="fractions"),
        pytest.param({"size": [2, 2], "counts": ["4"]}, "whole numbers", id="texts"),
        pytest.param({"size": [2, 2], "counts": [None, 4]}, "whole numbers", id="null"),
        pytest.param({"size": [2, 2], "counts": [[1, 3]]}, "whole numbers", id="nested"),
        pytest.param({"size": [2, 2], "counts": [[1], 3]}, "whole numbers", id="ragged"),
        pytest.param({"size": [2, 2], "counts": [True, False]}, "whole numbers", id="booleans"),
        pytest.param({"size": [2, 2], "counts": [0] * 100 + [4]}, "101 runs for 4 pixels", id="more runs than pixels"),
        pytest.param({"size": [2, 2], "counts": ""}, "list of run lengths", id="empty text"),
        pytest.param({"size": [2, 2], "counts": "é"}, "character", id="not ASCII"),
        pytest.param({"size": [2, 2], "counts": "4\x01"}, "character", id="not a digit"),
        pytest.param({"size": [2, 2], "counts": "P"}, "cut short", id="text cut short"),
        pytest.param({"size": [2, 2], "counts": "o" * 50}, "endless number", id="endless number"),
        pytest.param({"size": [2, 2], "counts": "O"}, "run of -1", id="negative in text"),
        pytest.param({"size": [2, 2], "counts": "9"}, "run of 9", id="run over the size in text"),
    ],
)
def test_r29_an_rle_that_lies_is_named(rle: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        rle_decode(rle)


@pytest.mark.parametrize(
    "read",
    [
        lambda: rle_decode({"size": [10**6, 10**6], "counts": [10**12]}),
        lambda: rle_decode({"size": [10**9, 10**9], "counts": "0" * 1000}),
        lambda: polygons_to_mask([[[0, 0], [1, 0], [1, 1]]], 10**6, 10**6),
        lambda: polygons_to_mask([[[0, 0], [1, 0], [1, 1]]] * (MAX_POLYGONS + 1), 9, 9),
        lambda: polygons_to_mask([np.zeros((MAX_VERTICES + 1, 2), np.float32)], 9, 9),
        lambda: polygons_to_mask([np.tile([[0, 0], [5, 9000]], (1000, 1))], 9000, 10),
        lambda: polygons_to_mask([[[0, 0], [900, 0], [900, 900], [0, 900]]] * 60, 900, 900),
    ],
)
def test_r29_the_limits_hold_before_memory_is_taken(read: Callable[[], object]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PromptError, match=r"limit|more than 50 times"):
            read()
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


# -- polygons ------------------------------------------------------------------------------------------------------


def test_polygons_run_along_the_edges_of_the_pixels() -> None:
    ((outline, holes),) = mask_to_polygons(drawn("....", ".##.", ".##."))
    assert holes == []
    assert outline.dtype == np.float64
    assert sorted(map(tuple, outline.tolist())) == [(1, 1), (1, 3), (3, 1), (3, 3)]


def test_polygons_keep_parts_and_holes_apart() -> None:
    mask = np.zeros((90, 200), np.bool_)
    mask[:81, :81] = ring(40, 20)
    mask[30:50, 30:50] = True  # an island in the hole
    mask[:81, 100:181] = ring(40, 10)
    polygons = mask_to_polygons(mask)
    assert sorted(len(holes) for _, holes in polygons) == [0, 1, 1]
    for outline, holes in polygons:
        assert all(len(points) >= 3 and points.shape[1] == 2 for points in (outline, *holes))


def test_a_smooth_outline_needs_few_points() -> None:
    mask = ring(200, 0)
    ((outline, _),) = mask_to_polygons(mask)
    assert len(outline) < 50
    found = polygons_to_mask([outline], *mask.shape)
    assert (found & mask).sum() / (found | mask).sum() > 0.99


@pytest.mark.parametrize("tolerance", [-1, np.nan, np.inf])
def test_a_tolerance_is_a_length(tolerance: float) -> None:
    with pytest.raises(PromptError, match="tolerance"):
        mask_to_polygons(np.ones((2, 2), np.bool_), tolerance)


@pytest.mark.parametrize(
    ("polygons", "expected"),
    [
        pytest.param([], drawn("....", "....", "...."), id="none"),
        pytest.param([[[1, 1], [3, 1], [3, 3], [1, 3]]], drawn("....", ".##.", ".##."), id="a square"),
        pytest.param([[[3, 1], [1, 1], [1, 3], [3, 3]]], drawn("....", ".##.", ".##."), id="the other way round"),
        pytest.param([([[0, 0], [4, 0], [4, 3], [0, 3]], [[[1, 1], [2, 1], [2, 2], [1, 2]]])],
                     drawn("####", "#.##", "####"), id="with a hole"),
        pytest.param([[[-9, -9], [2, -9], [2, 99], [-9, 99]]], drawn("##..", "##..", "##.."), id="cut at the image"),
        pytest.param([[[9, 9], [20, 9], [20, 20]]], drawn("....", "....", "...."), id="outside"),
        pytest.param([[[0, 0], [0.4, 0], [0.4, 0.4]]], drawn("....", "....", "...."), id="between pixel centres"),
        pytest.param([[[0, 0], [2, 0], [2, 2], [0, 2]], [[1, 1], [3, 1], [3, 3], [1, 3]]],
                     drawn("##..", "###.", ".##."), id="two that overlap"),
        pytest.param([[[0, 0], [4, 0], [0, 3]]], drawn("###.", "##..", "#..."), id="a slanted side"),
        pytest.param([[[1, 1], [1, 1], [1, 1]]], drawn("....", "....", "...."), id="a point"),
    ],
)  # fmt: skip
def test_polygons_fill_the_pixels_whose_centre_is_inside(polygons: Any, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(polygons_to_mask(polygons, 3, 4), expected)


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([[0, 0], [1, 1]], r"at least three \[x, y\]"),
        ([[0, 0, 0], [1, 1, 0], [2, 0, 0]], r"shape \[3, 3\]"),
        ([0, 0, 1, 1, 2, 0], r"shape \[6\]"),
        ([[0, 0], [1], [2, 0]], "list of"),
        ([[0, 0], ["a", 1], [2, 0]], "list of"),
        (None, "shape"),
        ([[0, 0], [np.nan, 1], [2, 0]], "not finite"),
        ([[0, 0], [np.inf, 1], [2, 0]], "not finite"),
        ([[0, 0], [1e12, 1], [2, 0]], "10\\*\\*9 pixels"),
        ([[0, 0], [10**400, 1], [2, 0]], "list of"),
    ],
)
def test_r29_a_polygon_that_is_none_is_named(polygon: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        polygons_to_mask([polygon], 5, 5)


def test_r29_a_million_points_are_read() -> None:
    angle = np.linspace(0, 2 * np.pi, MAX_VERTICES, endpoint=False)
    circle = 50 + 40 * np.stack([np.cos(angle), np.sin(angle)], 1)
    assert abs(polygons_to_mask([circle], 100, 100).sum() - np.pi * 40**2) < 40
    with pytest.raises(PromptError, match="over 1000000 points"):
        polygons_to_mask([circle, circle[:3]], 100, 100)


# -- PNG -----------------------------------------------------------------------------------------------------------


def png(picture: Image.Image | np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def palette(first: list[int], second: list[int]) -> Image.Image:
    picture = Image.new("P", (2, 1))
    picture.putpalette([*first, *second])
    picture.putpixel((1, 0), 1)
    return picture


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(png(np.array([[0, 1, 255]], np.uint8)), [0, 1, 1], id="labels or grey"),
        pytest.param(png(np.array([[0, 1, 65535]], np.uint16)), [0, 1, 1], id="16 bit"),
        pytest.param(png(np.array([[False, True]])), [0, 1], id="1 bit"),
        pytest.param(png(np.array([[[0, 0, 0], [0, 0, 9]]], np.uint8)), [0, 1], id="colour"),
        pytest.param(png(np.array([[[9, 9, 9, 0], [0, 0, 0, 255], [9, 9, 9, 1]]], np.uint8)), [0, 0, 1], id="alpha"),
        pytest.param(png(palette([0, 0, 0], [128, 0, 0])), [0, 1], id="palette as in VOC"),
        pytest.param(png(palette([128, 0, 0], [0, 0, 0])), [1, 0], id="palette the other way round"),
        pytest.param(png(palette([128, 0, 0], [0, 128, 0]), transparency=0), [0, 1], id="transparent palette entry"),
    ],
)
def test_a_png_mask_is_inside_where_it_is_neither_black_nor_transparent(data: bytes, expected: list[int]) -> None:
    np.testing.assert_array_equal(png_to_mask(data), np.array([expected], np.bool_))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        mask_to_png(SHAPES["ring"])[:-60],
        Image.new("L", (3, 3)).tobytes("jpeg", "L"),
    ],
)
def test_r29_a_png_mask_that_is_none_is_a_prompt_error(data: bytes) -> None:
    with pytest.raises(PromptError, match="The mask cannot be read"):
        png_to_mask(data)


def test_r29_a_png_mask_over_the_limit_is_refused() -> None:
    with pytest.raises(PromptError, match="81 x 81 = 6561 pixels, over the limit of 6560"):
        png_to_mask(mask_to_png(SHAPES["ring"]), max_pixels=6560)


# -- boundary and overlay ------------------------------------------------------------------------------------------


def test_the_boundary_is_the_inner_rim() -> None:
    mask = drawn(".....", ".###.", ".###.", ".###.")
    np.testing.assert_array_equal(boundary(mask), drawn(".....", ".###.", ".#.#.", ".###."))
    np.testing.assert_array_equal(boundary(mask, 2), mask)
    np.testing.assert_array_equal(boundary(np.ones((3, 3), np.bool_)), drawn("###", "#.#", "###"))
    with pytest.raises(PromptError, match="boundary width is 0"):
        boundary(mask, 0)


def test_the_overlay_shows_mask_clicks_and_box() -> None:
    rgb = np.full((300, 400, 3), 90, np.uint8)
    before = rgb.copy()
    mask = np.zeros((300, 400), np.bool_)
    mask[100:200, 100:200] = True
    picture = overlay(rgb, mask, [Click(150, 150), Click(300, 40, positive=False)], Box(80, 80, 220, 220))
    np.testing.assert_array_equal(rgb, before)
    assert picture.shape == rgb.shape
    assert picture.dtype == np.uint8
    assert picture[180, 120, 2] > picture[180, 120, 0] + 50  # tinted
    np.testing.assert_array_equal(picture[250, 20], [90, 90, 90])  # untouched
    plus, minus = picture[145:156, 145:156].astype(int), picture[35:46, 295:306].astype(int)
    assert ((plus[..., 1] - plus[..., 0]) > 80).any()  # green
    assert ((minus[..., 0] - minus[..., 1]) > 80).any()  # red
    assert np.abs(picture[80, 90:210].astype(int) - 90).min() > 20  # the frame


def test_the_overlay_takes_signs_at_and_over_the_border() -> None:
    for size in [(1, 1), (1, 500), (3, 2)]:
        mask = np.ones(size, np.bool_)
        picture = overlay(
            np.zeros((*size, 3), np.uint8), mask, [Click(0, 0), Click(size[1] - 0.1, size[0] - 0.1, False)]
        )
        assert picture.shape == (*size, 3)


def test_the_outline_can_be_told_from_the_tint() -> None:
    mask = np.zeros((60, 60), np.bool_)
    mask[10:50, 10:50] = True
    picture = overlay(np.zeros((60, 60, 3), np.uint8), mask)
    contour, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    x, y = contour[0].reshape(-1, 2).T
    assert picture[y, x].mean() > 2 * picture[30, 30].mean()


@pytest.mark.parametrize(
    "bad", [np.zeros((3, 3), np.uint8), np.zeros((3, 3, 1), np.bool_), np.zeros((0, 3), np.bool_), [[True]]]
)
@pytest.mark.parametrize("use", [rle_encode, mask_to_polygons, mask_to_png, boundary])
def test_only_masks_are_masks(use: Callable[[Any], object], bad: Any) -> None:
    with pytest.raises(PromptError, match=r"Give a bool array \[H, W\]"):
        use(bad)


def test_an_overlay_needs_a_picture_of_the_same_size() -> None:
    with pytest.raises(PromptError, match=r"\[3, 4, 3\], the mask \[4, 3\]"):
        overlay(np.zeros((3, 4, 3), np.uint8), np.zeros((4, 3), np.bool_))
