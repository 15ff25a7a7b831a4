"""Run pytest on another build of the native module: `python -m tests.native.with_module MODULE.so PYTEST-ARGUMENTS`.

`make sanitize` uses it, so that the environment keeps its installed module.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest


def load(path: str) -> None:
    """Make the file at `path` the module inter2former._native of this process."""
    spec = importlib.util.spec_from_file_location("inter2former._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["inter2former._native"] = module


if __name__ == "__main__":
    load(sys.argv[1])
    raise SystemExit(pytest.main(sys.argv[2:]))
