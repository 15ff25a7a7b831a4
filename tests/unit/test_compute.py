"""PyTorch computes in one thread, whoever asks (R13), and a fork does not break it (R22)."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from synthetic import make_image, make_tiny_model

from inter2former import Click, Segmenter
from inter2former.errors import NumericError
from inter2former.runtime import compute, native
from inter2former.runtime.packing import pack


def test_r13_all_callers_share_one_thread() -> None:
    with ThreadPoolExecutor(8) as callers:
        seen = set(callers.map(lambda _: compute.run(threading.get_ident), range(40)))
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_errors_reach_the_caller_and_the_next_work_runs() -> None:
    def fail() -> None:
        raise NumericError("no")

    with pytest.raises(NumericError, match="no"):
        compute.run(fail)
    assert compute.run(lambda: 3) == 3


def test_threads_follow_the_callers_setting() -> None:
    before = torch.get_num_threads()
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            assert compute.run(torch.get_num_threads) == count
    finally:
        torch.set_num_threads(before)


class Ticking:
    """Long work in many parts; how many are done."""

    def __init__(self, aside_s: float) -> None:
        self.ticks, self._end = 0, False
        self._thread = threading.Thread(target=compute.run, args=(self._work,), kwargs={"aside_s": aside_s})

    def _work(self) -> None:
        while not self._end:
            compute.stand_aside()
            self.ticks += 1
            time.sleep(0.001)

    def goes_on(self, within_s: float) -> bool:
        """Whether parts are done within a time; one that was begun before does not count."""
        before, end = self.ticks, time.monotonic() + within_s
        while time.monotonic() < end and self.ticks <= before + 1:
            time.sleep(0.002)
        return self.ticks > before + 1

    def __enter__(self) -> Ticking:
        self._thread.start()
        assert self.goes_on(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._end = True
        self._thread.join()


def test_r11_long_work_stands_aside_for_what_goes_first() -> None:
    with Ticking(aside_s=1000) as work:
        with compute.first():
            with compute.first():
                assert not work.goes_on(0.1)
            assert not work.goes_on(0.1)  # the other one has not ended
        assert work.goes_on(60)


def test_r11_long_work_loses_its_patience() -> None:
    with Ticking(aside_s=0.3) as work, compute.first():
        assert not work.goes_on(0.05)
        assert work.goes_on(60)
        with compute.first():
            assert work.goes_on(60)


def test_r11_other_work_does_not_stand_aside() -> None:
    with Ticking(aside_s=0) as work, compute.first():
        assert work.goes_on(60)
    with compute.first():
        compute.stand_aside()  # nor does what runs in another thread


@pytest.mark.parametrize("compiled", [True, False])
def test_r11_an_encode_stands_aside_for_clicks(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a click is decoded natively. In PyTorch it is decoded by the very thread that encodes, and waits."""
    if not compiled:
        monkeypatch.setattr(native, "_load", lambda: (None, "not here"))
    segmenter = Segmenter(pack(make_tiny_model()), model_size=256)
    image = segmenter.known(make_image())
    segmenter.prefetch(image)
    went_on: list[bool] = []
    decode = segmenter._decode

    def watched(*arguments: Any) -> Any:
        went_on.append(work.goes_on(0.2))
        return decode(*arguments)

    monkeypatch.setattr(segmenter, "_decode", watched)
    with Ticking(aside_s=1000) as work:
        clicking = threading.Thread(target=segmenter.segment, args=(image, [Click(50, 50)]))
        clicking.start()
        while not went_on:
            time.sleep(0.002)
        assert work.goes_on(60)
    clicking.join()
    assert went_on == [not compiled]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_r22_a_fork_waits_for_the_work_and_the_child_has_its_own_thread() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(60)
        ended.set()

    here, there = multiprocessing.Pipe(False)
    working = threading.Thread(target=compute.run, args=(work,))
    working.start()
    begun.wait(60)
    threading.Timer(0.2, may_end.set).start()
    child = os.fork()
    if child == 0:
        try:
            there.send((ended.is_set(), compute.run(lambda: int(torch.ones(4).sum()))))
        finally:
            os._exit(0)
    there.close()
    assert here.poll(60), "the child is locked up"
    assert here.recv() == (True, 4)
    os.waitpid(child, 0)
    working.join()
    assert compute.run(lambda: 5) == 5
