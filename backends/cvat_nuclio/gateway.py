"""Plays the nuclio dashboard for a CVAT server, with our interactor inside: no nuclio, no Docker socket, no build.

    CVAT_SERVERLESS=1, CVAT_NUCLIO_HOST=<this host> on CVAT's server, and
    python -m backends.cvat_nuclio.gateway --host 0.0.0.0 --port 8070 [--upstream http://nuclio:8070]

With --replica ADDRESS, given once for each, other servers compute (python -m backends.cvat_nuclio) and the gateway
sends each image to the same one; it then loads no weights itself.

CVAT uses three routes of the dashboard; these are answered here for our function and passed on to the upstream
dashboard, where there is one, for all others. CVAT shows its users nothing of an error but the status line, so the
sentence that explains goes into the reason phrase. CVAT does not log in: bind to an inner network.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import sys
from typing import Any

import flask
import httpx
import yaml

from backends.common.http import BusyError, RequestError
from backends.common.server import Admission, serve
from backends.common.settings import Settings, http_address
from backends.cvat_nuclio import contract
from backends.cvat_nuclio.main import shared_interactor
from backends.cvat_nuclio.replicas import Replicas
from backends.cvat_nuclio.serve import PLACES, arguments, limit_body, to_flask
from backends.cvat_nuclio.service import Interactor, Reply, failed, refused

FUNCTION_FILE = pathlib.Path(__file__).with_name("function.yaml")
UPSTREAM_TIMEOUT_S = 110.0  # CVAT itself gives up after 120
NOT_PASSED_ON = {"host", "connection", "content-length", "transfer-encoding", "keep-alive"}

log = logging.getLogger(__name__)


def function_entry(port: int) -> dict[str, Any]:
    """Our function as the dashboard lists it; CVAT's models page fails when a key is missing. From function.yaml."""
    config = yaml.safe_load(FUNCTION_FILE.read_text(encoding="utf-8"))
    metadata, spec = config["metadata"], config["spec"]
    return {
        "metadata": {
            "name": metadata["name"],
            "namespace": "nuclio",
            "labels": {"nuclio.io/project-name": "cvat"},
            "annotations": metadata["annotations"],
        },
        "spec": {key: spec[key] for key in ("description", "handler", "runtime")},
        "status": {"state": "ready", "httpPort": port},
    }


class Upstream:
    """A real nuclio dashboard behind the gateway, for the functions that are not ours."""

    def __init__(self, url: str, *, timeout_s: float = UPSTREAM_TIMEOUT_S) -> None:
        self._client = httpx.Client(base_url=url, timeout=httpx.Timeout(timeout_s, connect=3.0), trust_env=False)

    def functions(self) -> dict[str, Any]:
        """Its functions by name, without those that CVAT stumbles over, such as half deployed ones: its models page
        would be an error as a whole. None, and a line in the log, when it does not answer: ours must stay usable."""
        try:
            response = self._client.get("/api/functions", headers=_passed_on())
            listing = response.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as problem:
            log.warning("the upstream dashboard gave no list of functions: %s", type(problem).__name__)
            return {}
        if not isinstance(listing, dict):
            return {}
        whole = {}
        for name, entry in listing.items():
            try:
                contract.annotations_of(entry)
                whole[name] = entry
            except RequestError as wrong:
                log.warning("CVAT cannot read the function %s of the upstream dashboard: %s", name[:60], wrong)
        return whole

    def forward(self) -> flask.Response:
        """The current request, answered by the upstream dashboard."""
        request = flask.request
        try:
            with self._client.stream(
                request.method, request.full_path.rstrip("?"), content=request.get_data(), headers=_passed_on()
            ) as answer:
                body = b"".join(answer.iter_raw())  # as it is, gzipped or not
        except httpx.TimeoutException:
            return to_flask(refused(504, "upstream", "The upstream nuclio dashboard did not answer in time."))
        except httpx.HTTPError:
            return to_flask(refused(503, "upstream", "The upstream nuclio dashboard cannot be reached."))
        headers = {key: value for key, value in answer.headers.items() if key.lower() not in NOT_PASSED_ON}
        return flask.Response(body, f"{answer.status_code} {answer.reason_phrase}", headers)


def create_app(
    interactor: Interactor | Replicas,
    *,
    port: int = 8070,
    upstream: Upstream | None = None,
    admission: Admission | None = None,
) -> flask.Flask:
    """A WSGI application with the dashboard's routes, and `POST /` for CVAT's invoke method "direct".

    interactor   who answers the clicks: this process, or others
    """
    app = flask.Flask(__name__)
    limit_body(app)
    admission = admission or Admission(running=2, waiting=16, wait_s=10.0)
    entry = function_entry(port)
    name: str = entry["metadata"]["name"]

    @app.get("/api/functions")
    def functions() -> dict[str, Any]:
        others = upstream.functions() if upstream else {}
        return {**others, name: entry}

    @app.get("/api/functions/<wanted>")
    def function(wanted: str) -> flask.Response:
        if wanted == name:
            return flask.jsonify(entry)
        return upstream.forward() if upstream else to_flask(_unknown(wanted))

    @app.post("/api/function_invocations")
    def invoke() -> flask.Response:
        wanted = flask.request.headers.get("x-nuclio-function-name", "")
        if wanted == name:
            return click()
        return upstream.forward() if upstream else to_flask(_unknown(wanted))

    @app.post("/")
    def click() -> flask.Response:
        body = flask.request.get_data()
        try:
            with admission.place(), admission.turn():
                reply = interactor.answer(
                    body,
                    accepts_gzip=flask.request.accept_encodings.quality("gzip") > 0,
                    request_id=flask.request.headers.get("X-Request-Id"),
                )
        except BusyError as busy:
            reply = failed(busy)
        return to_flask(reply)

    @app.get("/")
    @app.get("/health")
    def health() -> flask.Response:
        return to_flask(interactor.health())

    @app.get("/metrics")
    def metrics() -> flask.Response:
        return to_flask(interactor.metrics_page())

    return app


def _unknown(name: str) -> Reply:
    return refused(404, "function", f"Function not found: {name[:60]!r}.")


def _passed_on() -> dict[str, str]:
    headers = {key: value for key, value in flask.request.headers.items() if key.lower() not in NOT_PASSED_ON}
    headers.setdefault("Accept-Encoding", "identity")  # else the client would ask for gzip on its own account
    return headers


def _address(text: str) -> str:
    try:
        return http_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as http://one:8080") from None


def main() -> int:
    parser = arguments("A gateway that plays the nuclio dashboard for a CVAT server.", 8070)
    parser.add_argument("--upstream", type=_address, help="address of a real nuclio dashboard for all other functions")
    parser.add_argument(
        "--replica", type=_address, action="append", default=[], metavar="ADDRESS",
        help="a server that computes; may be repeated",
    )  # fmt: skip
    options = parser.parse_args()

    def create(_: Settings) -> flask.Flask:
        upstream = Upstream(options.upstream) if options.upstream else None
        # Who answers has lines of its own; here only some threads are kept free for health and the list of functions.
        places = 24 if options.replica else PLACES
        return create_app(
            Replicas(options.replica) if options.replica else shared_interactor(options.workers),
            port=options.port,
            upstream=upstream,
            admission=Admission(running=places, waiting=0, wait_s=0.0),
        )

    return serve(create, options.host, options.port)


if __name__ == "__main__":
    sys.exit(main())
