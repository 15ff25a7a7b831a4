"""Native tests need the module: without it they fail, because make venv always builds it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inter2former import _native


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Each test starts and ends with one native thread."""
    _native.set_threads(1)
    yield
    _native.set_threads(1)
