"""doctor, connect and precompute against a stand-in of Label Studio; the real one is in tests/e2e."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from ls_calls import CONFIG
from ls_platform import PAT, jwt

from backends.label_studio import contract
from backends.label_studio.tools import (
    BackendServer,
    LabelStudio,
    ToolError,
    attach,
    diagnose,
    fix_for,
    precompute_project,
    recommended_config,
)

GOOD = recommended_config(CONFIG)
BACKEND = "http://127.0.0.1:9090"


class Servers:
    """What both servers answer, by method and path; everything that was asked."""

    def __init__(self, **changes: Any) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.metrics = ["inter2former_cache_evictions_total 0.0"]
        self.answers: dict[str, Any] = {
            "GET /api/version": {"release": "1.23.2"},
            "GET /api/current-user/whoami": {"email": "a@example.com"},
            "POST /api/token/refresh/": {"access": jwt(exp=1)},
            "GET /health": {"model_version": "inter2former-x"},
            "GET /api/projects/3": {"label_config": GOOD, "created_at": "2026-11-23T00:00:00.5Z", "task_number": 20},
            "GET /api/ml": [{"id": 5, "url": BACKEND + "/", "is_interactive": True, "state": "CO"}],
            "GET /api/tasks": {"tasks": [{"id": n, "data": {"image": f"/{n}.png"}} for n in range(20)]},
            "POST /api/ml/5/interactive-annotating": {"data": {"result": [{"type": "brushlabels"}]}},
            "PATCH /api/ml/5": {"id": 5},
            "POST /api/ml": {"id": 6, "model_version": "m"},
            "POST /predict": {"results": [{}]},
            **changes,
        }

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        self.asked.append((request.method, request.url.path, body))
        if request.url.path == "/metrics":
            return httpx.Response(200, text=self.metrics[0] if len(self.metrics) == 1 else self.metrics.pop(0))
        answer = self.answers[f"{request.method} {request.url.path}"]
        answer = answer.pop(0) if isinstance(answer, list) and request.url.path == "/predict" else answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    def pair(self, token: str = PAT) -> tuple[LabelStudio, BackendServer]:
        transport = httpx.MockTransport(self)
        return LabelStudio("http://ls.test", token, transport=transport), BackendServer(BACKEND, transport=transport)

    def faults(self) -> list[str]:
        return [f"{one.text} -> {one.fix}" for one in diagnose(*self.pair(), 3) if one.good is False]


def test_nothing_is_wrong() -> None:
    assert Servers().faults() == []


@pytest.mark.parametrize(
    ("path", "told", "fix"),
    [
        ("GET /api/current-user/whoami", httpx.Response(401, json={"detail": "no"}), "LABEL_STUDIO_API_KEY"),
        ("POST /api/token/refresh/", httpx.Response(401), "Make a new one"),
        ("GET /health", httpx.Response(401), "--user"),
        ("GET /api/version", httpx.Response(200, text="<html>"), "address of Label Studio"),
        ("GET /api/ml", [], "connect"),
        ("GET /api/ml", [{"id": 5, "url": BACKEND, "state": "CO", "is_interactive": False}], "connect"),
        (
            "GET /api/ml",
            [{"id": 5, "url": BACKEND, "state": "ER", "error_message": "Connection refused", "is_interactive": True}],
            "does not reach the backend",
        ),
        (
            "GET /api/ml",
            [
                {"id": 4, "url": "http://other", "is_interactive": True},
                {"id": 5, "url": BACKEND, "state": "CO", "is_interactive": True},
            ],
            "Remove that one",
        ),
        ("GET /api/projects/3", {"label_config": CONFIG}, "--set-config"),
        ("GET /api/projects/3", {"label_config": "<View/>"}, "--set-config"),
        (
            "POST /api/ml/5/interactive-annotating",
            {"errors": ["Task 1: http://x answered HTTP 401. Legacy tokens are switched off"]},
            "LABEL_STUDIO_API_KEY",
        ),
        ("POST /api/ml/5/interactive-annotating", {"data": {"result": []}}, "log"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(path: str, told: Any, fix: str) -> None:
    faults = Servers(**{path: told}).faults()
    assert faults
    assert any(fix in fault for fault in faults)
    assert PAT not in "".join(faults)


@pytest.mark.parametrize("server", [0, 1])
def test_a_server_that_is_not_there(server: int) -> None:
    def dead(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    servers = list(Servers().pair())
    servers[server] = (LabelStudio, BackendServer)[server]("http://dead.test", "x", transport=httpx.MockTransport(dead))
    faults = [one for one in diagnose(servers[0], servers[1], 3) if one.good is False]
    assert len(faults) == 1
    assert faults[0].fix


def test_connect_attaches_once() -> None:
    servers = Servers()
    assert "already" in attach(servers.pair()[0], BACKEND, 3)
    assert servers.asked[-1][0] == "PATCH"
    servers = Servers(**{"GET /api/ml": []})
    assert "attached" in attach(servers.pair()[0], BACKEND + "/", 3, "u", "p")
    sent = servers.asked[-1][2]
    assert (sent["url"], sent["is_interactive"], sent["auth_method"]) == (BACKEND, True, "BASIC_AUTH")
    blocked = httpx.Response(403, json={"detail": "URL resolves to a reserved network address (block: 127.0.0.0/8)"})
    with pytest.raises(ToolError) as refused:
        attach(Servers(**{"GET /api/ml": [], "POST /api/ml": blocked}).pair()[0], BACKEND, 3)
    assert "ML_BLOCK_LOCAL_IP" in refused.value.fix


def test_precompute_asks_for_every_task_and_says_what_failed() -> None:
    servers = Servers()
    result = precompute_project(*servers.pair(), 3)
    assert (result.done, result.failed, result.total, result.full) == (20, 0, 20, False)
    asked = [body for _, path, body in servers.asked if path == "/predict"]
    assert asked[0]["project"] == "3.1795392000"
    assert asked[0]["params"] == {"context": {"event": "prewarm", "wait": True}}
    servers = Servers(**{"POST /predict": httpx.Response(502, json={"detail": "Task 1: gone"})})
    said: list[str] = []
    result = precompute_project(*servers.pair(), 3, limit=3, say=lambda _, trouble: said.append(trouble))
    assert (result.done, result.failed) == (0, 3)
    assert said == ["Task 1: gone"] * 3


def test_precompute_asks_until_all_pages_of_a_task_are_known() -> None:
    def said(*pending: int) -> httpx.Response:
        value = {"status": "ok", "cached": [], "pending": pending}
        return httpx.Response(200, json={"results": [{"result": [{"type": "prewarm_ack", "value": value}]}]})

    for answers in ([said(0, 1, 2), said(2), said()], [said(1, 2), said(1, 2)]):  # there is no room for more than that
        result = precompute_project(*Servers(**{"POST /predict": answers}).pair(), 3, limit=1)
        assert (result.done, result.failed, answers) == (1, 0, [])


@pytest.mark.parametrize(("budget", "place"), [(0, "cache"), (2e9, "folder")])
def test_precompute_ends_when_what_keeps_the_encodings_is_full(budget: float, place: str) -> None:
    """The folder, where there is one; that memory makes room all the time ends nothing then."""
    servers = Servers()
    other = "folder" if place == "cache" else "cache"

    def metrics(evicted: int, elsewhere: int) -> str:
        return (
            f"inter2former_folder_budget_bytes {budget}\n"
            f"inter2former_{place}_evictions_total {evicted}\ninter2former_{other}_evictions_total {elsewhere}\n"
        )

    servers.metrics = [metrics(0, 0), metrics(0, 1), metrics(0, 2), metrics(2, 3)]
    result = precompute_project(*servers.pair(), 3)
    assert (result.done, result.full) == (16, True)


def test_the_recommended_config_keeps_labels_and_image() -> None:
    config = contract.parse_config(recommended_config('<View><Image name="p&quot;ic" value="$url"/></View>', ("a<b",)))
    assert config.warnings() == ()
    assert config.images == {'p"ic': "$url"}
    assert {control.labels for control in config.controls} == {("a<b",)}
    assert contract.parse_config(GOOD).controls[0].labels == ("Cat", "Cup")
    paged = contract.parse_config(recommended_config('<View><Image name="doc" valueList="$pages"/></View>'))
    assert paged.lists == {"doc": "$pages"}
    assert fix_for("no idea") == ""
