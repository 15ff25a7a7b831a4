"""The log of a door: to standard error, one line an event, plain or JSON, with the request's id and without secrets."""

from __future__ import annotations

import contextvars
import json
import logging
import re
import secrets
import sys
from collections.abc import Iterable

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")

MASK = "***"
_USABLE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECRETS = (
    # user:password@ in an address
    (re.compile(r"(?<=://)[^/\s'\"@]*@"), f"{MASK}@"),
    # Authorization: Token x, Bearer x, Basic x
    (re.compile(r"\b(Token|Bearer|Basic)(\s+)[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE), rf"\1\2{MASK}"),
    # JSON web tokens, wherever they stand
    (re.compile(r"\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"), MASK),
    # the query of an address: presigned addresses carry their signature there
    (re.compile(r"(https?://[^\s'\"?]*|/[^\s'\"?]*)\?[^\s'\"]+"), rf"\1?{MASK}"),
    (
        re.compile(
            r"((?:access_?token|api_?key|refresh|password|passwd|secret|signature|authorization)['\"]?\s*[:=]\s*['\"]?)"
            r"[^\s'\"&,}]+",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
)


def new_request_id(given: str | None = None) -> str:
    """The caller's id when it is short and plain, else a new one."""
    return given if given and _USABLE_ID.fullmatch(given) else secrets.token_hex(8)


class Formatter(logging.Formatter):
    """Plain text or JSON lines. `known` are secret values that are replaced wherever they appear."""

    def __init__(self, *, as_json: bool = False, known: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._as_json = as_json
        self._known = sorted((value for value in known if len(value) >= 4), key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        message = self.redact(record.getMessage())
        trace = self.redact(self.formatException(record.exc_info)) if record.exc_info else ""
        head = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "logger": record.name,
            "request": request_id.get(),
        }
        if self._as_json:
            return json.dumps({**head, "message": message, **({"trace": trace} if trace else {})})
        line = " ".join((*head.values(), message.replace("\n", " | ")))
        text = f"{line}\n{trace}" if trace else line
        return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates would break the stream

    def redact(self, text: str) -> str:
        for value in self._known:
            text = text.replace(value, MASK)
        for pattern, replacement in _SECRETS:
            text = pattern.sub(replacement, text)
        return text


def configure(*, as_json: bool = False, known_secrets: Iterable[str] = (), level: int = logging.INFO) -> None:
    """Make the process log to standard error; call it once, at the start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(as_json=as_json, known=known_secrets))
    logging.basicConfig(level=level, handlers=[handler], force=True)
