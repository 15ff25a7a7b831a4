"""Work that nobody waits for: encoding ahead, one piece at a time."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable

from inter2former.errors import Inter2FormerError

AHEAD_WAITING = 64  # tasks to be encoded ahead; further ones are forgotten

log = logging.getLogger(__name__)


class Ahead:
    """One thread in the background, and a bounded line in front of it."""

    def __init__(self) -> None:
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._places = threading.BoundedSemaphore(AHEAD_WAITING)

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def do(self, work: Callable[[], None]) -> None:
        """Once there is time; what goes wrong is only logged, and what does not fit in line is forgotten."""
        if not self._places.acquire(blocking=False):
            return

        def run() -> None:
            try:
                work()
            except Inter2FormerError as error:
                log.info("not encoded ahead: %s", error)
            except Exception:
                log.exception("encoding ahead failed")
            finally:
                self._places.release()

        try:
            self._worker.submit(run)
        except RuntimeError:  # shutting down
            self._places.release()
