"""The Segmenter through its public face: prompts, answers, errors, what is computed and what is not."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from synthetic import encode_png, make_image, make_tiny_model

from inter2former import (
    Box,
    CheckpointError,
    Click,
    ConfigError,
    ImageError,
    NumericError,
    PromptError,
    Segmentation,
    Segmenter,
    load_segmenter,
)
from inter2former.config import tiny
from inter2former.images import Frame, image_key
from inter2former.nn.model import Decoded, Inter2Former
from inter2former.runtime import native
from inter2former.segmenter import STAGES, _keep_clicks

Image = np.ndarray[Any, np.dtype[np.uint8]]

CLICKS = [Click(80, 60), Click(40, 30), Click(120, 90), Click(80, 60, positive=False), Click(20, 100)]


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch, tiny_model: Inter2Former) -> list[int]:
    """Grows by one with every decoder pass."""
    passes: list[int] = []
    decode = tiny_model.decode

    def counted(*arguments: Any) -> Any:
        passes.append(1)
        return decode(*arguments)

    monkeypatch.setattr(tiny_model, "decode", counted)
    return passes


def same(one: Segmentation, other: Segmentation) -> bool:
    """Bit for bit."""
    return (
        one.score == other.score
        and one.mask.tobytes() == other.mask.tobytes()
        and one.logits().tobytes() == other.logits().tobytes()
    )


# -- the answer ------------------------------------------------------------------------------------------------------


def test_a_click_gives_a_mask_in_the_image(segmenter: Segmenter, image: Image) -> None:
    result = segmenter.segment(image, CLICKS[:1])
    assert result.mask.dtype == np.bool_
    assert result.mask.shape == image.shape[:2]
    assert result.mask[60, 80]
    assert 0 < result.mask.mean() < 0.5
    assert 0 < result.score <= 1
    assert result.clicks == (CLICKS[0],)
    assert result.image_key == image_key(image)
    assert result.model_size == 256


def test_the_mask_cannot_be_written_to(segmenter: Segmenter, image: Image) -> None:
    for clicks in (CLICKS, [Click(1, 1, positive=False)]):
        result = segmenter.segment(image, clicks)
        with pytest.raises(ValueError, match="read-only"):
            result.mask[0, 0] = True


def test_clicks_move_the_mask(segmenter: Segmenter, image: Image) -> None:
    masks = [segmenter.segment(image, CLICKS[:n]).mask for n in range(1, len(CLICKS) + 1)]
    assert all((one != other).sum() > 20 for one, other in itertools.pairwise(masks))


def test_the_order_of_clicks_matters(segmenter: Segmenter, image: Image) -> None:
    forth, back = segmenter.segment(image, CLICKS), segmenter.segment(image, CLICKS[::-1])
    assert (forth.mask != back.mask).any()


@pytest.mark.parametrize("n_clicks", range(1, len(CLICKS) + 1))
def test_logits_agree_with_the_mask(segmenter: Segmenter, image: Image, n_clicks: int) -> None:
    result = segmenter.segment(image, CLICKS[:n_clicks])
    logits = result.logits()
    assert logits.dtype == np.float32
    assert logits.shape == image.shape[:2]
    assert ((logits > 0) == result.mask).all()


def test_the_score_is_the_iou_that_the_probabilities_promise(segmenter: Segmenter, image: Image) -> None:
    result = segmenter.segment(image, CLICKS[:1])
    logits = result.logits().astype(np.float64)  # in the image frame: close to the score, which is of the model frame
    probability, mask = 1 / (1 + np.exp(-logits)), logits > 0
    expected = probability[mask].sum() / (mask.sum() + probability[~mask].sum())
    assert result.score == pytest.approx(expected, abs=0.03)


def test_bytes_and_pixels_are_the_same_image(segmenter: Segmenter, image: Image, image_png: bytes) -> None:
    from_bytes, from_pixels = segmenter.segment(image_png, CLICKS), segmenter.segment(image, CLICKS)
    assert same(from_bytes, from_pixels)
    assert same(from_bytes, segmenter.segment(bytearray(image_png), CLICKS))
    assert from_bytes.image_key == from_pixels.image_key
    assert segmenter.encodes == 1


def test_grey_pixels_are_an_image(segmenter: Segmenter, image: Image) -> None:
    assert segmenter.segment(image[:, :, 0], CLICKS[:1]).mask[60, 80]


def test_an_array_view_is_read_as_it_looks(segmenter: Segmenter, image: Image) -> None:
    flipped = segmenter.segment(image[::-1, ::-1], CLICKS)
    assert same(flipped, segmenter.segment(np.ascontiguousarray(image[::-1, ::-1]), CLICKS))


# -- time and what is computed ---------------------------------------------------------------------------------------


def test_timing_names_every_stage(segmenter: Segmenter, image_png: bytes) -> None:
    cold, warm = segmenter.segment(image_png, CLICKS), segmenter.segment(image_png, CLICKS)
    assert tuple(cold.timing) == tuple(warm.timing) == STAGES
    assert all(seconds > 0 for seconds in cold.timing.values())
    assert all(seconds >= 0 for seconds in warm.timing.values())
    assert cold.encoded
    assert not warm.encoded
    assert warm.timing["prepare"] == warm.timing["encode"] == 0


def test_a_new_click_is_one_pass_and_undo_none(segmenter: Segmenter, image: Image, decodes: list[int]) -> None:
    for n_clicks in range(1, len(CLICKS) + 1):
        segmenter.segment(image, CLICKS[:n_clicks])
        assert len(decodes) == n_clicks
    for n_clicks in range(len(CLICKS), 0, -1):
        segmenter.segment(image, CLICKS[:n_clicks])
    segmenter.segment(image, CLICKS)
    assert len(decodes) == len(CLICKS)
    assert segmenter.encodes == 1


def test_a_changed_click_recomputes_from_there(segmenter: Segmenter, image: Image, decodes: list[int]) -> None:
    segmenter.segment(image, CLICKS)
    changed = [*CLICKS[:3], Click(10, 10), CLICKS[4]]
    segmenter.segment(image, changed)
    assert len(decodes) == len(CLICKS) + 2


def test_another_box_or_mask_or_size_shares_no_state(segmenter: Segmenter, image: Image, decodes: list[int]) -> None:
    mask = np.zeros(image.shape[:2], np.bool_)
    mask[30:60, 50:90] = True
    requests: list[dict[str, Any]] = [
        {},
        {"box": Box(20, 20, 100, 100)},
        {"box": Box(20, 20, 110, 100)},
        {"initial_mask": mask},
        {"initial_mask": mask.T.copy().reshape(mask.shape)},
        {"initial_mask": mask, "box": Box(20, 20, 100, 100)},
        {"model_size": 512},
    ]
    for n_before, request in enumerate(requests):
        segmenter.segment(image, CLICKS[:1], **request)
        assert len(decodes) == n_before + 1
    for request in requests:
        segmenter.segment(image, CLICKS[:1], **request)
    assert len(decodes) == len(requests)
    assert segmenter.encodes == 2  # T=256 and T=512


def test_known_bytes_are_not_decoded_again(
    segmenter: Segmenter, image_png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = segmenter.identify(image_png)
    assert (info.height, info.width) == (120, 160)
    first = segmenter.segment(image_png, CLICKS[:1])
    assert info.key == first.image_key

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("inter2former.segmenter.as_rgb", never)
    assert segmenter.identify(image_png) == info
    assert segmenter.segment(image_png, CLICKS[:2]).mask.any()


def test_a_known_image_is_neither_hashed_nor_decoded_again(
    segmenter: Segmenter, image_png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = segmenter.known(image_png)
    assert isinstance(first.image, np.ndarray)  # decoded for its name; the encoder takes these pixels
    kept = dataclasses.replace(first, image=image_png)
    assert (first.nbytes, kept.nbytes) == (first.image.nbytes, len(image_png))
    masks = [segmenter.segment(given, CLICKS).mask for given in (first, kept, image_png)]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    assert segmenter.encodes == 1

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("looked at again")

    monkeypatch.setattr("inter2former.segmenter.as_rgb", never)
    monkeypatch.setattr("inter2former.segmenter.image_key", never)
    assert segmenter.known(image_png).image is image_png
    monkeypatch.setattr("inter2former.segmenter.hashlib.sha256", never)
    assert segmenter.segment(kept, CLICKS[:2]).image_key == segmenter.prefetch(first)


def test_prefetch_encodes(segmenter: Segmenter, image: Image) -> None:
    assert segmenter.prefetch(image) == image_key(image)
    assert segmenter.encodes == 1
    assert not segmenter.segment(image, CLICKS[:1]).encoded
    segmenter.prefetch(image, model_size=512)
    assert segmenter.encodes == 2


def test_without_a_budget_everything_still_works(tiny_model: Inter2Former, segmenter: Segmenter, image: Image) -> None:
    forgetful = Segmenter(tiny_model, model_size=256, cache_bytes=0)
    assert same(forgetful.segment(image, CLICKS), segmenter.segment(image, CLICKS))
    assert forgetful.encodes == 1  # once for the request, not once a click
    assert forgetful.cache_info().nbytes == 0


def test_the_budget_is_kept(tiny_model: Inter2Former) -> None:
    """R12: never more bytes than allowed, whatever is asked."""
    budget = 2 * 1_600_000  # two encodings at T=256
    segmenter = Segmenter(tiny_model, model_size=256, cache_bytes=budget)
    for seed in range(5):
        picture = make_image(seed=seed)
        for n_clicks in (1, 2):
            segmenter.segment(picture, CLICKS[:n_clicks])
            assert 0 < segmenter.cache_info().nbytes <= budget
    assert segmenter.cache_info().evictions > 0


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_only_negative_clicks_are_an_empty_mask_without_inference(segmenter: Segmenter, image: Image) -> None:
    result = segmenter.segment(image, [Click(5, 5, positive=False), Click(70, 70, positive=False)])
    assert not result.mask.any()
    assert result.score == 0
    assert (result.logits() < 0).all()
    assert segmenter.encodes == 0
    assert not result.encoded


def test_a_box_alone_is_enough(segmenter: Segmenter, image: Image, decodes: list[int]) -> None:
    result = segmenter.segment(image, box=Box(30, 20, 130, 100))
    assert result.mask.shape == image.shape[:2]
    assert len(decodes) == 1
    again = segmenter.segment(image, box=Box(130, 100, 30, 20))  # corners the other way round
    assert same(result, again)
    assert len(decodes) == 1


def test_a_box_counts_for_a_model_that_starts_from_background(image: Image) -> None:
    config = dataclasses.replace(tiny(), initial_reference=1)
    segmenter = Segmenter(make_tiny_model(config), model_size=256)
    one = segmenter.segment(image, box=Box(0, 0, 60, 60))
    other = segmenter.segment(image, box=Box(60, 60, 160, 120))
    assert one.logits().tobytes() != other.logits().tobytes()


def test_a_given_mask_is_where_the_work_starts(segmenter: Segmenter, image: Image) -> None:
    mask = np.zeros(image.shape[:2], np.bool_)
    mask[20:100, 90:150] = True
    click = [Click(20, 20, positive=False)]
    corrected = segmenter.segment(image, click, initial_mask=mask)
    assert (corrected.mask & mask).sum() > 0.8 * mask.sum()
    assert not corrected.mask[20, 20]


def test_an_empty_given_mask_says_nothing(segmenter: Segmenter, image: Image) -> None:
    empty = np.zeros(image.shape[:2], np.bool_)
    assert same(
        segmenter.segment(image, CLICKS, initial_mask=empty),
        segmenter.segment(image, CLICKS),
    )
    assert not segmenter.segment(image, initial_mask=empty).mask.any()


def test_a_box_may_reach_over_the_border(segmenter: Segmenter, image: Image) -> None:
    inside = segmenter.segment(image, CLICKS[:1], box=Box(40, 20, 160, 120))
    assert same(inside, segmenter.segment(image, CLICKS[:1], box=Box(40, 20, 900, 120.5)))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        pytest.param({}, "no prompt", id="nothing"),
        pytest.param({"clicks": [Click(160, 5)]}, "outside the image of 160 x 120", id="right of the image"),
        pytest.param({"clicks": [Click(5, 120)]}, "outside", id="below"),
        pytest.param({"clicks": [Click(-0.001, 5)]}, "outside", id="left"),
        pytest.param({"clicks": [Click(5, 5), Click(5, -1, positive=False)]}, "outside", id="second click above"),
        pytest.param({"clicks": Click(5, 5)}, "list", id="a click instead of a list"),
        pytest.param({"clicks": [(5, 5)]}, r"clicks\[0\] is a tuple", id="a tuple"),
        pytest.param({"clicks": 3}, "int", id="a number"),
        pytest.param({"box": (1, 2, 3, 4)}, "box is a tuple", id="box as a tuple"),
        pytest.param({"box": Box(5, 5, 5, 50)}, "no area", id="box without width"),
        pytest.param({"box": Box(200, 5, 250, 50)}, "no area", id="box beside the image"),
        pytest.param({"initial_mask": [[True]]}, "initial_mask is a list", id="mask as a list"),
        pytest.param({"initial_mask": np.zeros((120, 160))}, "float64", id="mask of floats"),
        pytest.param({"initial_mask": np.zeros((120, 160), np.uint8)}, "uint8", id="mask of bytes"),
        pytest.param({"initial_mask": np.zeros((160, 120), np.bool_)}, r"\[160, 120\]", id="mask turned"),
        pytest.param({"clicks": CLICKS, "model_size": 300}, "model_size is 300", id="T not a multiple of 256"),
        pytest.param({"clicks": CLICKS, "model_size": 0}, "model_size", id="T zero"),
        pytest.param({"clicks": CLICKS, "model_size": 4352}, "model_size", id="T too large"),
        pytest.param({"clicks": CLICKS, "model_size": 256.0}, "model_size", id="T a float"),
        pytest.param({"clicks": CLICKS, "model_size": True}, "model_size", id="T a bool"),
        pytest.param({"clicks": CLICKS, "model_size": "large"}, "model_size", id="T a word"),
    ],
)
def test_impossible_prompts_are_named(
    segmenter: Segmenter, image: Image, prompts: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        segmenter.segment(image, **prompts)
    assert segmenter.encodes == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "5", None, True])
def test_coordinates_are_finite_numbers(value: Any) -> None:
    with pytest.raises(PromptError):
        Click(value, 5)
    with pytest.raises(PromptError):
        Box(1, 1, 5, value)


@pytest.mark.parametrize(
    "broken",
    [b"", b"not an image", np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), None, "photo.jpg"],
    ids=["no bytes", "text", "floats", "two channels", "None", "a path"],
)
def test_impossible_images_are_named(segmenter: Segmenter, broken: Any) -> None:
    with pytest.raises(ImageError):
        segmenter.segment(broken, CLICKS)
    with pytest.raises(ImageError):
        segmenter.identify(broken)


def test_the_pixel_limit_holds_for_bytes_and_pixels(tiny_model: Inter2Former, image: Image, image_png: bytes) -> None:
    segmenter = Segmenter(tiny_model, model_size=256, max_pixels=120 * 160 - 1)
    for given in (image, image_png):
        with pytest.raises(ImageError, match="limit"):
            segmenter.segment(given, CLICKS)
    assert Segmenter(tiny_model, model_size=256, max_pixels=120 * 160).segment(image, CLICKS).mask.any()


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "expected"), [(1, 256), (256, 256), (257, 512), (600, 512)])
def test_auto_follows_the_longer_side(tiny_model: Inter2Former, side: int, expected: int) -> None:
    segmenter = Segmenter(tiny_model)  # auto_sizes of tiny(): 256, 512
    result = segmenter.segment(make_image(20, side), [Click(0, 10, positive=False)])
    assert result.model_size == expected


@pytest.mark.parametrize("size", [-256, 0, 128, 255, 8192, 512.0, True, None, "512"])
def test_impossible_sizes_and_budgets_stop_the_start(tiny_model: Inter2Former, size: Any) -> None:
    with pytest.raises(ConfigError, match="model_size"):
        Segmenter(tiny_model, model_size=size)
    with pytest.raises(ConfigError, match="cache_bytes"):
        Segmenter(tiny_model, cache_bytes=-1)


def test_the_released_convention_works_the_same_way(image: Image) -> None:
    model = make_tiny_model(dataclasses.replace(tiny(), input_convention="released"))
    segmenter = Segmenter(model, model_size=512)
    result = segmenter.segment(image, CLICKS)
    assert ((result.logits() > 0) == result.mask).all()
    assert same(result, Segmenter(model, model_size=512).segment(image, CLICKS))


def test_one_step_is_the_released_click_loop(tiny_model: Inter2Former, segmenter: Segmenter, image: Image) -> None:
    """Written out once more with the network itself: paint, decode, apply, and resize at the end."""
    from inter2former import reference_mask

    frame = Frame(120, 160, 256, "fit")
    encoding = tiny_model.encode(frame.prepare(image))
    state = reference_mask.initial(256)
    for click in CLICKS:
        painted = [(*frame.model_pixel(click.x, click.y), click.positive)]
        state = reference_mask.paint_clicks(state, painted, tiny_model.config.click_radius)
        logits = tiny_model.decode(encoding, state).logits
        state = reference_mask.apply_prediction(state, (logits > 0).numpy())
    expected = (frame.logits_to_image(logits.clone()) > 0).numpy()
    _keep_clicks(expected, [(int(c.y), int(c.x), c.positive) for c in CLICKS])
    assert (segmenter.segment(image, CLICKS).mask == expected).all()


# -- a click is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clicked", "start", "expected"),
    [
        pytest.param([(1, 1, True)], "..../..../....", "###./###./###.", id="a missed positive brings its neighbours"),
        pytest.param([(1, 1, False)], "####/####/####", "...#/...#/...#", id="a missed negative takes them away"),
        pytest.param([(1, 1, True)], "..../.#../....", "..../.#../....", id="a click that agrees changes nothing"),
        pytest.param([(0, 0, True)], "..../..../....", "##../##../....", id="in the corner"),
        pytest.param([(2, 3, True)], "..../..../....", "..../..##/..##", id="in the other corner"),
        pytest.param(
            [(1, 1, True), (1, 2, False)], "..../..../....", "###./##../###.", id="not over an opposite neighbour"
        ),
        pytest.param([(1, 2, False), (1, 1, True)], "####/####/####", "#.../##../#...", id="whichever came first"),
        pytest.param([(1, 1, True), (1, 1, False)], "..../..../....", "..../..../....", id="the last one counts"),
        pytest.param([(1, 1, False), (1, 1, True)], "####/####/####", "####/####/####", id="the other way round"),
        pytest.param([(1, 0, True), (1, 2, False)], "..##/..##/..##", "#.../#.../#...", id="the later where they meet"),
    ],
)
def test_clicked_pixels_end_on_their_side(clicked: list[tuple[int, int, bool]], start: str, expected: str) -> None:
    mask = np.array([[letter == "#" for letter in row] for row in start.split("/")])
    _keep_clicks(mask, clicked)
    assert "/".join("".join("#" if pixel else "." for pixel in row) for row in mask) == expected


# -- islands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def archipelago(monkeypatch: pytest.MonkeyPatch) -> Segmenter:
    """Whatever the prompt, the network finds an object of 100 x 100 pixels and two islands of 20 x 20."""
    model = make_tiny_model(dataclasses.replace(tiny(), island_share=0.1))
    logits = torch.full((256, 256), -1.0)
    logits[20:120, 20:120] = logits[200:220, 20:40] = logits[200:220, 200:220] = 1.0
    found = Decoded(logits, (0, 0, 16, 16), torch.zeros(16, 16))
    monkeypatch.setattr(model, "decode", lambda *_: found)
    return Segmenter(model, model_size=256)


def parts(result: Segmentation) -> list[bool]:
    """Whether the object and each island is there as a whole; nothing else may be."""
    places = [np.s_[20:120, 20:120], np.s_[200:220, 20:40], np.s_[200:220, 200:220]]
    assert result.mask.sum() == sum(result.mask[place].sum() for place in places)
    assert all(result.mask[place].all() == result.mask[place].any() for place in places)
    assert ((result.logits() > 0) == result.mask).all()
    return [bool(result.mask[place].all()) for place in places]


def test_islands_that_nobody_clicked_are_left_out(archipelago: Segmenter) -> None:
    image, object_, island = make_image(256, 256), Click(70, 70), Click(30, 210)
    assert parts(archipelago.segment(image, [object_])) == [True, False, False]
    assert parts(archipelago.segment(image, [object_, island])) == [True, True, False]
    assert parts(archipelago.segment(image, [island])) == [True, True, False]
    assert parts(archipelago.segment(image, box=Box(0, 0, 256, 256))) == [True, False, False]


def test_islands_of_a_given_mask_stay(archipelago: Segmenter) -> None:
    given = np.zeros((256, 256), bool)
    given[205:215, 205:215] = True
    result = archipelago.segment(make_image(256, 256), [Click(70, 70)], initial_mask=given)
    assert parts(result) == [True, False, True]


def test_islands_stay_where_the_configuration_keeps_them(archipelago: Segmenter) -> None:
    archipelago.config = dataclasses.replace(archipelago.config, island_share=0.0)
    assert parts(archipelago.segment(make_image(256, 256), [Click(70, 70)])) == [True, True, True]


# -- holes -----------------------------------------------------------------------------------------------------------

SPECK, OPENING, BAY = np.s_[50:54, 50:54], np.s_[90:110, 60:80], np.s_[160:164, 116:120]


@pytest.fixture
def cheese(monkeypatch: pytest.MonkeyPatch) -> Segmenter:
    """Whatever the prompt, the network finds 200 x 200 pixels with a hole of 4 x 4, one of 20 x 20 and a small bay."""
    model = make_tiny_model(dataclasses.replace(tiny(), island_share=0.1))
    logits = torch.full((256, 256), -1.0)
    logits[20:220, 20:120] = 1.0
    logits[SPECK] = logits[OPENING] = logits[BAY] = -1.0
    logits[51, 51] = 0.0  # of neither side
    found = Decoded(logits, (0, 0, 16, 16), torch.zeros(16, 16))
    monkeypatch.setattr(model, "decode", lambda *_: found)
    return Segmenter(model, model_size=256)


def holes(result: Segmentation) -> list[bool]:
    """Whether each of the three is still there as a whole."""
    assert ((result.logits() > 0) == result.mask).all()
    assert all(result.mask[place].all() == result.mask[place].any() for place in (SPECK, OPENING, BAY))
    return [not result.mask[place].any() for place in (SPECK, OPENING, BAY)]


def test_small_holes_that_nobody_clicked_are_filled(cheese: Segmenter) -> None:
    image, inside = make_image(256, 256), Click(30, 30)
    assert holes(cheese.segment(image, [inside])) == [False, True, True]
    assert holes(cheese.segment(image, [inside, Click(52, 52, positive=False)])) == [True, True, True]
    assert holes(cheese.segment(image, box=Box(0, 0, 256, 256))) == [False, True, True]


def test_holes_of_a_given_mask_stay(cheese: Segmenter) -> None:
    given = np.zeros((256, 256), bool)
    given[20:220, 20:120] = True
    assert holes(cheese.segment(make_image(256, 256), initial_mask=given)) == [False, True, True]
    given[SPECK] = False
    assert holes(cheese.segment(make_image(256, 256), initial_mask=given)) == [True, True, True]


def test_holes_stay_where_the_configuration_keeps_them(cheese: Segmenter) -> None:
    cheese.config = dataclasses.replace(cheese.config, island_share=0.0)
    assert holes(cheese.segment(make_image(256, 256), [Click(30, 30)])) == [True, True, True]


# -- outlines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def comb(monkeypatch: pytest.MonkeyPatch) -> Segmenter:
    """Whatever the prompt, the network finds an object with an outline of teeth, a model pixel each."""
    model = make_tiny_model(dataclasses.replace(tiny(), island_share=0.1))
    logits = torch.full((256, 256), -1.0)
    logits[20:120, 20:120] = logits[20:120:2, 120] = 1.0
    found = Decoded(logits, (0, 0, 16, 16), torch.zeros(16, 16))
    monkeypatch.setattr(model, "decode", lambda *_: found)
    return Segmenter(model, model_size=256)


def teeth(result: Segmentation) -> int:
    """How often the right side of the object turns, from row to row."""
    assert ((result.logits() > 0) == result.mask).all()
    reach = result.mask.sum(1)[result.mask.any(1)].astype(int)
    return int(np.count_nonzero(np.diff(np.sign(np.diff(reach)[np.diff(reach) != 0]))))


def test_outlines_in_large_photos_have_no_teeth(comb: Segmenter) -> None:
    click = Click(60, 60)
    assert teeth(comb.segment(make_image(256, 256), [click])) > 90
    assert teeth(comb.segment(make_image(1024, 1024), [click])) < 9
    comb.config = dataclasses.replace(comb.config, island_share=0.0)
    assert teeth(comb.segment(make_image(1024, 1024), [click])) > 90


# -- the random walk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
def test_colours_are_asked_where_the_configuration_says_so(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network finds nothing; a click finds what has its colour, a second one at its side of another colour too."""
    if not compiled:
        monkeypatch.setattr(native, "_load", lambda: (None, "not here"))
    model = make_tiny_model(dataclasses.replace(tiny(), walk_trust=1e-4))
    found = Decoded(torch.full((256, 256), -1.0), (0, 0, 16, 16), torch.zeros(16, 16))
    monkeypatch.setattr(model, "decode", lambda *_: found)
    segmenter = Segmenter(model, model_size=256)
    image = np.zeros((256, 256, 3), np.uint8)
    image[64:128, 64:192], image[128:192, 64:192] = 250, 120
    one = segmenter.segment(image, [Click(128, 96), Click(10, 10, positive=False)]).mask
    assert one[70:122, 70:186].all()
    assert not one[134:].any()
    both = segmenter.segment(image, [Click(128, 96), Click(10, 10, positive=False), Click(128, 160)]).mask
    assert both[70:122, 70:186].all()
    assert both[134:186, 70:186].all()
    assert not both[:, 200:].any()
    assert not segmenter.segment(image, box=Box(40, 40, 210, 210)).mask.any()  # a box alone is the network's
    segmenter.config = tiny()
    segmenter.clear_cache()
    assert segmenter.segment(image, [Click(128, 96)]).mask.sum() == 9  # the click alone


