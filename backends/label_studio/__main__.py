"""`python -m backends.label_studio [--host 127.0.0.1] [--port 9090]`: the backend under gunicorn, one process with
threads. Starting and stopping live here, answers do not.

Weights are loaded in the worker process: threads that a parent's numeric library started would not survive the fork.
The worker takes its first request only after a warm-up click; until then the port does not answer.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from typing import Any

import flask
import numpy as np
from gunicorn import glogging
from gunicorn.app.base import BaseApplication

from backends.common import log as logs
from backends.common.settings import Settings, load_settings
from backends.label_studio.app import create_app
from inter2former.errors import Inter2FormerError
from inter2former.prompts import Click
from inter2former.segmenter import load_segmenter

THREADS = 32  # more than the clicks that Backend lets in, so that /health is answered at any time
START_FAILED = 4  # gunicorn's exit status for an application that cannot be loaded: it does not try again

log = logging.getLogger("backends.label_studio")


def make_app(settings: Settings) -> flask.Flask:
    """The application with weights loaded and one click made. Raises CheckpointError, ConfigError."""
    began = time.perf_counter()
    segmenter = load_segmenter(
        settings.checkpoint,
        model_size=settings.model_size,
        cache_bytes=settings.cache_mb * 2**20,
        max_pixels=settings.max_pixels,
        threads=settings.threads,
    )
    segmenter.segment(np.zeros((64, 64, 3), np.uint8), [Click(32, 32)])
    segmenter.clear_cache()
    app = create_app(settings, segmenter)
    log.info("ready after %.1f s, model %s", time.perf_counter() - began, segmenter.digest[:12])
    return app


class _Logger(glogging.Logger):  # type: ignore[misc]
    """Gunicorn's messages go where ours go."""

    def setup(self, cfg: Any) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.INFO)


class Server(BaseApplication):  # type: ignore[misc]
    """Gunicorn with our settings; it reads neither the command line nor its own environment variables."""

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        self._settings = settings
        self._bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        super().__init__()

    def load_config(self) -> None:
        options: dict[str, Any] = {
            "bind": self._bind,
            "worker_class": "gthread",
            "workers": 1,
            "threads": THREADS,
            "timeout": 120,
            "graceful_timeout": 30,  # after SIGTERM: the clicks in work are answered first
            "keepalive": 5,
            "logger_class": _Logger,
            "accesslog": None,
            "preload_app": False,
            "proc_name": "inter2former",
            # The worker's heartbeat is a file: in memory, so that no disk has to be writable.
            "worker_tmp_dir": "/dev/shm" if os.access("/dev/shm", os.W_OK) else None,
            "control_socket_disable": True,  # newer versions open one in the home folder
        }
        for name, value in options.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> flask.Flask:
        try:
            return make_app(self._settings)
        except Inter2FormerError as error:
            log.critical("cannot start: %s", error)
            sys.exit(START_FAILED)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m backends.label_studio", description="The Label Studio backend.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network")
    parser.add_argument("--port", type=int, default=9090)
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings()
    except Inter2FormerError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(as_json=settings.log_json, known_secrets=settings.secrets())
    Server(settings, arguments.host, arguments.port).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
