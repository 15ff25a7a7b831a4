"""What the random walk over colours promises, on pictures whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inter2former import random_walk, reference_mask
from inter2former.random_walk import CELLS, Float32, links, trust, walk

SIZE = 256
EVERYWHERE = (0, 0, SIZE // 16, SIZE // 16)


def picture(height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """Dark, with a bright square at rows and columns 64 to 191, and a little noise."""
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0)) * 0.05
    image[:, 64:192, 64:192] += 2.0
    return image


def clicked(*clicks: tuple[int, int, bool]) -> npt.NDArray[np.uint8]:
    start = reference_mask.initial(SIZE, reference_mask.POSSIBLE_BACKGROUND)
    return reference_mask.paint_clicks(start, clicks, 5)


def unsure(value: float = 0.0) -> Float32:
    return np.full((SIZE, SIZE), value, np.float32)


def test_links_are_cut_at_outlines_and_absent_outside_of_the_photo() -> None:
    right, below, falling, rising = links(picture(200, 240), SIZE).reshape(4, CELLS, CELLS)
    assert right[30, 20] > 0.5  # inside the square, cells are 4 pixels wide
    assert right[30, 15] < 0.01  # across its left side
    assert below[15, 30] < 0.01
    assert falling[15, 15] < 0.01 * random_walk.DIAGONAL + random_walk.FLOOR
    rows, columns = 200 // 4, 240 // 4
    assert not right[:, columns - 1 :].any()
    assert not right[rows:].any()
    assert not below[rows - 1 :].any()
    assert not below[:, columns:].any()
    assert not falling[rows - 1 :].any()
    assert not rising[:, 0].any()
    assert (right[:rows, : columns - 1] >= random_walk.FLOOR).all()
    assert (rising[: rows - 1, 1:columns] > 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 256), (256, 3), (5, 7)])
def test_links_of_the_smallest_photos_are_finite(shape: tuple[int, int]) -> None:
    found = links(torch.rand(3, *shape), SIZE)
    assert found.shape == (4, CELLS * CELLS)
    assert np.isfinite(found).all()


def test_photos_of_one_colour_have_free_links() -> None:
    found = links(torch.full((3, SIZE, SIZE), 0.3), SIZE).reshape(4, CELLS, CELLS)
    assert np.allclose(found[0, :, :-1], 1 + random_walk.FLOOR)


def test_a_click_fills_what_has_its_colour_where_the_network_knows_nothing() -> None:
    object_ = walk(links(picture(), SIZE), unsure(-1.0), EVERYWHERE, clicked((128, 128, True), (20, 20, False)), 1e-4)
    inside = object_ > 0
    assert inside[70:186, 70:186].all()
    assert not inside[:58].any()
    assert not inside[:, 198:].any()


def test_a_trusted_network_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    said = np.kron(rng.normal(size=(8, 8)) * 8, np.ones((32, 32))).astype(np.float32)
    walked = walk(links(picture(), SIZE), said, EVERYWHERE, clicked((128, 128, True)), 1000.0)
    sure = np.abs(said) > 1
    sure[120:136, 120:136] = False
    assert (sure & ((walked > 0) != (said > 0))).mean() < 0.02  # corners of the squares are rounded


def test_trust_grows_with_the_clicks() -> None:
    grown = [trust(0.005, n) for n in range(30)]
    assert grown[0] == grown[1] == 0.005
    assert all(a < b for a, b in itertools.pairwise(grown[1:9]))
    assert grown[-1] == random_walk.MOST_TRUST


@pytest.mark.parametrize(("size", "width"), [(256, 2), (512, 5), (1024, 10)])
def test_lines_narrower_than_a_cell_are_thin(size: int, width: int) -> None:
    logits = np.full((size, size), -1.0, np.float32)
    logits[size // 4 : size // 4 + width, : size // 2] = 1.0
    assert random_walk.is_thin(logits, size)
    assert random_walk.is_thin(np.ascontiguousarray(logits[:, : size // 3]), size)  # a part of it does as well
    logits[size // 2 : size // 2 + size // 8, : size // 8] = 1.0  # with something thick beside it
    assert not random_walk.is_thin(logits, size)


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_dots_blobs_and_nothing_are_not_thin(size: int) -> None:
    row, column = np.mgrid[:size, :size] - size // 2
    for radius in (0, 1, size // 128, size // 64, size // 32, size // 8):
        disc = np.where(row**2 + column**2 < radius**2, 1.0, -1.0).astype(np.float32)
        assert not random_walk.is_thin(disc, size), radius


def test_it_sees_the_box_of_the_decoder_alone() -> None:
    """Outside the network is sure of background, as the mask is."""
    box = (4, 4, 12, 12)
    said = unsure(-random_walk.SURE)
    said[64:192, 64:192] = 1.0
    reference, free = clicked((128, 128, True)), links(picture(), SIZE)
    whole = walk(free, said, EVERYWHERE, reference, 0.005)
    part = walk(free, said[64:192, 64:192], box, reference, 0.005)
    assert np.array_equal(whole[64:192, 64:192], part)
    outside = np.ones((SIZE, SIZE), bool)
    outside[64:192, 64:192] = False
    assert (whole[outside] < 0).all()  # nothing is lost by looking at the box alone


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), first=st.floats(1e-4, 1.0), scale=st.floats(0.1, 1e4), n=st.integers(0, 6))
def test_whatever_the_network_says_the_answer_is_finite_and_turns_with_the_sign(
    seed: int, first: float, scale: float, n: int
) -> None:
    """Object and background are treated alike."""
    rng = np.random.default_rng(seed)
    places = rng.integers(0, SIZE, (n, 2))
    clicks = [(int(y), int(x), bool(rng.integers(2))) for y, x in places]
    said = (rng.normal(size=(SIZE, SIZE)) * scale).astype(np.float32)
    free = links(picture(SIZE, 200), SIZE)
    one = walk(free, said, EVERYWHERE, clicked(*clicks), first)
    other = walk(free, -said, EVERYWHERE, clicked(*((y, x, not positive) for y, x, positive in clicks)), first)
    assert np.isfinite(one).all()
    assert np.allclose(one, -other, atol=2e-2)
