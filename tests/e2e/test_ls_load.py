"""Many annotators at one server: 200 clicks, 10 tasks, 4 users, every mask the one of the same clicks made alone."""

from __future__ import annotations

import json

import pytest
from label_studio_real import ROOT

from benchmarks.server import measure


@pytest.mark.soak
def test_annotators_at_once_get_what_each_would_get_alone(weights: dict[str, str]) -> None:
    figures = measure(4, **weights)
    (ROOT / "out").mkdir(exist_ok=True)
    (ROOT / "out" / "load.json").write_text(json.dumps(figures, indent=1))
    assert figures["clicks"] == 200
    assert figures["errors"] == 0, figures["first_error"]
    assert figures["wrong"] == 0
    assert figures["encodes"] == figures["images"] == 10
