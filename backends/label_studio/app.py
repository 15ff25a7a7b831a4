"""The HTTP face of the Label Studio backend: routes, passwords, limits, errors, the log line. What the calls mean is in
contract, what they do in service.py.

/health and /setup wait for nothing: Label Studio gives them one and three seconds, on every opening of a page.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from typing import Any

import flask
from werkzeug.exceptions import HTTPException

from backends.common.http import RequestError, error_answer, error_body
from backends.common.log import new_request_id, request_id
from backends.common.metrics import CONTENT_TYPE, Metrics
from backends.common.settings import Settings
from backends.label_studio.service import DOOR, Backend
from backends.label_studio.trace import Trace
from inter2former.segmenter import Segmenter

MAX_BODY_BYTES = 32 * 2**20  # drafts and annotations come along with every click, their masks included
_CODES = {401: "unauthorized", 404: "not_found", 405: "method", 413: "too_large"}

log = logging.getLogger(__name__)


def create_app(settings: Settings, segmenter: Segmenter, *, backend: Backend | None = None) -> flask.Flask:
    """A WSGI application. It holds no state of its own: `backend` does, by default a new one."""
    app = flask.Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.json.ensure_ascii = True  # type: ignore[attr-defined]  # lone surrogates cannot be sent as UTF-8
    service = backend or Backend(segmenter, settings, metrics=Metrics(DOOR, segmenter))
    app.extensions["inter2former"] = service

    @app.before_request
    def begin() -> flask.Response | None:
        flask.g.began = time.perf_counter()
        flask.g.trace = Trace()
        flask.g.id_token = request_id.set(new_request_id(flask.request.headers.get("X-Request-Id")))
        flask.g.proven = _has_password(settings)
        # Liveness asks without a password. A wrong one is refused even there, because Label Studio tries /health first
        # when a backend is added, and its administrator should hear of a typing error at once.
        alive = flask.request.path == "/health" and "Authorization" not in flask.request.headers
        if settings.basic_auth_user is not None and not flask.g.proven and not alive:
            answer = _error(401, "unauthorized", "User name and password of this backend are needed.")
            answer.headers["WWW-Authenticate"] = 'Basic realm="inter2former", charset="UTF-8"'
            return answer
        return None

    @app.after_request
    def finish(response: flask.Response) -> flask.Response:
        trace: Trace = flask.g.get("trace", None) or Trace()
        total = time.perf_counter() - flask.g.get("began", time.perf_counter())
        response.headers["X-Request-Id"] = request_id.get()
        if trace.image_key:
            response.headers["X-Image-Key"] = trace.image_key
        spent = [f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in trace.seconds.items()]
        response.headers["Server-Timing"] = ", ".join([*spent, f"total;dur={1000 * total:.1f}"])
        endpoint = flask.request.endpoint or "other"
        service.metrics.request(endpoint, response.status_code)
        log.log(
            logging.DEBUG if endpoint in ("health", "metrics") else logging.INFO,
            "%s %s %d in %.0f ms%s%s%s",
            flask.request.method, endpoint, response.status_code, 1000 * total,
            f", image {trace.image_key}" if trace.image_key else "",
            f", {trace.note}" if trace.note else "",
            "".join(f", {stage} {1000 * seconds:.0f}" for stage, seconds in trace.seconds.items()),
        )  # fmt: skip
        return response

    @app.teardown_request
    def forget(_: BaseException | None) -> None:
        token = flask.g.pop("id_token", None)
        if token is not None:
            request_id.reset(token)

    @app.get("/health")
    @app.get("/")
    def health() -> Any:
        return {"status": "UP", "model_class": "Inter2Former", "model_version": service.model_version}

    @app.post("/setup")
    def setup() -> Any:
        body = _json()
        # Behind a proxy, or sent by a page in somebody's browser, the address is not that of the platform.
        own = flask.request.is_json and not any(
            name in flask.request.headers for name in ("X-Forwarded-For", "Forwarded", "X-Real-Ip", "Origin")
        )
        peer = flask.request.remote_addr or ""
        proven = settings.basic_auth_user is not None and flask.g.proven
        return service.setup(body, peer=peer if own else "", proven=proven)

    @app.post("/predict")
    def predict() -> Any:
        return service.predict(_json(), flask.g.trace)

    @app.post("/webhook")
    def webhook() -> Any:
        # Training is a command of its own (`python -m train finetune`); no event starts it or makes anybody wait.
        action = _object(_json()).get("action")
        known = isinstance(action, str) and action == "START_TRAINING"
        if known:
            log.info("START_TRAINING: this version is trained from the command line, with `python -m train finetune`")
        return {"status": "ok"}, 201 if known else 200

    @app.get("/versions")
    @app.post("/versions")
    def versions() -> Any:
        return {"versions": [service.model_version]}

    @app.post("/job_status")
    def job_status() -> Any:
        if not isinstance(_object(_json()).get("job"), str):
            raise RequestError("job is not a string.")
        return _error(410, "gone", "This backend runs no such job.")

    @app.get("/metrics")
    def metrics() -> Any:
        return flask.Response(service.metrics.text(), content_type=CONTENT_TYPE)

    @app.errorhandler(HTTPException)
    def refused(problem: HTTPException) -> flask.Response:
        status = problem.code or 500
        return _error(status, _CODES.get(status, "request"), problem.description or problem.name)

    @app.errorhandler(Exception)
    def failed(problem: Exception) -> flask.Response:
        status, body = error_answer(problem)
        answer = _error(status, body["error"], body["detail"])
        if status == 503:
            answer.headers["Retry-After"] = "1"
        return answer

    def _error(status: int, code: str, detail: str) -> flask.Response:
        service.metrics.error(code)
        answer = flask.jsonify(error_body(code, detail))
        answer.status_code = status
        return answer

    return app


def _json() -> Any:
    """The body as JSON, whatever its content type says. RequestError when it is not."""
    body = flask.request.get_data(cache=False)
    if flask.request.content_length is None:
        flask.request.stream.read(1)  # a body without a length is cut off at the limit; this read makes it a 413
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("The body is not JSON.") from None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _has_password(settings: Settings) -> bool:
    """Whether the request carries the configured user and password, compared in constant time."""
    if settings.basic_auth_user is None or settings.basic_auth_pass is None:
        return True
    given = flask.request.authorization
    if given is None or given.type != "basic":
        return False
    user = _same(given.username or "", settings.basic_auth_user)
    password = _same(given.password or "", settings.basic_auth_pass.get_secret_value())
    return user and password


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode("utf-8", "surrogatepass"))