# -- late clicks -----------------------------------------------------------------------------------------------------


def test_late_clicks_change_their_surroundings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network changes its mind at two places; from the second click on only the one that is clicked counts."""
    first, second = torch.full((256, 256), -1.0), torch.full((256, 256), -1.0)
    first[32:96, 32:96] = second[48:112, 32:96] = 1.0  # grows below, shrinks above
    second[160:200, 160:200] = 1.0  # and somewhere else
    passes = {1: Decoded(first[:112, :112], (0, 0, 7, 7), torch.zeros(16, 16))}
    passes[2] = Decoded(second, (0, 0, 16, 16), torch.zeros(16, 16))

    def after(local_from: int, *clicks: Click) -> Any:
        model = make_tiny_model(dataclasses.replace(tiny(), local_from=local_from))
        calls = iter(passes.values())

        def decode(*_: Any) -> Decoded:
            logits, box, low = next(calls)
            full = torch.full((256, 256), -100.0)
            full[: logits.shape[0], : logits.shape[1]] = logits
            return Decoded(full, box, low)

        monkeypatch.setattr(model, "decode", decode)
        return Segmenter(model, model_size=256).segment(np.zeros((256, 256, 3), np.uint8), clicks).mask

    start, grown = Click(64, 64), Click(64, 108)
    everything = after(0, start, grown)
    assert np.array_equal(everything, after(3, start, grown))  # not late yet
    assert everything[180, 180]
    assert not everything[40, 64]
    late = after(2, start, grown)
    assert late[108, 64]
    assert late[40, 64]  # was not asked about
    assert not late[180, 180]
    refused = after(2, start, Click(230, 20, positive=False))
    assert np.array_equal(refused, first.numpy() > 0)  # nothing changes there, so nothing changes at all
    with pytest.raises(ConfigError, match="local_from"):
        dataclasses.replace(tiny(), local_from=-1)


def test_a_click_on_a_given_mask_keeps_the_rest_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network would forget the mask; what the click does not meet stays, inside a box if there is one."""
    logits = torch.full((256, 256), -1.0)
    logits[100:140, 100:140] = 1.0
    model = make_tiny_model(dataclasses.replace(tiny(), local_from=4))
    monkeypatch.setattr(model, "decode", lambda *_: Decoded(logits, (0, 0, 16, 16), torch.zeros(16, 16)))
    segmenter = Segmenter(model, model_size=256)
    image, given = np.zeros((256, 256, 3), np.uint8), np.zeros((256, 256), bool)
    given[20:60, 20:200] = True
    both = segmenter.segment(image, [Click(120, 120)], initial_mask=given).mask
    assert np.array_equal(both, given | (logits.numpy() > 0))
    within = segmenter.segment(image, [Click(120, 120)], initial_mask=given, box=Box(10, 10, 150, 150)).mask
    assert within[30, 100]
    assert not within[30, 180]


