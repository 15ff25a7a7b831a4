"""Builders of calls as the labeling page makes them, and readers of the answers. No tests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from flask.testing import FlaskClient
from ls_platform import mask_of

from backends.label_studio.service import Backend

CONFIG = """<View><Image name="image" value="$image"/>
<KeyPointLabels name="kp" toName="image"><Label value="Cat"/><Label value="Cup"/></KeyPointLabels>
<RectangleLabels name="rect" toName="image"><Label value="Cat"/></RectangleLabels>
<BrushLabels name="brush" toName="image"><Label value="Cat"/><Label value="Cup"/></BrushLabels></View>"""


def click(x: float, y: float, positive: bool | None = True, **more: Any) -> dict[str, Any]:
    entry = {
        "original_width": 451,
        "original_height": 300,
        "value": {"x": x, "y": y, "width": 0.2, "keypointlabels": ["Cat"], "labels": ["Cat"]},
        "id": f"{x}/{y}",
        "from_name": "kp",
        "to_name": "image",
        "type": "keypointlabels",
    }
    return {**entry, **({} if positive is None else {"is_positive": positive}), **more}


def rectangle(x: float, y: float, width: float, height: float, rotation: float = 0, **more: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation, "rectanglelabels": ["Cat"]}
    return {
        "original_width": 451,
        "original_height": 300,
        "value": value,
        "id": f"r{x}/{y}/{width}",
        "from_name": "rect",
        "to_name": "image",
        "type": "rectanglelabels",
        **more,
    }


def body(*entries: dict[str, Any], config: str = CONFIG, image: Any = "/data/upload/1/a-chelsea.jpg") -> dict[str, Any]:
    data = image if isinstance(image, dict) else {"image": image}
    return {
        "tasks": [{"id": 7, "data": data}],
        "project": "1.2",
        "label_config": config,
        "params": {"context": {"result": list(entries)}},
    }


def answer(client: FlaskClient, request: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post("/predict", json=request)
    assert response.status_code == 200, response.json
    (result,) = response.json["results"]
    return result["result"]


def one_mask(client: FlaskClient, request: dict[str, Any]) -> np.ndarray:
    (region,) = answer(client, request)
    return mask_of(region)


@contextlib.contextmanager
def busy(backend: Backend) -> Iterator[None]:
    """All turns to compute are taken: clicks wait."""
    with contextlib.ExitStack() as turns:
        while backend._admission._free:
            turns.enter_context(backend._admission.turn())
        yield


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
