"""R26: whatever arrives around a recorded request, the answer is no 5xx and no traceback. R27: odd prompts."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ls_platform import FIXTURES, recorded

from inter2former.segmenter import Segmenter

NAMES = sorted(path.name[:2] for path in FIXTURES.glob("*.json"))
# Every value may become any of these. Addresses are left out: an image that is not there is a 502, and rightly so.
ODD: list[Any] = [
    None, True, False,
    0, -1, 1, 7, 101, 2**31, 2**63, 10**30, -0.0, 0.5, 1e308, float("nan"), float("inf"), "", "x", "\0",
    "\ud800", "é" * 50, "0", "nan", [], {}, [[]], [{}], [None], {"x": 1}, ["Cat"], [1, 2, 3], [255] * 40, {"": ""},
]  # fmt: skip
KEEP = {"image", "url"}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside, but for addresses and the bytes of masks (which are many and alike)."""
    found: list[tuple[Any, ...]] = []
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:4]))
    for key, inner in items:
        if key in KEEP:
            continue
        found.append((*path, key))
        found += places(inner, (*path, key))
    return found


def damaged(body: Any, choose: random.Random) -> Any:
    """A copy with one to three values dropped, retyped, repeated or grown."""
    body = json.loads(json.dumps(body))
    for _ in range(choose.randint(1, 3)):
        every = places(body)
        if not every:
            break
        # Deep places are many: take the depth first, so that the frame of the request is hit as well.
        depth = choose.choice(sorted({len(path) for path in every}))
        *way, last = choose.choice([path for path in every if len(path) == depth])
        parent = body
        for key in way:
            parent = parent[key]
        action = choose.choice(["drop", "retype", "retype", "retype", "repeat", "grow"])
        value = parent[last]
        if action == "drop":
            del parent[last]
        elif action == "repeat" and isinstance(parent, list):
            parent.extend([value] * 3)
        elif action == "grow" and isinstance(value, str):
            parent[last] = value * 3 + "\u202e"
        elif action == "grow" and isinstance(value, int | float):
            parent[last] = value * 1e6
        elif action == "grow" and isinstance(value, list):
            parent[last] = value * 20
        else:
            parent[last] = copy.deepcopy(choose.choice(ODD))
    return body


def check(client: FlaskClient, method: str, path: str, data: bytes) -> None:
    response = client.open(path, method=method, data=data, content_type="application/json")
    assert response.status_code < 500, (response.status_code, response.text[:500], data[:2000])
    assert "Traceback" not in response.text
    answer = json.loads(response.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    if response.status_code >= 400:
        assert set(answer) == {"error", "detail"}
    elif path == "/predict":
        assert isinstance(answer["results"], list)


@given(st.sampled_from(NAMES), st.integers(0, 2**32))
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_r26_damaged_requests(client: FlaskClient, name: str, seed: int) -> None:
    call = recorded(name)["backend_request"]
    body = damaged(call["body"], random.Random(seed))
    check(client, call["method"], call["path"], json.dumps(body).encode("utf-8", "surrogatepass"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
ENTRY_KEYS = [
    "id",
    "type",
    "value",
    "is_positive",
    "to_name",
    "from_name",
    "original_width",
    "original_height",
    "item_index",
]


@given(st.lists(st.dictionaries(st.sampled_from(ENTRY_KEYS), JSON, max_size=9) | JSON, max_size=5), JSON)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_r26_any_context(client: FlaskClient, context: Any, config: Any) -> None:
    body = recorded("06")["backend_request"]["body"]
    body["params"]["context"]["result"] = context
    if not isinstance(config, str):
        body["label_config"] = config
    check(client, "POST", "/predict", json.dumps(body).encode())


RAW = [
    b'{"tasks": [], "tasks": {}}',
    b'{"tasks": NaN}',
    b'{"tasks": [{"id": -Infinity}], "params": {"context": {"result": [NaN]}}}',
    b'{"tasks": ' + b"9" * 5000 + b"}",
    b'{"tasks": "\\ud800"}',
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    b"\xef\xbb\xbf{}",
    b"{} {}",
    b"\x00",
]


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
@pytest.mark.parametrize("path", ["/predict", "/setup", "/webhook", "/job_status"])
def test_r26_raw_bodies(client: FlaskClient, path: str, data: bytes) -> None:
    check(client, "POST", path, data)


# What each odd prompt gives: "click" as if it were in its place, "nothing" an empty result, "region" some mask.
PROMPTS: list[tuple[str, dict[str, Any], str]] = [
    ("exactly 100 percent", {"x": 100, "y": 100}, "region"),
    ("minus zero", {"x": -0.0, "y": 50}, "region"),
    ("slightly outside", {"x": 103, "y": -3}, "region"),
    ("far outside", {"x": 200, "y": 50}, "nothing"),
    ("NaN", {"x": float("nan"), "y": 50}, "nothing"),
    ("infinite", {"x": float("-inf"), "y": 50}, "nothing"),
    ("zero-area box", {"x": 10, "y": 10, "width": 0, "height": 20}, "nothing"),
    ("box without width", {"x": 10, "y": 10, "height": 20}, "nothing"),
    ("box around everything", {"x": -50, "y": -50, "width": 300, "height": 300}, "region"),
    ("box turned around", {"x": 60, "y": 60, "width": -30, "height": -30}, "region"),
    ("box outside", {"x": 100, "y": 0, "width": 30, "height": 30}, "nothing"),
    ("rotated box", {"x": 50, "y": 50, "width": 20, "height": 20, "rotation": 45}, "region"),
    ("box rotated by nonsense", {"x": 50, "y": 50, "width": 20, "height": 20, "rotation": 1e300}, "region"),
    ("huge box", {"x": 0, "y": 0, "width": 1e308, "height": 1e308, "rotation": 30}, "nothing"),
]


@pytest.mark.parametrize(("value", "expected"), [row[1:] for row in PROMPTS], ids=[row[0] for row in PROMPTS])
def test_r27_odd_prompts(client: FlaskClient, segmenter: Segmenter, value: dict[str, Any], expected: str) -> None:
    body = recorded("06")["backend_request"]["body"]
    (entry,) = body["params"]["context"]["result"]
    entry["value"] = {**value, "keypointlabels": ["Cat"]}
    response = client.post("/predict", data=json.dumps(body))
    assert response.status_code == 200
    (result,) = response.json["results"]
    if expected == "nothing":
        assert result["result"] == []
        assert segmenter.encodes == 0
    else:
        assert len(result["result"]) == 1
