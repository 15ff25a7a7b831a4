"""Which clicks were negative: the only thing between two requests that a mask depends on.

The labeling page forgets the signs of pending clicks when it is reloaded, and after the next save its draft has
forgotten them too. They are remembered here by platform, project, task and region, as many as fit, and in a file if
there is one, so that a restart forgets nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
from pathlib import Path

import cachetools

LIMIT = 50_000  # clicks: weeks of a team's work
_PRUNE_EVERY = 1000  # writes

Key = tuple[str, str, str, str]  # platform, project, task, region

log = logging.getLogger(__name__)


class Polarities:
    """Signs of clicks, the latest `limit` of them. Thread-safe. A file that fails is done without, and the log says so.

    file   a SQLite database, made when it is not there; None: the memory of this process is all
    """

    def __init__(self, file: Path | None = None, *, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._known: cachetools.LRUCache[Key, bool] = cachetools.LRUCache(limit)
        self._database: sqlite3.Connection | None = None
        self._writes = 0
        if file is not None:
            try:
                self._open(file)
            except (sqlite3.Error, ValueError) as error:
                self._give_up(error)

    def get(self, key: Key) -> bool | None:
        with self._lock:
            known: bool | None = self._known.get(key)
            return known

    def set(self, key: Key, positive: bool) -> None:
        with self._lock:
            if self._known.get(key) is positive:
                return
            self._known[key] = positive
            if self._database is not None:
                try:
                    self._write(self._database, key, positive)
                except sqlite3.Error as error:
                    self._give_up(error)

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def _open(self, file: Path) -> None:
        # A sign that is lost with the machine's power costs nothing: no click waits for the disk.
        database = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=1.0)
        self._database = database
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=OFF")
        database.execute("CREATE TABLE IF NOT EXISTS polarity (region TEXT PRIMARY KEY, positive INTEGER NOT NULL)")
        self._prune(database)
        for text, positive in database.execute("SELECT region, positive FROM polarity ORDER BY rowid"):
            platform, project, task, region = (str(part) for part in json.loads(text))
            self._known[platform, project, task, region] = bool(positive)

    def _write(self, database: sqlite3.Connection, key: Key, positive: bool) -> None:
        database.execute("INSERT OR REPLACE INTO polarity VALUES (?, ?)", (json.dumps(key), positive))
        self._writes += 1
        if self._writes % _PRUNE_EVERY == 0:
            self._prune(database)

    def _prune(self, database: sqlite3.Connection) -> None:
        database.execute(
            "DELETE FROM polarity WHERE rowid <= (SELECT rowid FROM polarity ORDER BY rowid DESC LIMIT 1 OFFSET ?)",
            (self._limit,),
        )

    def _give_up(self, error: Exception) -> None:
        log.warning("the file of click signs cannot be used, they are kept in memory only: %s", error)
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None