# -- R8: what is not finite never leaves -----------------------------------------------------------------------------


def test_not_finite_logits_are_an_error_and_are_forgotten(
    tiny_model: Inter2Former, segmenter: Segmenter, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R8"""
    known = segmenter.segment(image, CLICKS[:2])
    decode = tiny_model.decode

    def poisoned(*arguments: Any) -> Any:
        decoded = decode(*arguments)
        decoded.logits[decoded.box[1] * 16, decoded.box[0] * 16] = float("nan")
        return decoded

    entries = segmenter.cache_info().entries
    with monkeypatch.context() as patch:
        patch.setattr(tiny_model, "decode", poisoned)
        with pytest.raises(NumericError, match="not finite"):
            segmenter.segment(image, CLICKS)
        assert segmenter.cache_info().entries == entries
        assert same(segmenter.segment(image, CLICKS[:2]), known)  # what was known before is still right
    assert segmenter.segment(image, CLICKS).mask.any()


def test_not_finite_activations_of_the_encoder_too(
    tiny_model: Inter2Former, segmenter: Segmenter, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R8"""
    with monkeypatch.context() as patch:
        for bad in (float("nan"), float("inf")):
            patch.setattr(tiny_model.encoder.out_norm.bias, "data", torch.full((16,), bad))
            with pytest.raises(NumericError, match="not finite"):
                segmenter.segment(image, CLICKS)
        assert segmenter.cache_info().entries == 0
    assert segmenter.segment(image, CLICKS).mask.any()


# -- R9: one image is encoded once -----------------------------------------------------------------------------------


def all_at_once(n_threads: int, work: Any) -> list[Any]:
    """What `work(i)` returned or raised in each of the threads."""
    barrier = threading.Barrier(n_threads)

    def run(index: int) -> Any:
        barrier.wait()
        try:
            return work(index)
        except Exception as error:
            return error

    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(run, range(n_threads)))


