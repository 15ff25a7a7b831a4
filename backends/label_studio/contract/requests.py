"""The bodies of /predict and /setup, checked as far as every call needs it. What a click says is in context.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from backends.common.http import RequestError
from backends.label_studio.contract.foreign import as_object, as_text

MAX_TASKS = 10_000


@dataclasses.dataclass(frozen=True)
class PredictRequest:
    """The checked frame of a /predict body; the task itself is only looked at as far as it is needed.

    event   what newer pages ask for: predict (also when nothing is said), capabilities, prewarm, release
    wait    whether prewarm is answered when it is done, and not at once
    """

    tasks: tuple[Mapping[str, Any], ...]
    project: str
    label_config: str
    context: tuple[Mapping[str, Any], ...]
    event: str = "predict"
    wait: bool = False


@dataclasses.dataclass(frozen=True)
class Setup:
    """A /setup body."""

    project: str
    label_config: str
    hostname: str
    access_token: str = dataclasses.field(repr=False)


def parse_predict(body: Any) -> PredictRequest:
    """RequestError when the body is not an object with a list of tasks."""
    if not isinstance(body, dict):
        raise RequestError("The body is not a JSON object.")
    tasks = body.get("tasks")
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise RequestError("tasks is not a list of objects.")
    if len(tasks) > MAX_TASKS:
        raise RequestError(f"There are {len(tasks)} tasks; at most {MAX_TASKS} are answered at once.")
    params = as_object(body.get("params"))
    given = as_object(params.get("context", body.get("context")))
    context = given.get("result")
    entries = tuple(entry for entry in context if isinstance(entry, dict)) if isinstance(context, list) else ()
    if entries and len(tasks) != 1:
        raise RequestError(f"Clicks belong to one task; there are {len(tasks)}.")
    return PredictRequest(
        tasks=tuple(tasks),
        project=as_text(body.get("project")),
        label_config=as_text(body.get("label_config")),
        context=entries,
        event=as_text(given.get("event")) or "predict",
        wait=given.get("wait") is True,
    )


def parse_setup(body: Any) -> Setup:
    """RequestError when the body is not an object."""
    if not isinstance(body, dict):
        raise RequestError("The body is not a JSON object.")
    return Setup(
        project=as_text(body.get("project")),
        label_config=as_text(body.get("schema")),
        hostname=as_text(body.get("hostname")),
        access_token=as_text(body.get("access_token")),
    )
