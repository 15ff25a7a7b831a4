"""The error table, and a log that shows no secrets (R39)."""

from __future__ import annotations

import json
import logging

import pytest

from backends.common import http, log
from inter2former import errors


def everything_that_can_be_raised() -> list[type[errors.Inter2FormerError]]:
    found: list[type[errors.Inter2FormerError]] = []
    queue = [errors.Inter2FormerError]
    while queue:
        subclasses = queue.pop().__subclasses__()
        queue += subclasses
        found += subclasses
    return [kind for kind in found if kind.__module__.startswith(("inter2former", "backends.common"))]


def test_every_error_has_a_status() -> None:
    assert {kind.code for kind in everything_that_can_be_raised()} <= set(http.STATUS)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.PromptError("x"), 400),
        (errors.ImageError("x"), 400),
        (http.UrlError("x"), 400),
        (http.FetchError("x"), 502),
        (http.FetchTimeoutError("x"), 504),
        (http.BusyError("x"), 503),
        (errors.NumericError("x"), 500),
    ],
)
def test_known_errors(error: errors.Inter2FormerError, status: int) -> None:
    assert http.error_answer(error) == (status, {"error": error.code, "detail": "x"})


def test_unknown_errors_say_nothing_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    status, body = http.error_answer(ZeroDivisionError("canary"))
    assert status == 500
    assert "canary" not in json.dumps(body)
    assert "ZeroDivisionError" in caplog.text


SECRETS = [
    "GET https://user:canary@host/x",
    "Authorization: Token canary-canary",
    "{'Authorization': 'Bearer canary.canary'}",
    "basic Y2FuYXJ5OmNhbmFyeQ==canary",
    "https://s3.example.org/a.png?X-Amz-Signature=canary&x=1",
    "GET /a.png?d=canary HTTP/1.1",
    '{"access_token": "canary", "refresh": "canary"}',
    "password=canary&api_key=canary",
    "got eyJhbGciOi.canary.canary here",
    "the configured value canary-known",
]


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize("as_json", [True, False])
def test_r39_the_log_masks(text: str, as_json: bool) -> None:
    formatter = log.Formatter(as_json=as_json, known=["canary-known"])
    try:
        raise ValueError(text)
    except ValueError as error:
        problem = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("name", logging.INFO, __file__, 1, "%s", (text,), problem)
    line = formatter.format(record)
    assert "canary" not in line.replace(__file__, "").replace('"https://user:canary@host/x"', "")
    assert log.MASK in line


def test_lines_are_lines() -> None:
    record = logging.LogRecord("name", logging.INFO, "f", 1, "one\ntwo \ud800", (), None)
    assert "\n" not in log.Formatter().format(record)
    log.Formatter().format(record).encode()
    assert json.loads(log.Formatter(as_json=True).format(record))["message"].startswith("one\ntwo")


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3", True), ("x" * 65, False), ("a b", False), ("", False)])
def test_request_ids(given: str, kept: bool) -> None:
    assert (log.new_request_id(given) == given) == kept
