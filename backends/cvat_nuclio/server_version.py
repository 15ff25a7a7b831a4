"""Which answers a CVAT understands, by its version: what `I2F_CVAT_RESPONSE=auto` goes by when CVAT_URL is set.

A request does not tell the version of its page, so the server is asked: GET /api/server/about.
"""

from __future__ import annotations

import logging
import re
import threading
import time

import httpx

from backends.common.http import FetchError

SHAPES_SINCE = (2, 71)  # the first whose own tools speak of shapes as given; pages from early 2026 on read them
ASK_S = 3.0
AGAIN_S = 600.0  # a CVAT may be started after us, and may be updated under us

log = logging.getLogger(__name__)


def about(url: str, token: str | None = None) -> tuple[int, ...]:
    """The version of a CVAT server as numbers; FetchError saying what came instead."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.get(f"{url}/api/server/about", headers=headers, timeout=ASK_S)
        answer.raise_for_status()
        version = answer.json()["version"]
    except httpx.HTTPStatusError as problem:
        raise FetchError(f"CVAT answers {problem.response.status_code} to /api/server/about.") from None
    except httpx.HTTPError as problem:
        raise FetchError(f"CVAT cannot be reached ({type(problem).__name__}).", "Is its address right?") from None
    except (ValueError, KeyError, TypeError):
        raise FetchError("What answers there is not CVAT.", "Give CVAT's own address.") from None
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(version))
    if numbers is None:
        raise FetchError(f"CVAT's version {str(version)[:40]!r} cannot be read.")
    return tuple(int(number) for number in numbers.groups(default="0"))


class ReadsShapes:
    """Calling it says whether the CVAT at `url` reads `shapes`; False while its version is not known. Never waits:
    another thread asks, at the start and then every `again_s` seconds of use."""

    def __init__(self, url: str, token: str | None = None, *, again_s: float = AGAIN_S) -> None:
        self._url, self._token, self._again_s = url, token, again_s
        self._known = False
        self._due = 0.0
        self._lock = threading.Lock()

    def __call__(self) -> bool:
        with self._lock:
            due = time.monotonic() >= self._due
            if due:
                self._due = time.monotonic() + self._again_s
        if due:
            threading.Thread(target=self.ask, daemon=True).start()
        return self._known

    def ask(self) -> None:
        """Ask now; a CVAT that does not answer leaves what was known, and is asked again soon."""
        try:
            version = about(self._url, self._token)
        except FetchError as problem:
            log.warning("the version of CVAT is not known: %s", problem)
            with self._lock:
                self._due = time.monotonic() + min(self._again_s, 30.0)
            return
        if self._known != (version >= SHAPES_SINCE):
            log.info("CVAT %s reads shapes", ".".join(map(str, version)))
        self._known = version >= SHAPES_SINCE
