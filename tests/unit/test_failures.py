"""Pictures of failures: which objects are chosen, what is written."""

import json

import cv2
import numpy as np
from train_pack import write_pack

from benchmarks import failures
from benchmarks.failures import Failure
from inter2former.evaluation import Target


def failure(source, name, iou):
    mask = np.zeros((30, 50), bool)
    mask[5:20, 10:30] = True
    return Failure(Target(source, name, np.zeros((30, 50, 3), np.uint8), mask), (), mask, iou, 0.5)


def test_the_lowest_ious_but_not_all_of_one_source():
    found = [failure("a", "1", 0.1), failure("a", "2", 0.2), failure("a", "3", 0.3), failure("b", "4", 0.9)]
    assert [f.target.name for f in failures.worst(found, 3, 2)] == ["1", "2", "4"]
    assert [f.target.name for f in failures.worst(found, 2, 9)] == ["1", "2"]
    kept = []
    for one in found:  # keeping only candidates on the way chooses the same
        kept = failures.worst([*kept, one], 3, 2)
    assert kept == failures.worst(found, 3, 2)


def test_pictures_of_any_shape_fit_on_a_sheet():
    tall = failure("a", "1", 0.1)._replace(
        target=Target("a", "1", np.zeros((90, 20, 3), np.uint8), np.eye(90, 20, dtype=bool)),
        mask=np.zeros((90, 20), bool),
    )
    page = failures.sheet([failures.picture(f) for f in (tall, failure("b", "2", 0.2), failure("b", "3", 0.2))])
    assert page.dtype == np.uint8
    assert page.shape[2] == 3


def test_the_command_writes_pictures_and_a_list(tmp_path, tiny_checkpoint, capsys):
    pack = write_pack(tmp_path / "pack", photos=2)
    failures.main(pack, tmp_path / "out", tiny_checkpoint, limit=2, n=3, clicks=2, size=256)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["01.png", "02.png", "03.png", "failures.jpg", "failures.json"]
    content = json.loads((tmp_path / "out" / "failures.json").read_text())
    ious = [row["iou"] for row in content["rows"]]
    assert ious == sorted(ious)
    assert cv2.imread(str(tmp_path / "out" / "01.png")).shape[1] == 2 * failures.SIDE + 4
    assert "worst objects" in capsys.readouterr().out
