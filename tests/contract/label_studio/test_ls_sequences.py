"""Whole sessions as the page makes them, drawn by chance: clicks, Alt, undo, moves, other labels, pages and images,
accepted masks in drafts, reloads. Several annotators at once get what a fresh server gives each call alone.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flask
import pytest
from flask.testing import FlaskClient
from ls_calls import click, rectangle

from inter2former import brush_rle

CONTROLS = """<KeyPointLabels name="kp_{0}" toName="{0}"><Label value="Cat"/><Label value="Cup"/></KeyPointLabels>
<RectangleLabels name="rect_{0}" toName="{0}"><Label value="Cat"/><Label value="Cup"/></RectangleLabels>
<BrushLabels name="brush_{0}" toName="{0}"><Label value="Cup"/><Label value="Cat"/></BrushLabels>"""
CONFIG = f"""<View><Image name="one" value="$one"/><Image name="many" valueList="$many"/>
{CONTROLS.format("one")}{CONTROLS.format("many")}</View>"""
SIZES = {"chelsea": (451, 300), "coffee": (600, 400), "chelsea_exif6": (300, 451)}
PLACES = [("one", None, "chelsea"), ("many", 0, "coffee"), ("many", 1, "chelsea_exif6")]  # tag, page, photo
DATA = {
    "one": "/data/upload/1/a-chelsea.jpg",
    "many": ["/data/upload/1/b-coffee.jpg", "/data/upload/1/c-chelsea_exif6.jpg"],
}


class Page:
    """One annotator's page of one task: what is pending, what was accepted, and the calls that follow."""

    def __init__(self, seed: int, task: int) -> None:
        self._chance = random.Random(seed)
        self._name, self._count, self._task = f"u{seed}", 0, task
        self._pending: list[dict[str, Any]] = []
        self._accepted: list[dict[str, Any]] = []
        self._reloaded = False

    def calls(self, count: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(body of a call, what is meant: the same with every sign said)."""
        while count:
            place = tag, page, photo = self._chance.choice(PLACES)
            label, boxes = self._chance.choice(["Cat", "Cup"]), self._chance.random() < 0.2
            self._pending = []
            for _ in range(min(count, self._chance.randint(1, 5))):
                self._act(place, label, boxes)
                yield self._call()
                count -= 1
            if self._chance.random() < 0.6:
                self._accepted.append(self._as_region(tag, page, photo, label))

    def _act(self, place: tuple[str, int | None, str], label: str, boxes: bool) -> None:
        what = self._chance.random()
        if len(self._pending) > 1 and what < 0.15:  # undo, which sends nothing by itself: a click follows
            self._pending.pop(self._chance.randrange(len(self._pending)))
        elif self._pending and what < 0.3:
            moved = self._chance.choice(self._pending)
            moved["value"]["x"] = self._percent()
            return
        self._reloaded = self._reloaded or (len(self._pending) > 1 and what > 0.9)
        tag, page, photo = place
        kind = "rect" if boxes else "kp"
        self._count += 1
        more = {
            "id": f"{self._name}-{self._count}",
            "from_name": f"{kind}_{tag}",
            "to_name": tag,
            "original_width": SIZES[photo][0],
            "original_height": SIZES[photo][1],
            **({} if page is None else {"item_index": page}),
        }
        if boxes:
            entry = rectangle(self._percent(), self._percent(), 30, 25, self._chance.choice([0, 0, 20]), **more)
        else:
            positive = not self._pending or self._chance.random() < 0.6
            entry = click(self._percent(), self._percent(), positive, **more)
        entry["value"][entry["type"]] = entry["value"]["labels"] = [label]
        self._pending.append(entry)

    def _percent(self) -> float:
        return (
            self._chance.choice([0, 100, -0.3, 100.4]) if self._chance.random() < 0.1 else self._chance.uniform(0, 100)
        )

    def _call(self) -> tuple[dict[str, Any], dict[str, Any]]:
        drafts = [{"result": [*self._accepted, *self._pending], "updated_at": "2026-01-01"}]
        meant = {
            "tasks": [{"id": self._task, "data": DATA, "drafts": copy.deepcopy(drafts), "annotations": []}],
            "project": "1.2",
            "label_config": CONFIG,
            "params": {"login": None, "context": {"result": copy.deepcopy(self._pending)}},
        }
        sent = copy.deepcopy(meant)
        if self._reloaded:  # all signs but the newest are lost, first in the context, then in the draft as well
            for entries in (sent["params"]["context"]["result"], sent["tasks"][0]["drafts"][0]["result"]):
                for entry in entries[:-1]:
                    entry.pop("is_positive", None)
            if self._chance.random() < 0.5:
                sent["tasks"][0]["drafts"] = copy.deepcopy(drafts)
        return sent, meant

    def _as_region(self, tag: str, page: int | None, photo: str, label: str) -> dict[str, Any]:
        self._count += 1
        place = {} if page is None else {"item_index": page}
        value = {"format": "rle", "rle": [0, 1, 2], "brushlabels": [label]}  # nobody has to read it
        width, height = SIZES[photo]
        return {
            "id": f"m{self._count}",
            "type": "brushlabels",
            "from_name": f"brush_{tag}",
            "to_name": tag,
            "value": value,
            "original_width": width,
            "original_height": height,
            **place,
        }


def said(client: FlaskClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The regions without what is different each time."""
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.json
    (prediction,) = response.json["results"]
    return [{key: value for key, value in region.items() if key != "id"} for region in prediction["result"]]


def check(meant: dict[str, Any], regions: list[dict[str, Any]]) -> None:
    """What holds of every answer, whatever the model finds."""
    entries = meant["params"]["context"]["result"]
    last = entries[-1]
    width, height = last["original_width"], last["original_height"]
    for region in regions:
        assert region["type"] == "brushlabels"
        assert (region["from_name"], region["to_name"]) == (f"brush_{last['to_name']}", last["to_name"])
        assert region["value"]["brushlabels"] == last["value"]["labels"]
        assert region.get("item_index") == last.get("item_index")
        assert (region["original_width"], region["original_height"]) == (width, height)
    if last["type"] == "rectanglelabels":
        return
    signs: dict[tuple[int, int], bool] = {}
    for entry in entries:
        x, y = (min(max(entry["value"][axis], 0.0), 100.0) for axis in "xy")
        signs[min(int(y * height / 100), height - 1), min(int(x * width / 100), width - 1)] = entry["is_positive"]
    if regions:
        mask = brush_rle.decode(regions[0]["value"]["rle"], height, width)
        assert all(mask[pixel] == positive for pixel, positive in signs.items())
    else:
        assert not any(entry["is_positive"] for entry in entries)


@pytest.mark.parametrize("seed", range(2))
def test_sessions_at_once_are_what_each_call_is_alone(make_app: Callable[..., flask.Flask], seed: int) -> None:
    # Two annotators of each task.
    sessions = [list(Page(10 * seed + user, task=user % 2).calls(10)) for user in range(4)]
    alone = make_app(ahead_tasks=0)
    wanted: dict[str, list[dict[str, Any]]] = {}
    for sent, meant in (call for session in sessions for call in session):
        key = json.dumps(sent)
        wanted[key] = said(alone.test_client(), meant)
        check(meant, wanted[key])
        alone.extensions["inter2former"].segmenter.clear_cache()

    shared = make_app(ahead_tasks=0)
    before = shared.extensions["inter2former"].segmenter.encodes

    def annotate(session: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        client = shared.test_client()
        for sent, _ in session:
            assert said(client, sent) == wanted[json.dumps(sent)]

    with ThreadPoolExecutor(len(sessions)) as pool:
        for done in [pool.submit(annotate, session) for session in sessions]:
            done.result(120)
    assert shared.extensions["inter2former"].segmenter.encodes - before <= len(PLACES)
