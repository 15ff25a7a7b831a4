"""Plays nuclio's processor over HTTP: events of nuclio_sdk go to a handler, its answers go back. For trying the
function without nuclio and for tests; the handler cannot tell the difference. No rule of CVAT lives here.

Like the processor it limits the size of a body, how many events run at once and how long one waits for its turn.
"""

from __future__ import annotations

import argparse
import base64
import re
import time
from collections.abc import Callable
from typing import Any

import flask
import nuclio_sdk
from nuclio_sdk.event import EventDeserializerKinds
from nuclio_sdk.json_encoder import Encoder
from werkzeug.exceptions import HTTPException

from backends.common.http import BusyError
from backends.common.server import Admission
from backends.cvat_nuclio import contract
from backends.cvat_nuclio.service import Reply, failed, refused

PLACES = 18  # clicks at work or in line in one process; the next one is refused at once (R10)
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def create_app(
    handler: Callable[[Any, Any], Any],
    context: Any,
    *,
    admission: Admission | None = None,
    raw_events: bool = True,
) -> flask.Flask:
    """A WSGI application that hands every request to `handler(context, event)`.

    raw_events   header names, path and method as bytes, which is the SDK's default; False: decoded, as
                 NUCLIO_PYTHON_DECODE_EVENT_STRINGS makes them
    """
    app = flask.Flask(__name__)
    limit_body(app)
    admission = admission or Admission(running=2, waiting=16, wait_s=10.0)
    encode = Encoder().encode

    @app.route("/", defaults={"path": ""}, methods=METHODS)
    @app.route("/<path:path>", methods=METHODS)
    def invoke(path: str) -> flask.Response:
        event = to_event(flask.request, raw=raw_events)
        if flask.request.method in ("GET", "HEAD"):  # liveness does not stand in line
            return to_response(nuclio_sdk.Response.from_entrypoint_output(encode, handler(context, event)))
        try:
            with admission.place(), admission.turn():
                output = handler(context, event)
        except BusyError as busy:
            return to_flask(failed(busy))
        return to_response(nuclio_sdk.Response.from_entrypoint_output(encode, output))

    return app


def limit_body(app: flask.Flask) -> None:
    """Refuse bodies above MAX_BODY_BYTES before they are parsed, and answer every HTTP problem with JSON."""
    # One byte more than the limit: without a Content-Length, werkzeug cuts a body at this length and says nothing.
    app.config["MAX_CONTENT_LENGTH"] = contract.MAX_BODY_BYTES + 1

    @app.before_request
    def measure() -> flask.Response | None:
        size = len(flask.request.get_data())
        return to_flask(failed(contract.TooLargeError.of(size))) if size > contract.MAX_BODY_BYTES else None

    @app.errorhandler(HTTPException)
    def refuse(problem: HTTPException) -> flask.Response:
        if problem.code == 413:
            return to_flask(failed(contract.TooLargeError.of(flask.request.content_length)))
        return to_flask(refused(problem.code or 500, "http", problem.name))


def to_event(request: flask.Request, *, raw: bool) -> Any:
    """The HTTP request as the event that nuclio's Python wrapper would make of it."""
    message: dict[str, Any] = {
        "body": request.get_data(),
        "content_type": request.headers.get("Content-Type", ""),
        "trigger": {"kind": "http", "name": "http"},
        "fields": {},
        "headers": dict(request.headers),
        "id": "",
        "method": request.method,
        "path": request.path,
        "size": request.content_length or 0,
        "timestamp": int(time.time()),
        "url": request.full_path,
        "shard_id": 0,
        "num_shards": 0,
        "type": "",
        "type_version": "",
        "version": "",
    }
    if raw:
        return nuclio_sdk.Event.deserialize(_raw(message), kind=EventDeserializerKinds.msgpack_raw)
    return nuclio_sdk.Event.deserialize(message, kind=EventDeserializerKinds.msgpack)


def to_response(output: dict[str, Any]) -> flask.Response:
    """The SDK's encoded answer as the processor sends it."""
    body = base64.b64decode(output["body"]) if output["body_encoding"] == "base64" else output["body"]
    return flask.Response(body, output["status_code"], output["headers"], content_type=output["content_type"])


def to_flask(reply: Reply) -> flask.Response:
    """A reply of the interactor as it is, with its error in the status line as one line of printable ASCII."""
    phrase = re.sub(r"[^\x20-\x7e]+", " ", reply.error)[:200].strip()
    status = f"{reply.status} {phrase}" if phrase else reply.status
    return flask.Response(reply.body, status, dict(reply.headers), content_type=reply.content_type)


def _raw(value: Any) -> Any:
    """What msgpack gives in raw mode: every text as bytes."""
    if isinstance(value, dict):
        return {_raw(key): _raw(item) for key, item in value.items()}
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def arguments(description: str, port: int) -> argparse.ArgumentParser:
    """The options that local server and gateway share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=port, help=f"port to listen on (default: {port})")
    parser.add_argument("--workers", type=int, default=2, help="clicks computed at once (default: 2)")
    return parser
