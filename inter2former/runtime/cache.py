"""A thread-safe cache with a budget in bytes: what was computed for an image and its click prefixes is kept here.

It knows nothing of images or clicks: keys are hashable, values say their own size. Forgetting an entry may cost time,
never an answer.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from cachetools import LRUCache

from inter2former.errors import ConfigError


class Sized(Protocol):
    """A value of the cache: `nbytes` are the bytes that its arrays hold, and never change."""

    @property
    def nbytes(self) -> int: ...


Value = TypeVar("Value", bound=Sized)


class CacheInfo(NamedTuple):
    """What the cache holds and has done so far. `nbytes` is the sum over the entries, never above `budget_bytes`."""

    nbytes: int
    budget_bytes: int
    entries: int
    hits: int
    misses: int
    evictions: int


class ByteCache:
    """Least recently used entries leave first; an entry larger than the whole budget is served and not kept.

    Only bookkeeping happens under the lock: values are made outside of it, each by one thread however many ask.

    raises  ConfigError for a negative budget
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ConfigError(f"cache_bytes is {budget_bytes}.", "Give 0 (keep nothing) or more.")
        self._budget = int(budget_bytes)
        self._entries: Any = LRUCache(maxsize=self._budget, getsizeof=lambda value: int(value.nbytes))
        self._flights: dict[Hashable, Future[Sized]] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = self._evictions = 0
        _caches.add(self)

    def _in_child(self) -> None:
        """After a fork: the threads that made values are not in the child, nor is the one that held the lock."""
        if self._lock.locked():
            self._entries.clear()
        self._lock, self._flights = threading.Lock(), {}

    def get(self, key: Hashable) -> Any | None:
        """The value, now the most recently used one; None when it is not here (not counted as a miss)."""
        with self._lock:
            value = self._entries.get(key)
            self._hits += value is not None
            return value

    def get_or_make(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value; made by `make` when it is not here.

        While one thread makes a value the others that ask for it wait. When `make` raises, all of them get that
        error, nothing is kept, and the next to ask tries again.
        """
        with self._lock:
            value = self._entries.get(key)
            if value is not None:
                self._hits += 1
                return cast(Value, value)
            flight = self._flights.get(key)
            leads = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
                self._misses += 1
            else:
                self._hits += 1
        if not leads:
            return cast(Value, flight.result())
        try:
            made = make()
        except BaseException as error:
            with self._lock:
                del self._flights[key]
            flight.set_exception(error)
            raise
        with self._lock:
            del self._flights[key]
            self._keep(key, made)
        flight.set_result(made)
        return made

    def _keep(self, key: Hashable, value: Sized) -> None:
        if value.nbytes > self._budget:
            return
        before = len(self._entries)
        self._entries[key] = value
        self._evictions += before + 1 - len(self._entries)

    def clear(self) -> None:
        """Forget every entry; values being made will still be kept."""
        with self._lock:
            self._entries.clear()

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(
                nbytes=int(self._entries.currsize),
                budget_bytes=self._budget,
                entries=len(self._entries),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )


_caches: weakref.WeakSet[ByteCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in _caches:
        cache._in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
