"""How a door runs: weights loaded and warm, one gunicorn process with threads, a bounded line in front of the work.

Platform rules live in the doors. Weights are loaded inside the worker: threads that a parent's numeric library
started would not survive the fork.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import json
import logging
import mmap
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import flask
import numpy as np
from gunicorn import glogging
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker

from backends.common import log as logs
from backends.common.http import BusyError, error_answer
from backends.common.settings import Settings, load_settings
from inter2former.errors import Inter2FormerError
from inter2former.prompts import Click
from inter2former.runtime import compute
from inter2former.runtime.memory import keep_freed_memory
from inter2former.segmenter import Segmenter, load_segmenter

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# Above that of clicks: a quarter of a core that a click wants too, all of an idle one. With ten it is a tenth, and the
# first clicks wait too long on a machine that is busy with other things.
ENCODE_NICENESS = 5
# Requests that wait for a thread of the server. There are always some threads for a full line, so this many are not a
# line but more than Python can turn down one by one, at a millisecond each.
CROWD = 16
CLICKS = (b"POST /predict ", b"POST / ", b"POST /api/function_invocations ")  # what a crowd is refused, of all doors
UNREAD_S = 2.0  # for a request that is refused unread to come in
SWITCH_S = 0.0005  # a thread back from native code waits so long for one in Python, ten times less than by default
START_FAILED = 4  # gunicorn's exit status for an application that cannot be loaded: it does not try again

log = logging.getLogger("backends")


def warm_segmenter(settings: Settings) -> Segmenter:
    """Weights loaded and one click made on nothing, so that the first person waits for no set-up.

    raises  CheckpointError, ConfigError, NumericError
    """
    began = time.perf_counter()
    keep_freed_memory()
    _encode_behind_clicks()
    segmenter = load_segmenter(
        settings.checkpoint,
        model_size=settings.model_size,
        cache_bytes=settings.cache_mb * 2**20,
        max_pixels=settings.max_pixels,
        threads=settings.threads,
        precision=settings.precision,
    )
    segmenter.segment(np.zeros((64, 64, 3), np.uint8), [Click(32, 32)])
    segmenter.clear_cache()
    if settings.cache_dir is not None:
        segmenter.keep_encodings(settings.cache_dir, settings.cache_dir_mb * 2**20)
    # What is here now stays: a full collection would walk all of PyTorch each time, while every click waits.
    gc.collect()
    gc.freeze()
    log.info("ready after %.1f s, model %s", time.perf_counter() - began, segmenter.digest[:12])
    return segmenter


def _encode_behind_clicks() -> None:
    """PyTorch's thread encodes: it and the team that it is going to start let the threads go first that click (R11)."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + ENCODE_NICENESS, 19)
        with contextlib.suppress(OSError):  # a sandbox that forbids it
            compute.run(lambda: os.setpriority(os.PRIO_PROCESS, 0, niceness))


@dataclasses.dataclass(eq=False)
class Ticket:
    """A place in a line, one line at a time. The lowest urgency goes first, and it may be changed while waiting."""

    urgency: int = 0
    _called: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)


class Admission:
    """At most `running` pieces of work at once and `waiting` more in line, each for at most `wait_s` seconds (R10)."""

    def __init__(self, running: int, waiting: int, wait_s: float) -> None:
        self._places = threading.BoundedSemaphore(running + waiting)
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._free = running
        self._line: list[Ticket] = []

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._line)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line, held while fetching too. BusyError at once when the line is full."""
        if not self._places.acquire(blocking=False):
            raise BusyError("Too many clicks are waiting.", "Try again in a moment.")
        try:
            yield
        finally:
            self._places.release()

    @contextmanager
    def turn(self, ticket: Ticket | None = None, *, wait_s: float | None = None) -> Iterator[None]:
        """The right to compute: by urgency, then by arrival. BusyError when no turn came in time (`wait_s`: another
        time than usual).
        """
        ticket = ticket or Ticket()
        wait_s = self._wait_s if wait_s is None else wait_s
        with self._lock:
            ticket._called.clear()  # it may have been used in another line before
            at_once = self._free > 0
            if at_once:
                self._free -= 1
            else:
                self._line.append(ticket)
        if not at_once and not ticket._called.wait(wait_s):
            with self._lock:
                gave_up = ticket in self._line  # else it was called in this very moment
                if gave_up:
                    self._line.remove(ticket)
            if gave_up:
                raise BusyError(f"No turn came within {wait_s:g} seconds.", "Try again in a moment.")
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        with self._lock:
            if not self._line:
                self._free += 1
                return
            ticket = min(self._line, key=lambda waiting: waiting.urgency)  # of equals, the first in line
            self._line.remove(ticket)
            ticket._called.set()


class _Logger(glogging.Logger):  # type: ignore[misc]  # gunicorn has no types
    """Gunicorn's messages go where ours go."""

    def setup(self, cfg: Any) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.INFO)


_stopping = mmap.mmap(-1, 1)  # shared with every process forked from here: 1 once the whole server stops
_connection = threading.local()  # .refused: the request at hand came after the server was told to stop


