"""model.py under label-studio-ml 1.0.9, in an environment of its own: its pins (Flask 1.1) are not ours."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_studio_real import LABELING_CONFIG, ROOT, click

from inter2former import brush_rle
from inter2former.prompts import Click
from inter2former.segmenter import load_segmenter

ENVIRONMENT = ROOT / ".venv-ls-ml"
REQUIREMENTS = ("label-studio-ml==1.0.9", "redis", "rq")  # it does not say that it needs the last two
PHOTO = ROOT / "tests" / "fixtures" / "label_studio" / "images" / "chelsea.jpg"
SIZE = (451, 300)

_PROGRAM = """
import json, sys
from label_studio_ml.api import init_app
from backends.label_studio.model import Inter2FormerModel

client = init_app(model_class=Inter2FormerModel, model_dir=sys.argv[1]).test_client()
for call in json.load(sys.stdin):
    answer = client.open(call["path"], method=call["method"], json=call["body"])
    print("ANSWER", json.dumps({"status": answer.status_code, "body": answer.get_json()}))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The library's interpreter: its own packages first, then ours."""
    program, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if not (stamp.is_file() and stamp.read_text() == str(REQUIREMENTS)):
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        (ENVIRONMENT / ".gitignore").write_text("*\n")
        pip = [str(program), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
        subprocess.run(["nice", *pip], check=True, timeout=3600)
        (own,) = ENVIRONMENT.glob("lib/python*/site-packages")
        (own / "ours.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
        stamp.write_text(str(REQUIREMENTS))
    return program


def test_the_class_serves_clicks_under_the_library(python: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    image = "data:image/jpeg;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
    task = {"id": 1, "project": 1, "data": {"image": image}}
    context = [click(45, 45, SIZE), click(10, 10, SIZE, False)]

    def predict(context: Any, tasks: int = 1) -> dict[str, Any]:
        told = {"tasks": [task] * tasks, "project": "1.2", "label_config": LABELING_CONFIG}
        return {"method": "POST", "path": "/predict", "body": told | {"params": {"context": context}}}

    setup = {"project": "1.2", "schema": LABELING_CONFIG, "hostname": "http://127.0.0.1:1", "access_token": "x"}
    calls = [
        {"method": "GET", "path": "/health", "body": None},
        {"method": "POST", "path": "/setup", "body": setup},
        predict({"result": context}),
        predict(None, tasks=3),
    ]
    settings = {"I2F_CHECKPOINT": str(tiny_checkpoint), "I2F_MODEL_SIZE": "256", "I2F_THREADS": "1"}
    done = subprocess.run(
        [str(python), "-c", _PROGRAM, str(tmp_path)],
        input=json.dumps(calls),
        env={name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")} | settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert [answer["status"] for answer in answers] == [200] * 4, done.stderr[-3000:]
    (result,) = answers[2]["body"]["results"]
    (region,) = result["result"]
    assert (region["type"], region["value"]["brushlabels"]) == ("brushlabels", ["Cat"])
    expected = load_segmenter(tiny_checkpoint, model_size=256, threads=1).segment(
        PHOTO.read_bytes(), [Click(0.45 * 451, 0.45 * 300), Click(45.1, 30, False)]
    )
    mask = brush_rle.decode(region["value"]["rle"], 300, 451)
    assert (mask == expected.mask).mean() > 0.999  # the library's environment may lack the native module
    assert np.array_equal(mask[[135, 30], [202, 45]], [True, False])
    assert [one["result"] for one in answers[3]["body"]["results"]] == [[]] * 3
