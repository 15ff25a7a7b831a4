"""The byte-bounded cache: budget, order of leaving, one maker a value (R9, R12)."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inter2former.errors import ConfigError
from inter2former.runtime.cache import ByteCache

N_THREADS = 32


def array(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes, np.uint8)


def never() -> np.ndarray:
    raise AssertionError("made again")


def wait_for(cache: ByteCache, waiters: int) -> None:
    """Until so many requests wait for the value that is being made (a waiter is a hit)."""
    give_up = time.monotonic() + 30
    while cache.info().hits < waiters and time.monotonic() < give_up:
        time.sleep(0.001)


def test_a_value_is_made_once() -> None:
    cache = ByteCache(100)
    value = cache.get_or_make("a", lambda: array(10))
    assert cache.get_or_make("a", never) is value
    assert cache.get("a") is value
    assert cache.get("b") is None
    assert cache.info() == (10, 100, 1, 2, 1, 0)


def test_least_recently_used_leaves_first() -> None:
    cache = ByteCache(30)
    for key in "abc":
        cache.get_or_make(key, lambda: array(10))
    cache.get("a")
    cache.get_or_make("d", lambda: array(15))  # takes the place of b and c
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "d"]
    assert cache.info().nbytes == 25
    assert cache.info().evictions == 2


@pytest.mark.parametrize(("budget", "nbytes"), [(0, 1), (99, 100), (0, 10**6)])
def test_larger_than_the_budget_is_served_and_not_kept(budget: int, nbytes: int) -> None:
    cache = ByteCache(budget)
    small = cache.get_or_make("small", lambda: array(min(50, budget)))
    assert cache.get_or_make("large", lambda: array(nbytes)).nbytes == nbytes
    assert cache.get("large") is None
    assert cache.get("small") is small  # nothing had to leave for it
    assert cache.info().nbytes <= budget


def test_exactly_the_budget_is_kept() -> None:
    cache = ByteCache(100)
    cache.get_or_make("a", lambda: array(100))
    assert cache.get("a") is not None


def test_a_negative_budget_is_named() -> None:
    with pytest.raises(ConfigError, match="cache_bytes is -1"):
        ByteCache(-1)


def test_clear_forgets_everything() -> None:
    cache = ByteCache(100)
    cache.get_or_make("a", lambda: array(10))
    cache.clear()
    assert cache.get("a") is None
    assert cache.info().nbytes == cache.info().entries == 0


def test_many_askers_one_maker() -> None:
    cache = ByteCache(100)
    made = []

    def make() -> np.ndarray:
        wait_for(cache, N_THREADS - 1)
        made.append(array(10))
        return made[-1]

    with ThreadPoolExecutor(N_THREADS) as pool:
        values = list(pool.map(lambda _: cache.get_or_make("a", make), range(N_THREADS)))
    assert len(made) == 1
    assert all(value is made[0] for value in values)


def test_waiters_are_served_when_the_value_is_too_large_to_keep() -> None:
    cache = ByteCache(5)

    def make() -> np.ndarray:
        wait_for(cache, N_THREADS - 1)
        return array(10)

    with ThreadPoolExecutor(N_THREADS) as pool:
        values = list(pool.map(lambda _: cache.get_or_make("a", make), range(N_THREADS)))
    assert len({id(value) for value in values}) == 1
    assert cache.info().entries == 0


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failure_wakes_all_waiters_and_is_not_kept(error: BaseException) -> None:
    cache = ByteCache(100)

    def make() -> np.ndarray:
        wait_for(cache, N_THREADS - 1)
        raise error

    def ask(_: int) -> BaseException | None:
        try:
            cache.get_or_make("a", make)
        except BaseException as caught:
            return caught
        return None

    with ThreadPoolExecutor(N_THREADS) as pool:
        assert all(caught is error for caught in pool.map(ask, range(N_THREADS)))
    assert cache.info().entries == 0
    assert cache.get_or_make("a", lambda: array(10)).nbytes == 10


def test_nothing_is_locked_while_a_value_is_made() -> None:
    cache = ByteCache(100)

    def make() -> np.ndarray:
        done = threading.Thread(target=lambda: cache.get_or_make("b", lambda: array(1)))
        done.start()
        done.join(30)
        assert not done.is_alive()
        assert cache.get("b") is not None
        return array(10)

    cache.get_or_make("a", make)


@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 7), st.booleans())))
def test_accounting_follows_the_real_bytes(budget: int, requests: list[tuple[int, bool]]) -> None:
    """Against the plainest cache there is: an ordered dictionary, counted anew each time."""
    cache = ByteCache(budget)
    kept: OrderedDict[int, int] = OrderedDict()
    for key, makes in requests:
        nbytes = 5 * key
        if makes:
            cache.get_or_make(key, lambda nbytes=nbytes: array(nbytes))
            if key not in kept and nbytes <= budget:
                kept[key] = nbytes
                while sum(kept.values()) > budget:
                    kept.popitem(last=False)
        else:
            assert (cache.get(key) is not None) == (key in kept)
        if key in kept:
            kept.move_to_end(key)
        info = cache.info()
        assert (info.nbytes, info.entries) == (sum(kept.values()), len(kept))
        assert info.nbytes <= budget


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_r22_a_child_waits_for_no_thread_that_stayed_in_the_parent() -> None:
    cache = ByteCache(100)
    cache.get_or_make("kept", lambda: array(10))
    begun, may_end = threading.Event(), threading.Event()

    def slow() -> np.ndarray:
        begun.set()
        may_end.wait(60)
        return array(1)

    maker = threading.Thread(target=cache.get_or_make, args=("a", slow))
    maker.start()
    begun.wait(60)
    here, there = multiprocessing.Pipe(False)
    child = os.fork()
    if child == 0:
        try:
            there.send((len(cache.get_or_make("a", lambda: array(2))), len(cache.get_or_make("kept", never))))
        finally:
            os._exit(0)
    there.close()
    assert here.poll(60), "the child is locked up"
    assert here.recv() == (2, 10)
    os.waitpid(child, 0)
    may_end.set()
    maker.join()
