"""The nuclio function: `init_context` once a worker, `handler` once a click. Translates events and responses of
nuclio_sdk and nothing else; the work is in service.py.

A worker of nuclio is a process: weights and caches of its own, one click at a time. So the function has one worker; or,
with I2F_CVAT_SERVERS, any number of workers that compute nothing and ask the servers, which share what they know.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from werkzeug.http import parse_accept_header

from backends.common.log import configure
from backends.common.server import warm_segmenter
from backends.common.settings import Settings, load_settings
from backends.cvat_nuclio.replicas import Replicas
from backends.cvat_nuclio.server_version import ReadsShapes
from backends.cvat_nuclio.service import Interactor, refused

log = logging.getLogger(__name__)

_lock = threading.Lock()
_interactor: Interactor | Replicas | None = None


def shared_interactor(at_once: int = 2) -> Interactor | Replicas:
    """The one interactor of this process, made from the environment: weights and caches exist once, whoever asks.

    at_once  clicks, of the first to ask
    raises   ConfigError with every wrong setting, CheckpointError
    """
    global _interactor
    with _lock:
        if _interactor is None:
            settings = load_settings()
            configure(as_json=settings.log_json, known_secrets=settings.secrets())
            if settings.basic_auth_user is not None:
                log.warning(
                    "I2F_BASIC_AUTH_USER guards no door of CVAT: CVAT cannot log in. Keep it on an inner network."
                )
            if settings.cvat_servers:
                _interactor = Replicas(settings.cvat_servers)
            else:
                _interactor = create_interactor(settings, at_once)
        return _interactor


def create_interactor(settings: Settings, at_once: int = 2) -> Interactor:
    """An interactor with its own weights and caches, after one click on nothing: the first person waits for no set-up.

    raises  CheckpointError, ConfigError, NumericError
    """
    segmenter = warm_segmenter(settings)
    if settings.cvat_url is None:  # "auto" then is "mask", which every page reads
        return Interactor(segmenter, form=settings.cvat_response, at_once=at_once)
    token = settings.cvat_access_token
    reads_shapes = ReadsShapes(settings.cvat_url, token.get_secret_value() if token else None)
    if settings.cvat_response == "auto":
        reads_shapes.ask()
    return Interactor(segmenter, form=settings.cvat_response, reads_shapes=reads_shapes, at_once=at_once)


def init_context(context: Any) -> None:
    """Loads the weights; nuclio sends no event before this returns. `context.user_data` may hold an interactor."""
    context.user_data.interactor = shared_interactor()


def handler(context: Any, event: Any) -> Any:
    """One event of nuclio_sdk, one `context.Response`. Never raises."""
    interactor: Interactor | Replicas = getattr(context.user_data, "interactor", None) or shared_interactor()
    headers = _texts(getattr(event, "headers", None))
    method, path = _text(getattr(event, "method", "")).upper(), _text(getattr(event, "path", "")).rstrip("/")
    if path == "/metrics":
        reply = interactor.metrics_page()
    elif path == "/health" or method in ("GET", "HEAD"):
        reply = interactor.health()
    elif method not in ("POST", ""):
        reply = refused(405, "method", f"{method} is not answered here; POST a request of CVAT.")
    else:
        reply = interactor.answer(
            event.body,
            accepts_gzip=parse_accept_header(headers.get("accept-encoding", "")).quality("gzip") > 0,
            request_id=headers.get("x-request-id"),
        )
    # bytes travel to nuclio's processor as base64, a third larger; JSON is text
    body: bytes | str = reply.body if "Content-Encoding" in reply.headers else reply.body.decode("ascii")
    return context.Response(
        body=body, headers=dict(reply.headers), content_type=reply.content_type, status_code=reply.status
    )


def _texts(headers: Mapping[Any, Any] | None) -> dict[str, str]:
    """Headers by lower-case name; nuclio hands over str or bytes, depending on its settings."""
    return {_text(key).lower(): _text(value) for key, value in (headers or {}).items()}


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else ""
