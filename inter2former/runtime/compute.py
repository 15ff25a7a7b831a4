"""The one thread of the process in which PyTorch computes with several threads. No network and no image is known here.

OpenMP keeps a team of threads for every thread that ever asked it for work: servers with many threads would have as
many teams, and a child that is forked from a thread with a team waits for its dead workers for ever. Here one thread
has the one team, whoever asks; one piece of work follows the other, each with all the threads that are set. A fork
waits for the end of the piece at work, and the child starts a thread of its own.

An encode takes as long as dozens of clicks. It gives way to them: between its steps it waits while clicks are computed,
for PATIENCE_S at most, so that the one who waits for it is not forgotten.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")

PATIENCE_S = 1.0  # of one piece of work; a person who clicks every half a second is never in its way for so long

_at_work = threading.Lock()  # held while PyTorch computes; also by a thread that forks
_next = threading.Lock()  # whoever forks comes before the next piece of work
_starting = threading.Lock()
_thread: ThreadPoolExecutor | None = None
_clicks_changed = threading.Condition()
_clicks = 0  # that are computed just now
_patience = 0.0  # what is left of it to the piece at work


def run(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises, computed in that thread. Work must not call `run` again.

    Threads are as many as the caller's `torch.get_num_threads()` says.
    """
    return _executor().submit(_compute, work, torch.get_num_threads()).result()


@contextmanager
def click() -> Iterator[None]:
    """Meanwhile a piece of work that is long waits between its steps. Nobody may call `run` meanwhile."""
    global _clicks
    with _clicks_changed:
        _clicks += 1
    try:
        yield
    finally:
        with _clicks_changed:
            _clicks -= 1
            _clicks_changed.notify_all()


def give_way() -> None:
    """Called by work between its steps: returns when no click is computed, or its patience is at its end."""
    global _patience
    if _clicks == 0 or _patience <= 0:
        return
    began = time.monotonic()
    with _clicks_changed:
        _clicks_changed.wait_for(lambda: _clicks == 0, _patience)
    _patience -= time.monotonic() - began


def _compute(work: Callable[[], Result], threads: int) -> Result:
    global _patience
    with _next:
        _at_work.acquire()
    _patience = PATIENCE_S
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
    global _thread, _at_work, _next, _starting, _clicks_changed, _clicks
    _thread, _at_work, _next, _starting = None, threading.Lock(), threading.Lock(), threading.Lock()
    _clicks_changed, _clicks = threading.Condition(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
