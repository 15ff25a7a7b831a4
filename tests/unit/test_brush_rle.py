"""The brush run-length code: bytes written by the real platform, the layout bit by bit, and hostile input (R29)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inter2former import brush_rle
from inter2former.errors import PromptError

RECORDED = Path(__file__).parents[1] / "fixtures" / "exports" / "label_studio_1.23.2.json"


def stream(n_values: int, *fields: tuple[int, int], word: int = 8, widths: tuple[int, ...] = (3, 4, 8, 16)) -> bytes:
    """A hand-made stream: fields are (value, bits)."""
    text = format(n_values, "032b") + format(word - 1, "05b") + "".join(format(w - 1, "04b") for w in widths)
    text += "".join(format(value, f"0{bits}b") for value, bits in fields)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def recorded() -> list[tuple[list[int], int, int]]:
    tasks = json.loads(RECORDED.read_text())
    return [
        (entry["value"]["rle"], entry["original_height"], entry["original_width"])
        for task in tasks
        for annotation in task["annotations"]
        for entry in annotation["result"]
    ]


def test_the_platforms_own_bytes_come_back_byte_for_byte() -> None:
    for rle, height, width in recorded():
        mask = brush_rle.decode(rle, height, width)
        assert mask.shape == (height, width)
        assert 0 < mask.sum() < mask.size
        assert brush_rle.encode(mask) == rle


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (np.zeros((1, 1)), stream(4, (1, 1), (0, 2), (3, 3), (0, 8))),
        (np.ones((1, 1)), stream(4, (1, 1), (0, 2), (3, 3), (255, 8))),
        (np.array([[0, 7]]), stream(8, (1, 1), (0, 2), (3, 3), (0, 8), (1, 1), (0, 2), (3, 3), (255, 8))),
        (np.ones((1, 3)), stream(12, (1, 1), (1, 2), (11, 4), (255, 8))),
        (np.ones((128, 128)), stream(65536, (1, 1), (3, 2), (65535, 16), (255, 8))),
        (
            np.ones((1, 16385)),
            stream(65540, (1, 1), (3, 2), (65535, 16), (255, 8), (1, 1), (0, 2), (3, 3), (255, 8)),
        ),
    ],
    ids=["empty pixel", "full pixel", "any non-zero", "class 1", "longest token", "run over a token"],
)
def test_the_layout_bit_by_bit(mask: np.ndarray, expected: bytes) -> None:
    assert bytes(brush_rle.encode(mask)) == expected
    assert (brush_rle.decode(expected, *mask.shape) == (mask != 0)).all()


def test_alpha_alone_decides_and_values_may_be_spelt_out() -> None:
    rgba = [(9, 9, 9, 0), (0, 0, 0, 1), (255, 255, 255, 255)]
    spelt = [(0, 1), (2, 2), (11, 8), *((value, 8) for pixel in rgba for value in pixel)]
    assert brush_rle.decode(stream(12, *spelt), 1, 3).tolist() == [[False, True, True]]


def test_runs_may_end_inside_a_pixel() -> None:
    # values 0 0 | 255 255 255 (repeated) | 0 0 7 (spelt out)
    runs = [(1, 1), (0, 2), (1, 3), (0, 8)]
    runs += [(1, 1), (0, 2), (2, 3), (255, 8)]
    runs += [(0, 1), (0, 2), (2, 3), (0, 8), (0, 8), (7, 8)]
    assert brush_rle.decode(stream(8, *runs), 1, 2).tolist() == [[True, True]]


def test_other_run_length_widths_are_read_from_the_header() -> None:
    data = stream(12, (1, 1), (2, 2), (11, 5), (255, 8), widths=(1, 2, 5, 16))
    assert brush_rle.decode(data, 1, 3).all()


def test_a_tail_after_the_last_run_is_ignored() -> None:
    data = bytes(brush_rle.encode(np.eye(5))) + b"\xff" * 9
    assert (brush_rle.decode(data, 5, 5) == np.eye(5, dtype=bool)).all()


def test_every_container_of_bytes_is_taken() -> None:
    rle = brush_rle.encode(np.eye(3))
    for data in (rle, tuple(rle), bytes(rle), bytearray(rle), np.array(rle, dtype=np.uint8)):
        assert (brush_rle.decode(data, 3, 3) == np.eye(3, dtype=bool)).all()


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ([], "ends inside its header"),
        ([0, 0, 0, 4, 57, 27], "ends inside its header"),
        (stream(4), "cut short"),
        (stream(4, (1, 1), (3, 2), (3, 16)), "cut short"),
        (stream(4, (0, 1), (3, 2), (3, 16), (255, 8)), "cut short"),
        (stream(4, (1, 1), (0, 2), (4, 3), (255, 8)), "past the end"),
        (stream(8, (1, 1), (0, 2), (7, 3), (255, 8)), "holds 8 values"),
        (stream(2**32 - 1, (1, 1), (3, 2), (65535, 16), (255, 8)), "holds 4294967295 values"),
        (stream(4, (1, 1), (0, 2), (3, 3), (255, 8), word=16), "16 bits"),
        ([0, 0, 0, 256], "list of byte values"),
        ([0, -1], "list of byte values"),
        ([0.5], "list of byte values"),
        (["1"], "list of byte values"),
        ([[1]], "list of byte values"),
        (12, "list of byte values"),
        ("0,8", "list of byte values"),
        (None, "list of byte values"),
        ({0: 1}, "list of byte values"),
        (np.zeros((2, 9), dtype=np.uint8), "list of byte values"),
    ],
)
def test_r29_lies_are_named(rle: object, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        brush_rle.decode(rle, 1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(0, 4), (4, -1), (True, 1), (2.0, 2), ("2", 2), (20_000, 20_000)])
def test_r29_sizes_are_checked_before_memory_is_taken(size: tuple[int, int]) -> None:
    with pytest.raises(PromptError):
        brush_rle.decode(bytes(64), *size)


@pytest.mark.parametrize("mask", [np.zeros((0, 3)), np.zeros(4), np.zeros((2, 2, 1))], ids=["empty", "flat", "deep"])
def test_only_a_picture_of_pixels_is_encoded(mask: np.ndarray) -> None:
    with pytest.raises(PromptError, match="shape"):
        brush_rle.encode(mask)
