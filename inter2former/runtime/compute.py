"""The one thread of the process in which PyTorch computes with several threads. No network and no image is known here.

OpenMP keeps a team of threads for every thread that ever asked it for work: servers with many threads would have as
many teams, and a child that is forked from a thread with a team waits for its dead workers for ever. Here one thread
has the one team, whoever asks; one piece of work follows the other, each with all the threads that are set. A fork
waits for the end of the piece at work, and the child starts a thread of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_at_work = threading.Lock()  # held while PyTorch computes; also by a thread that forks
_next = threading.Lock()  # whoever forks comes before the next piece of work
_starting = threading.Lock()
_thread: ThreadPoolExecutor | None = None


def run(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises, computed in that thread. Work must not call `run` again.

    Threads are as many as the caller's `torch.get_num_threads()` says.
    """
    return _executor().submit(_compute, work, torch.get_num_threads()).result()


def _compute(work: Callable[[], Result], threads: int) -> Result:
    with _next:
        _at_work.acquire()
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
    global _thread, _at_work, _next, _starting
    _thread, _at_work, _next, _starting = None, threading.Lock(), threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
