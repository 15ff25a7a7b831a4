"""The measurements of the CVAT door run and judge rightly; their figures are no test's business."""

import json

from typer.testing import CliRunner

from benchmarks import cvat, results
from inter2former.prompts import Click


def test_overhead_keeps_figures_and_compares_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setitem(cvat.LIMITS, "overhead_ms", 1e9)
    small = ["overhead", "--objects", "1", "--width", "160", "--height", "120", "--write"]
    done = CliRunner().invoke(cvat.app, small)
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "cvat_overhead.json").read_text())
    assert [row["wrong"] for row in kept["rows"]] == [0, 0, 0]
    assert all(0 < row["gzip_kb_max"] <= row["kb_max"] for row in kept["rows"])
    monkeypatch.setitem(cvat.LIMITS, "overhead_ms", -1e9)
    assert CliRunner().invoke(cvat.app, small).exit_code == 1


def test_clicks_are_put_in_the_order_of_a_request():
    mixed = [Click(1, 1), Click(2, 2, False), Click(3, 3)]
    assert cvat.in_order(mixed) == [Click(1, 1), Click(3, 3), Click(2, 2, False)]
    assert cvat.payload("", mixed)["pos_points"] == [[1, 1], [3, 3]]
