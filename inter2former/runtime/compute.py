"""The one thread of the process in which PyTorch computes with several threads. No network and no image is known here.

OpenMP keeps a team of threads for every thread that ever asked it for work: servers with many threads would have as
many teams, and a child that is forked from a thread with a team waits for its dead workers for ever. Here one thread
has the one team, whoever asks; one piece of work follows the other, each with all the threads that are set. A fork
waits for the end of the piece at work, and the child starts a thread of its own.

Long work that somebody waits for less than for a click stands aside between its parts while clicks are computed: beside
them it would take their cores' time and caches, and niceness alone leaves it a quarter of a core.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

QUIET_S = 0.008  # without a click before long work goes on: around what it computes, a click is in Python

Result = TypeVar("Result")

_at_work = threading.Lock()  # held while PyTorch computes; also by a thread that forks
_next = threading.Lock()  # whoever forks comes before the next piece of work
_starting = threading.Lock()
_thread: ThreadPoolExecutor | None = None
_first = threading.Condition()
_n_first = 0  # pieces of work that go first
_first_ended = -math.inf  # when the last of them did
_patience = threading.local()  # of this thread's work: .left, seconds for which it still stands aside; .since it began


def run(work: Callable[[], Result], *, aside_s: float = 0.0) -> Result:
    """What `work` returns or raises, computed in that thread. Work must not call `run` again.

    Threads are as many as the caller's `torch.get_num_threads()` says. `aside_s`: for how many seconds, all together,
    the work may stand aside where it calls `stand_aside`.
    """
    return _executor().submit(_compute, work, torch.get_num_threads(), aside_s).result()


@contextmanager
def first() -> Iterator[None]:
    """While this is open, work that may stand aside does. It must not be waited for in here."""
    global _n_first, _first_ended
    with _first:
        _n_first += 1
    try:
        yield
    finally:
        with _first:
            _n_first -= 1
            _first_ended = time.monotonic()
            if _n_first == 0:
                _first.notify_all()


def stand_aside() -> None:
    """Between two parts of long work: wait until nothing has gone first for QUIET_S, while there is patience left.

    What ended before the work began does not count.
    """
    left = getattr(_patience, "left", 0.0)
    if left <= 0 or (not _n_first and _first_ended < _patience.since):
        return
    began = now = time.monotonic()
    with _first:
        while now - began < left and (_n_first or now - _first_ended < QUIET_S):
            quiet_in = left if _n_first else QUIET_S - (now - _first_ended)
            _first.wait(min(quiet_in, left - (now - began)))
            now = time.monotonic()
    _patience.left = left - (now - began)


def _compute(work: Callable[[], Result], threads: int, aside_s: float) -> Result:
    with _next:
        _at_work.acquire()
    _patience.left, _patience.since = aside_s, time.monotonic()
    try:
        if torch.get_num_threads() != threads:  # changed since this thread began; servers set them once, before
            torch.set_num_threads(threads)
        return work()
    finally:
        _at_work.release()


def _before_fork() -> None:
    _next.acquire()
    _at_work.acquire()


def _in_parent() -> None:
    _at_work.release()
    _next.release()


def _executor() -> ThreadPoolExecutor:
    global _thread
    with _starting:
        if _thread is None:
            _thread = ThreadPoolExecutor(1, thread_name_prefix="torch")
        return _thread


def _in_child() -> None:
    global _thread, _at_work, _next, _starting, _first, _n_first
    _thread, _at_work, _next, _starting = None, threading.Lock(), threading.Lock(), threading.Lock()
    _first, _n_first = threading.Condition(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
