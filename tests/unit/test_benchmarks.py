"""What the benchmark scripts keep, and that the baselines answer every click they may be asked."""

import json

import numpy as np
import pytest

from benchmarks import baselines, click, parts, results, threads
from inter2former import bench
from inter2former.evaluation import Target, evaluate
from inter2former.prompts import Click


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_a_result_says_where_and_when_it_was_made(folder):
    path = results.write_result("some", {"rows": [1, 2]}, threads=3)
    content = json.loads(path.read_text())
    assert path == folder / "some.json"
    assert {"name", "date", "commit", "threads", "machine", "rows"} == set(content)
    assert content["threads"] == 3
    assert {"cpu", "cores", "versions"} <= set(content["machine"])


def test_click_keeps_figures_and_picture(folder, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SESSION_CLICKS", 1)
    monkeypatch.setattr(click, "AREAS", (0.05, 0.2))
    click.main(preset="tiny", runs=1)
    content = json.loads((folder / "click_tiny.json").read_text())
    assert content["weights"] == "random"
    assert {row["area"] for row in content["rows"] if row["what"] == "click"} == {0.05, 0.2}
    assert (folder / "click_tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "median_ms" in capsys.readouterr().out


def scene():
    """A bright square on a dark ground."""
    image = np.full((60, 80, 3), 30, np.uint8)
    image[15:45, 20:60] = (200, 180, 40)
    image += np.random.default_rng(0).integers(0, 8, image.shape, np.uint8)
    truth = np.zeros(image.shape[:2], bool)
    truth[15:45, 20:60] = True
    return image, truth


@pytest.mark.parametrize("method", sorted(baselines.METHODS))
def test_baselines_find_an_easy_object(method):
    pytest.importorskip("skimage")
    image, truth = scene()
    (score,) = evaluate([Target("s", "n", image, truth)], baselines.METHODS[method], clicks=3)
    assert score.ious[2] > 0.85


@pytest.mark.parametrize("method", sorted(baselines.METHODS))
@pytest.mark.parametrize(
    "clicks",
    [
        pytest.param([Click(0.5, 0.5)], id="corner"),
        pytest.param([Click(79.5, 59.5), Click(40, 30, False)], id="other corner"),
        pytest.param([Click(40, 30), Click(40, 30, False)], id="both signs on one pixel"),
        pytest.param([Click(x, 30) for x in range(0, 80, 2)], id="a row"),
    ],
)
def test_baselines_answer_odd_clicks(method, clicks):
    pytest.importorskip("skimage")
    for image in (scene()[0], np.zeros((60, 80, 3), np.uint8)):
        mask = baselines.METHODS[method](image, clicks)
        assert mask.shape == (60, 80)
        assert mask.dtype == np.bool_


def test_later_seeds_win():
    inside, outside = baselines.seeds((50, 50), [Click(25, 25), Click(25, 25, False)], 1.0)
    assert not inside.any()
    assert outside[25, 25]


def test_threads_keeps_figures_and_every_mask_is_the_same(folder):
    threads.main(preset="tiny", size=256, threads=3, clicks=2, rounds=1)
    content = json.loads((folder / "threads_tiny.json").read_text())
    assert content["masks_that_differ"] == 0
    assert content["callers"] == 3


def test_parts_keeps_figures_and_picture(folder, monkeypatch):
    monkeypatch.setattr(parts, "SHARES", (0.1, 0.4))
    parts.main(preset="tiny", size=256, runs=1, threads=1)
    rows = json.loads((folder / "parts_tiny_1.json").read_text())["rows"]
    for part in parts.PARTS:
        assert {row["share"] for row in rows if row["part"] == part} == {0.1, 0.4}
        assert {"ours", "ours_pytorch", "dense"} <= {row["contender"] for row in rows if row["part"] == part}
    edges = {(row["part"], row["share"]): row["edge_tokens"] for row in rows}
    assert edges["attention", 0.4] > 1.5 * edges["attention", 0.1] > edges["upsampling", 0.4]
    assert edges["upsampling", 0.4] == edges["upsampling", 0.1]
    assert (folder / "parts_tiny_1.png").read_bytes().startswith(b"\x89PNG")
