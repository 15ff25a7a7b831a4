"""`python -m backends.label_studio [--host 127.0.0.1] [--port 9090]`: the backend under gunicorn.

The worker takes its first request only after a warm-up click; until then the port does not answer.
"""

from __future__ import annotations

import argparse
import sys

import flask

from backends.common.server import serve, warm_segmenter
from backends.common.settings import Settings
from backends.label_studio.app import create_app


def create(settings: Settings) -> flask.Flask:
    """The application with its weights; runs in the worker."""
    return create_app(settings, warm_segmenter(settings))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m backends.label_studio", description="The Label Studio backend.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network")
    parser.add_argument("--port", type=int, default=9090)
    options = parser.parse_args(argv)
    return serve(create, options.host, options.port)


if __name__ == "__main__":
    sys.exit(main())