class _Arbiter(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """Tells its workers whether the server stops, or only they do, to make room for new ones."""

    def stop(self, graceful: bool = True) -> None:
        _stopping[0] = 1
        super().stop(graceful)


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """Answers what it has begun when it is told to stop (R19). Who comes later is told so at once when the server
    stops; when a new worker takes over, the connection is left to that one. Gunicorn's own would let newcomers wait
    until its last answer is sent.

    When more than CROWD requests wait for a thread, clicks are refused without being understood (R10): requests come
    faster than Python can turn them down, and whoever is let in would have waited behind them all.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._unbegun: collections.deque[None] = collections.deque()  # one for each request without a thread

    def set_accept_enabled(self, enabled: bool) -> None:
        if self.alive or not _stopping[0]:
            super().set_accept_enabled(enabled)
        if not self.alive and not _stopping[0]:
            for listener in self.sockets:
                listener.close()

    def enqueue_req(self, conn: Any) -> None:
        conn.refused = not self.alive
        self._unbegun.append(None)
        super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        self._unbegun.pop()
        if len(self._unbegun) > CROWD and not conn.initialized and refuse_unread(conn.sock):
            return False  # gunicorn closes the connection
        _connection.refused = conn.refused
        return super().handle(conn)


def refuse_unread(connection: socket.socket) -> bool:
    """Take a click off a new connection and answer that the server is busy, without parsing it. False, and nothing
    taken, when something else is asked or the head is not there yet."""
    try:
        connection.settimeout(UNREAD_S)
        head, end, _ = connection.recv(1 << 14, socket.MSG_PEEK).partition(b"\r\n\r\n")
    except OSError:
        return False
    # Bodies of 100 MB and more are no clicks.
    length = re.search(rb"\r\ncontent-length: *([0-9]{1,8})(?=\r\n|$)", head, re.IGNORECASE)
    if not (head.startswith(CLICKS) and end and length) or b"100-continue" in head:
        return False
    left = len(head) + len(end) + int(length[1])  # all of it: a connection closed before loses the answer
    end_s = time.monotonic() + UNREAD_S
    with contextlib.suppress(OSError):  # gone, or too slow
        while left > 0 and time.monotonic() < end_s and (part := connection.recv(min(left, 1 << 18))):
            left -= len(part)
        connection.sendall(_busy())
    return True


@functools.cache
def _busy() -> bytes:
    _, fields = error_answer(BusyError("Too many clicks are waiting.", "Try again in a moment."))
    body = json.dumps(fields)
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Retry-After: 1",
        "Connection: close",
    )
    return "\r\n".join((*head, "", body)).encode()


def _refuse_when_stopping(app: WSGIApplication) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not getattr(_connection, "refused", False):
            return app(environ, start_response)
        while environ["wsgi.input"].read(1 << 16):  # a connection closed before the body was read loses the answer
            pass
        status, fields = error_answer(BusyError("The server is stopping.", "Try again in a moment."))
        body = json.dumps(fields).encode()
        length = ("Content-Length", str(len(body)))
        start_response(f"{status} Stopping", [("Content-Type", "application/json"), ("Retry-After", "1"), length])
        return [body]

    return answer


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """One process with threads, so that everybody shares one cache; reads neither arguments nor gunicorn's variables.

    create   makes the application, inside of the worker; one of our errors stops the server with that sentence and
             exit status START_FAILED
    threads  more than Admission lets in, so that health is answered and a full line is refused at any time
    """

    def __init__(self, create: Callable[[], flask.Flask], host: str, port: int, *, threads: int = 32) -> None:
        self._create = create
        self._options: dict[str, Any] = {
            "bind": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            "worker_class": f"{__name__}.{Worker.__name__}",
            "workers": 1,
            "threads": threads,
            "timeout": 120,
            "graceful_timeout": 30,  # after SIGTERM: the clicks in work are answered first (R19)
            "keepalive": 5,
            "logger_class": _Logger,
            "accesslog": None,
            "preload_app": False,
            "proc_name": "inter2former",
            # The worker's heartbeat is a file: in memory, so that no disk has to be writable (R21).
            "worker_tmp_dir": "/dev/shm" if os.access("/dev/shm", os.W_OK) else None,
            "control_socket_disable": True,  # newer versions open one in the home folder
        }
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options.items():
            if name in self.cfg.settings:  # older gunicorns have no control socket
                self.cfg.set(name, value)

    def run(self) -> None:
        _Arbiter(self).run()

    def load(self) -> WSGIApplication:
        try:
            return _refuse_when_stopping(self._create())
        except Inter2FormerError as error:
            log.critical("cannot start: %s", error)
            sys.exit(START_FAILED)


def serve(create: Callable[[Settings], flask.Flask], host: str, port: int, *, threads: int = 32) -> int:
    """Settings, logging, server; returns an exit status. Wrong settings are all named and stop the start (R17)."""
    try:
        settings = load_settings()
    except Inter2FormerError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(as_json=settings.log_json, known_secrets=settings.secrets())
    sys.setswitchinterval(SWITCH_S)
    Server(lambda: create(settings), host, port, threads=threads).run()
    return 0
