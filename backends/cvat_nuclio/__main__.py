"""`python -m backends.cvat_nuclio [--port 8080]`: the nuclio function over plain HTTP, for trying and testing it."""

from __future__ import annotations

import sys

import flask
import nuclio_sdk

from backends.common.server import Admission, serve
from backends.common.settings import Settings
from backends.cvat_nuclio import main as function
from backends.cvat_nuclio.serve import PLACES, arguments, create_app


def main() -> int:
    options = arguments(__doc__, 8080).parse_args()

    def create(_: Settings) -> flask.Flask:
        context = nuclio_sdk.Context()
        context.user_data.interactor = function.shared_interactor(options.workers)
        admission = Admission(running=PLACES, waiting=0, wait_s=0.0)  # the interactor has lines of its own
        return create_app(function.handler, context, admission=admission)

    return serve(create, options.host, options.port)


if __name__ == "__main__":
    sys.exit(main())
