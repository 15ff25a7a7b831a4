"""PyTorch computes in one thread, whoever asks (R13), and a fork does not break it (R22)."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from inter2former.errors import NumericError
from inter2former.runtime import compute


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
