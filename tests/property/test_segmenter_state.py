"""R3: replay equals increments. A session in any order of steps against a Segmenter that always starts from nothing."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from synthetic import make_image, make_tiny_model

from inter2former import Box, Click, Segmenter

SIZES = [(90, 130), (64, 64), (200, 70)]
MAX_CLICKS = 5

fractions = st.floats(0, 1, exclude_max=True, width=16)
clicks = st.tuples(fractions, fractions, st.booleans())
rectangles = st.tuples(
    st.sampled_from([0.0, 0.25, 0.5]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.6, 0.9]),
    st.sampled_from([0.5, 1.0]),
)
Rectangle = tuple[float, float, float, float]

model = functools.cache(make_tiny_model)
picture = functools.cache(make_image)


def answer(
    segmenter: Segmenter,
    image: int,
    told: tuple[tuple[float, float, bool], ...],
    box: Rectangle | None,
    mask: Rectangle | None,
) -> tuple[bytes, bytes, float]:
    height, width = SIZES[image]
    initial_mask = None
    if mask is not None:
        initial_mask = np.zeros((height, width), np.bool_)
        initial_mask[int(mask[1] * height) : int(mask[3] * height), int(mask[0] * width) : int(mask[2] * width)] = True
    result = segmenter.segment(
        picture(height, width, image),
        [Click(x * width, y * height, positive) for x, y, positive in told],
        box=None if box is None else Box(box[0] * width, box[1] * height, box[2] * width, box[3] * height),
        initial_mask=initial_mask,
    )
    last = {(int(y * height), int(x * width)): positive for x, y, positive in told}
    assert all(result.mask[pixel] == positive for pixel, positive in last.items())  # R4 on the way
    return result.mask.tobytes(), result.logits().tobytes(), result.score


@functools.cache
def from_nothing(
    image: int,
    told: tuple[tuple[float, float, bool], ...],
    box: Rectangle | None,
    mask: Rectangle | None,
) -> tuple[bytes, bytes, float]:
    return answer(Segmenter(model(), model_size=256, cache_bytes=0), image, told, box, mask)


class Session(RuleBasedStateMachine):
    """What an annotator may do. Every step ends with a request, compared bit for bit."""

    @initialize(plenty=st.booleans())
    def begin(self, plenty: bool) -> None:
        # 3 MB: one encoding and a few states, so that entries also leave by themselves.
        self.segmenter = Segmenter(model(), model_size=256, cache_bytes=2**30 if plenty else 3_000_000)
        self.image = 0
        self.clicks: list[tuple[float, float, bool]] = []
        self.box: Rectangle | None = None
        self.mask: Rectangle | None = None

    def ask(self) -> None:
        if self.clicks or self.box or self.mask:
            session = self.image, tuple(self.clicks), self.box, self.mask
            assert answer(self.segmenter, *session) == from_nothing(*session)

    @precondition(lambda self: len(self.clicks) < MAX_CLICKS)
    @rule(click=clicks)
    def add(self, click: tuple[float, float, bool]) -> None:
        self.clicks.append(click)
        self.ask()

    @precondition(lambda self: len(self.clicks) <= MAX_CLICKS - 3)
    @rule(several=st.lists(clicks, min_size=2, max_size=3))
    def add_several_at_once(self, several: list[tuple[float, float, bool]]) -> None:
        self.clicks.extend(several)
        self.ask()

    @precondition(lambda self: self.clicks)
    @rule(how_many=st.integers(1, 2))
    def undo(self, how_many: int) -> None:
        del self.clicks[-how_many:]
        self.ask()

    @precondition(lambda self: self.clicks)
    @rule(click=clicks, where=st.integers(0, MAX_CLICKS - 1))
    def change(self, click: tuple[float, float, bool], where: int) -> None:
        self.clicks[where % len(self.clicks)] = click
        self.ask()

    @rule(box=st.none() | rectangles)
    def move_box(self, box: Rectangle | None) -> None:
        self.box = box
        self.ask()

    @rule(mask=st.none() | rectangles)
    def give_mask(self, mask: Rectangle | None) -> None:
        self.mask = mask
        self.ask()

    @rule(image=st.integers(0, len(SIZES) - 1))
    def turn_to_image(self, image: int) -> None:
        self.image = image
        self.clicks = self.clicks[:1]
        self.ask()

    @rule()
    def evict(self) -> None:
        self.segmenter.clear_cache()
        self.ask()


Session.TestCase.settings = settings(max_examples=15, stateful_step_count=12)
TestSession = Session.TestCase