def test_one_image_is_encoded_once_however_many_ask(segmenter: Segmenter, image: Image) -> None:
    """R9"""
    results = all_at_once(32, lambda index: segmenter.segment(image, [Click(10 + 4 * index, 60)]))
    assert segmenter.encodes == 1
    assert sum(result.encoded for result in results) == 1
    alone = Segmenter(segmenter._model, model_size=256)
    assert all(same(result, alone.segment(image, result.clicks)) for result in results[::8])


def test_one_click_is_decoded_once_however_many_ask(segmenter: Segmenter, image: Image, decodes: list[int]) -> None:
    results = all_at_once(16, lambda _: segmenter.segment(image, CLICKS[:1]))
    assert len(decodes) == 1
    assert all(same(result, results[0]) for result in results)


def test_a_failed_encode_fails_for_all_and_is_tried_again(
    tiny_model: Inter2Former, segmenter: Segmenter, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R9"""

    def fails(_: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(tiny_model, "encode", fails)
        results = all_at_once(32, lambda index: segmenter.segment(image, [Click(10 + 4 * index, 60)]))
    assert [str(result) for result in results] == ["out of memory"] * 32
    assert segmenter.cache_info().entries == 0
    assert segmenter.segment(image, CLICKS).mask.any()
    assert segmenter.encodes == 1


# -- loading ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_file_becomes_a_segmenter(tiny_checkpoint: Path, segmenter: Segmenter, image: Image) -> None:
    loaded = load_segmenter(tiny_checkpoint, model_size=256, cache_bytes=2**20)
    assert len(loaded.digest) == 64
    assert loaded.config == tiny()
    assert loaded.cache_info().budget_bytes == 2**20
    again = load_segmenter(tiny_checkpoint, model_size=256)
    assert same(loaded.segment(image, CLICKS), again.segment(image, CLICKS))
    plain = segmenter.segment(image, CLICKS)  # a loaded model is packed: the same function, other last bits
    assert (loaded.segment(image, CLICKS).mask != plain.mask).mean() < 0.001


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        load_segmenter(tmp_path / "nowhere.safetensors")


def test_threads_are_set_once_at_the_start(tiny_checkpoint: Path, image: Image) -> None:
    """R13: one setting for torch and OpenCV, and every thread that clicks follows it."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        segmenter = load_segmenter(tiny_checkpoint, model_size=256, threads=2)
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (2, 2)
        segmenter.segment(image, CLICKS[:1])
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (2, 2)
        load_segmenter(tiny_checkpoint)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_impossible_threads_are_named(tiny_checkpoint: Path, threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads"):
        load_segmenter(tiny_checkpoint, threads=threads)


# -- a coarse size -----------------------------------------------------------------------------------------------


def coarse_segmenter(**options: Any) -> Segmenter:
    model = make_tiny_model(dataclasses.replace(tiny(), coarse_size=256))
    return Segmenter(model, model_size=512, **options)


def test_larger_sizes_show_what_was_found(image: Image) -> None:
    segmenter = coarse_segmenter()
    for n in range(1, len(CLICKS) + 1):
        large, found = segmenter.segment(image, CLICKS[:n]), segmenter.segment(image, CLICKS[:n], model_size=256)
        assert (large.model_size, found.model_size) == (512, 256)
        assert large.score == found.score
        # A pixel of the smaller frame is 0.63 of the image's.
        outline = cv2.morphologyEx(found.mask.view(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        assert np.array_equal(large.mask[~outline], found.mask[~outline])
    assert segmenter.encodes == 1
    plain = Segmenter(make_tiny_model(), model_size=256)
    assert same(found, plain.segment(image, CLICKS))


def test_nothing_found_has_no_outline(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = coarse_segmenter()
    found = Decoded(torch.full((256, 256), -1.0), (0, 0, 16, 16), torch.zeros(16, 16))
    monkeypatch.setattr(segmenter._model, "decode", lambda *_: found)
    assert segmenter.segment(image, CLICKS[:1]).mask.sum() == 9  # the clicked pixel and those around it


@pytest.mark.parametrize(
    "changes",
    [{"coarse_size": -256}, {"coarse_size": 300}, {"coarse_size": 256, "input_convention": "released"}],
)
def test_impossible_coarse_sizes_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="coarse_size"):
        dataclasses.replace(tiny(), **changes)


def test_png_of_a_tiny_image(segmenter: Segmenter) -> None:
    result = segmenter.segment(encode_png(np.full((1, 1, 3), 77, np.uint8)), [Click(0.5, 0.5)])
    assert result.mask.tolist() == [[True]]


def test_is_encoded_looks_and_decodes_nothing(segmenter: Segmenter, image_png: bytes) -> None:
    assert not segmenter.is_encoded(image_png)
    assert not segmenter.is_encoded(b"not an image")
    segmenter.prefetch(image_png)
    assert segmenter.is_encoded(image_png)
    assert not segmenter.is_encoded(image_png, model_size=512)
    segmenter.clear_cache()
    assert not segmenter.is_encoded(image_png)
    assert segmenter.encodes == 1
