"""How an error becomes an HTTP answer, for both doors: one table from error codes to statuses, one JSON shape.
It knows no web framework, so that Flask and nuclio can both use it.

    {"error": code, "detail": one sentence}

What is wrong with a request is a 4xx. When the place that an image comes from fails, that is not the caller's
fault: 502, or 504 when it was too slow. Anything unexpected is a 500 that says nothing more; the log has the rest.
"""

from __future__ import annotations

import logging
from typing import TypedDict

from inter2former.errors import Inter2FormerError

log = logging.getLogger(__name__)


class ErrorBody(TypedDict):
    error: str
    detail: str


class RequestError(Inter2FormerError, ValueError):
    """The request is not JSON, or a part of it that is needed is missing or of the wrong type."""

    code = "request"


class UrlError(Inter2FormerError, ValueError):
    """An image address that is malformed, of an unknown kind, or that the policy refuses."""

    code = "url"


class FetchError(Inter2FormerError):
    """The image could not be had from where it is: refused, missing, broken off, too large."""

    code = "fetch"


class FetchTimeoutError(FetchError):
    """The image did not come in time."""

    code = "fetch_timeout"


class BusyError(Inter2FormerError):
    """No place in the queue; trying again later may work."""

    code = "busy"


STATUS = {
    "request": 400,
    "prompt": 400,
    "image": 400,
    "url": 400,
    "too_large": 413,
    "busy": 503,
    "fetch": 502,
    "fetch_timeout": 504,
    "checkpoint": 500,
    "config": 500,
    "numeric": 500,
    "internal": 500,
}


def error_body(code: str, detail: str) -> ErrorBody:
    return {"error": code, "detail": detail}


def error_answer(error: Exception) -> tuple[int, ErrorBody]:
    """(status, body) for any exception. An unknown one is logged with its traceback, which the caller never sees."""
    if isinstance(error, Inter2FormerError) and error.code in STATUS:
        status = STATUS[error.code]
        log.log(logging.ERROR if status == 500 else logging.WARNING, "%d %s: %s", status, error.code, error)
        return status, error_body(error.code, str(error))
    log.error("unexpected error", exc_info=error)
    return 500, error_body("internal", "The server failed on this request; its log says why.")
