"""Spreads clicks over several servers of ours: one image always goes to the same one, so that it is encoded once.

A mask is a function of the request alone, so any replica may answer; the choice only saves work. Rendezvous hashing:
every gateway and every restart choose alike, and a replica that goes away hands over its own images, not the others'.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from backends.common.http import BusyError
from backends.common.log import new_request_id
from backends.common.metrics import CONTENT_TYPE, Metrics
from backends.cvat_nuclio import contract
from backends.cvat_nuclio.service import Reply, failed, refused

ANSWER_S = 110.0  # CVAT itself gives up after 120
CONNECT_S = 2.0
AWAY_S = 5.0  # so long a replica that gave no connection is asked last
PASSED_BACK = ("Content-Encoding", "X-Image-Key", "Server-Timing", "X-Request-Id", "Retry-After")

log = logging.getLogger(__name__)


class Replicas:
    """Answers clicks like an Interactor, by asking others. Thread-safe.

    addresses   of servers that answer POST /, such as http://inter2former-1:8080
    """

    def __init__(self, addresses: Sequence[str], *, answer_s: float = ANSWER_S, away_s: float = AWAY_S) -> None:
        self.addresses = tuple(dict.fromkeys(address.rstrip("/") for address in addresses))
        self.metrics = Metrics("cvat_gateway")
        self._client = httpx.Client(
            timeout=httpx.Timeout(answer_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # no proxy sees images, and none stands between machines of one network
        )
        self._away_s = away_s
        self._away: dict[str, float] = {}  # address: when to try it again
        self._lock = threading.Lock()

    def order(self, digest: str) -> list[str]:
        """Every address, the one that owns this image first and those that were just away last."""
        now = time.monotonic()
        with self._lock:
            away = {address for address, until in self._away.items() if until > now}
        return sorted(self.addresses, key=lambda address: (address not in away, _weight(digest, address)), reverse=True)

    def answer(self, body: object, *, accepts_gzip: bool = False, request_id: str | None = None) -> Reply:
        """The answer of the first replica that can be reached. Never raises."""
        try:
            request = contract.parse(body)
            data = body if isinstance(body, bytes) else contract.body_of(request)
            with self.metrics.queue.track_inprogress():
                reply = self._ask(request.image_digest, data, accepts_gzip, new_request_id(request_id))
        except Exception as error:
            reply = failed(error)
        self.metrics.request("click", reply.status)
        return reply

    def _ask(self, digest: str, body: bytes, accepts_gzip: bool, request_id: str) -> Reply:
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "gzip" if accepts_gzip else "identity",
            "X-Request-Id": request_id,
        }
        for address in self.order(digest):
            try:
                with self._client.stream("POST", address + "/", content=body, headers=headers) as answer:
                    data = b"".join(answer.iter_raw())
            except httpx.TimeoutException as problem:
                if isinstance(problem, httpx.ConnectTimeout):
                    self._is_away(address)
                    continue
                return refused(504, "replica", "The server of Inter2Former did not answer in time.")
            except httpx.TransportError:  # never connected, or gone in the middle: another one gives the same mask
                self._is_away(address)
                continue
            passed = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers}
            return Reply(
                answer.status_code, data, passed, answer.headers.get("Content-Type", "application/json"),
                error=_sentence(data) if answer.status_code >= 400 else "",
            )  # fmt: skip
        raise BusyError("No server of Inter2Former can be reached.", "Are they running?")

    def _is_away(self, address: str) -> None:
        log.warning("replica %s gave no answer; another one is asked", address)
        with self._lock:
            self._away[address] = time.monotonic() + self._away_s

    def health(self) -> Reply:
        """Up as long as one replica is."""
        with ThreadPoolExecutor(max(1, len(self.addresses))) as pool:  # some may take CONNECT_S to be found away
            states = dict(zip(self.addresses, pool.map(self._state, self.addresses), strict=True))
        up = "UP" in states.values()
        return Reply(
            200 if up else 503, contract.dump({"status": "UP" if up else "DOWN", "replicas": states}),
            error="" if up else "No server of Inter2Former can be reached.",
        )  # fmt: skip

    def _state(self, address: str) -> str:
        try:
            return "UP" if self._client.get(address + "/health", timeout=CONNECT_S).status_code == 200 else "DOWN"
        except httpx.HTTPError:
            return "DOWN"

    def metrics_page(self) -> Reply:
        return Reply(200, self.metrics.text(), content_type=CONTENT_TYPE)


def _weight(digest: str, address: str) -> bytes:
    return hashlib.sha256(f"{digest} {address}".encode()).digest()


def _sentence(data: bytes) -> str:
    """The sentence in a JSON error body."""
    try:
        return str(json.loads(data)["detail"])
    except (ValueError, KeyError, TypeError):
        return ""
