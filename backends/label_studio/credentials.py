"""Which Authorization header Label Studio wants, for the two kinds of token it has.

- A legacy token is sent as it is: `Token x`. New organisations have these switched off.
- A personal access token is a JWT that is good for one thing: asking for an access token, which lives for minutes and
  is sent as `Bearer y`. It is kept until shortly before it ends.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import threading
import time
from collections.abc import Callable

import cachetools

from backends.common.http import FetchError
from backends.common.images import Fetcher, Platform

REFRESH_PATH = "/api/token/refresh/"
EARLY_S = 30.0  # before its end an access token is no longer used: the request has to arrive with it
_FALLBACK_LIFE_S = 120.0  # of an access token that does not say when it ends; 1.23.2 gives them 300 s
_JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


def is_personal_access_token(token: str) -> bool:
    """Three parts with dots between them: a JWT."""
    return _JWT.fullmatch(token) is not None


class Credentials:
    """Authorization headers. Thread-safe; one refresh at a time."""

    def __init__(self, fetcher: Fetcher, *, now: Callable[[], float] = time.time) -> None:
        self._fetcher = fetcher
        self._now = now
        self._lock = threading.Lock()
        self._access: cachetools.LRUCache[tuple[str, str], tuple[str, float]] = cachetools.LRUCache(256)

    def headers(self, platform: Platform, token: str) -> dict[str, str]:
        """The header for a token; empty without one. FetchError when the platform gives no access token."""
        if not token:
            return {}
        if not is_personal_access_token(token):
            return {"Authorization": f"Token {token}"}
        with self._lock:
            known = self._access.get((platform.url, token))
            if known is None or known[1] <= self._now():
                known = self._refresh(platform, token)
                self._access[platform.url, token] = known
            return {"Authorization": f"Bearer {known[0]}"}

    def forget(self, platform: Platform, token: str, headers: dict[str, str]) -> bool:
        """Call when `headers` were answered with 401. True when another attempt is worth it."""
        if not is_personal_access_token(token):
            return False
        with self._lock:
            known = self._access.get((platform.url, token))
            if known is not None and headers.get("Authorization") == f"Bearer {known[0]}":
                del self._access[platform.url, token]
        return True

    def _refresh(self, platform: Platform, token: str) -> tuple[str, float]:
        """(access token, until when it is used)."""
        body = json.dumps({"refresh": token}).encode("ascii")
        answer = self._fetcher.post_json(platform.url + REFRESH_PATH, body, platform=platform)
        try:
            access = json.loads(answer)["access"]
        except (ValueError, KeyError, TypeError, RecursionError):
            access = None
        if not isinstance(access, str) or not _JWT.fullmatch(access):
            raise FetchError("Label Studio gave no access token for the personal access token.")
        return access, _end(access, self._now() + _FALLBACK_LIFE_S) - EARLY_S


def _end(access: str, otherwise: float) -> float:
    """`exp` of a JWT, unix seconds. The signature is not ours to check: we only carry the token."""
    payload = access.split(".")[1]
    try:
        end = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
        return float(end) if isinstance(end, int | float) and not isinstance(end, bool) else otherwise
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, binascii.Error):
        return otherwise
