"""The stand-in platform and backends of the tiny model that read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
from flask.testing import FlaskClient
from ls_platform import LEGACY, Platform

from backends.common.settings import Settings
from backends.label_studio.app import create_app
from inter2former.segmenter import Segmenter


@pytest.fixture
def platform() -> Iterator[Platform]:
    made = Platform()
    yield made
    made.close()


@pytest.fixture
def make_app(segmenter: Segmenter, platform: Platform) -> Iterator[Callable[..., flask.Flask]]:
    """Makes backends that know the platform; keywords are settings."""
    apps: list[flask.Flask] = []

    def make(**settings: Any) -> flask.Flask:
        known = {"label_studio_url": platform.url, "label_studio_api_key": LEGACY, "fetch_timeout_s": 5.0}
        app = create_app(Settings(**{**known, **settings}), segmenter)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.extensions["inter2former"].close()


@pytest.fixture
def client(make_app: Callable[..., flask.Flask]) -> FlaskClient:
    return make_app().test_client()
