"""`python -m backends.label_studio`: the backend under gunicorn, and commands that look after it (tools.py).

    python -m backends.label_studio [--host 127.0.0.1] [--port 9090]     serve
    python -m backends.label_studio doctor ...                           what is wrong, and how to mend it
    python -m backends.label_studio connect ...                          attach the backend to a project
    python -m backends.label_studio precompute ...                       look at all images of a project ahead of time

The worker takes its first request only after a warm-up click; until then the port does not answer.
"""

from __future__ import annotations

import sys
from typing import Annotated

import flask
import typer

from backends.common.server import serve, warm_segmenter
from backends.common.settings import Settings
from backends.label_studio import tools
from backends.label_studio.app import create_app
from backends.label_studio.service import THREADS

app = typer.Typer(
    name="python -m backends.label_studio",
    help="The Label Studio backend. Without a command: serve.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(tools.doctor)
app.command()(tools.connect)
app.command()(tools.precompute)


def create(settings: Settings) -> flask.Flask:
    """The application with its weights; runs in the worker."""
    return create_app(settings, warm_segmenter(settings))


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 9090,
) -> None:
    if context.invoked_subcommand is None:
        raise typer.Exit(serve(create, host, port, threads=THREADS))


def main(argv: list[str] | None = None) -> int:
    try:
        app(argv)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
