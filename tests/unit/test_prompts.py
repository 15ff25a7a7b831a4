"""Clicks and boxes: every odd value has one documented answer (R27)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inter2former.errors import PromptError
from inter2former.prompts import Box, Click, check_clicks


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "3", [1], True])
def test_r27_a_click_needs_finite_numbers(bad: object) -> None:
    with pytest.raises(PromptError, match="Click: x is"):
        Click(bad, 1)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="Click: y is"):
        Click(1, bad)  # type: ignore[arg-type]


def test_clicks_compare_by_value_whatever_the_number_type() -> None:
    assert Click(np.float32(3), np.int64(4), np.bool_(True)) == Click(3, 4) == Click(3.0, 4.0, True)  # type: ignore[arg-type]
    assert Click(3, 4) != Click(3, 4, positive=False)
    assert len({Click(1, 2), Click(1.0, 2.0)}) == 1


@pytest.mark.parametrize(
    ("x", "y", "pixel"),
    [
        (0, 0, (0, 0)),
        (-0.0, -0.0, (0, 0)),
        (0.99, 1.0, (1, 0)),
        (19.999, 9.999, (9, 19)),
    ],
)
def test_the_pixel_under_a_click_is_row_and_column(x: float, y: float, pixel: tuple[int, int]) -> None:
    assert Click(x, y).pixel(height=10, width=20) == pixel


@pytest.mark.parametrize(("x", "y"), [(20, 5), (5, 10), (-0.001, 5), (5, -1), (1e300, 5)])
def test_r27_a_click_outside_names_itself_and_the_image(x: float, y: float) -> None:
    with pytest.raises(PromptError, match=r"outside the image of 20 x 10 pixels") as caught:
        Click(x, y).pixel(height=10, width=20)
    assert f"({x:g}, {y:g})" in caught.value.message
    assert caught.value.code == "prompt"


def test_r27_a_box_turned_around_is_the_same_box() -> None:
    assert Box(8, 9, 2, 3) == Box(2, 3, 8, 9) == Box(8, 3, 2, 9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1", None])
def test_r27_a_box_needs_finite_numbers(bad: object) -> None:
    with pytest.raises(PromptError, match="Box: y1 is"):
        Box(0, 0, 1, bad)  # type: ignore[arg-type]


def test_a_box_is_cut_at_the_image() -> None:
    assert Box(-5, 2, 100, 200).clipped(height=10, width=20) == Box(0, 2, 20, 10)
    assert Box(0, 0, 20, 10).clipped(height=10, width=20) == Box(0, 0, 20, 10)


@pytest.mark.parametrize("box", [Box(3, 3, 3, 8), Box(3, 3, 8, 3), Box(20, 0, 30, 5), Box(-9, 0, 0, 5)])
def test_r27_a_box_without_area_in_the_image_is_refused(box: Box) -> None:
    with pytest.raises(PromptError, match="no area inside the image of 20 x 10"):
        box.clipped(height=10, width=20)


def test_clicks_are_a_sequence_of_click() -> None:
    clicks = [Click(1, 2), Click(3, 4, False)]
    assert check_clicks(clicks) == tuple(clicks)
    assert check_clicks(()) == ()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Click(1, 2), "one Click; give a list"),
        (7, "clicks is a int"),
        ([(1, 2)], r"clicks\[0\] is a tuple"),
        ([Click(1, 2), None], r"clicks\[1\] is a NoneType"),
    ],
)
def test_r27_what_is_not_a_list_of_clicks_is_named(bad: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        check_clicks(bad)  # type: ignore[arg-type]
