"""A real Label Studio and our backend as processes of their own, and a small client for the platform's REST interface.

Nothing here is a test. Whatever is started ends with its `with` block. Logs stay in the folders that the caller gives.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import numpy as np
import numpy.typing as npt
from prometheus_client.parser import text_string_to_metric_families

from inter2former import brush_rle

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-e2e"  # Label Studio's own: its pins are not ours
REQUIREMENT = "label-studio==1.23.2"
# The one that the guide recommends: its first.
LABELING_CONFIG = (ROOT / "docs" / "label_studio.md").read_text("utf-8").split("```xml\n")[1].split("```")[0]
USER, PASSWORD = "annotator@example.com", "end-to-end-1"
# Generous: the first start makes a database, and other work may be running on the machine.
START_S, CALL_S, STOP_S = 900.0, 180.0, 60.0

Mask = npt.NDArray[np.bool_]
Entry = dict[str, Any]
_OURS = ("I2F_", "LABEL_STUDIO_", "LOCAL_FILES_", "CVAT_", "NUCLIO_")


# ---------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------


def install_label_studio() -> Path:
    """The `label-studio` program, installed once; later runs find it."""
    program, stamp = ENVIRONMENT / "bin" / "label-studio", ENVIRONMENT / "installed"
    if not (program.is_file() and stamp.is_file() and stamp.read_text() == REQUIREMENT):
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        (ENVIRONMENT / ".gitignore").write_text("*\n")
        python = str(ENVIRONMENT / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", REQUIREMENT]
        subprocess.run(["nice", *pip], check=True, timeout=3600)
        stamp.write_text(REQUIREMENT)
    return program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path, health: str, end_with: Sequence[int] = (0,)
) -> Iterator[None]:
    """Start a program and wait until `health` answers 200; at the end SIGTERM, on which it exits with `end_with`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        end = time.monotonic() + START_S
        while not _answers(health):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}:\n{tail(log)}"
            assert time.monotonic() < end, f"{command[0]} did not answer:\n{tail(log)}"
            time.sleep(0.5)
        yield
        assert process.poll() is None, f"{command[0]} ended with {process.returncode} by itself:\n{tail(log)}"
        process.terminate()
        status = process.wait(STOP_S)
        assert status in end_with, f"{command[0]} ended with {status}:\n{tail(log)}"
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-lines:])


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}


@contextmanager
def label_studio(folder: Path) -> Iterator[str]:
    """A fresh Label Studio with one user; its address.

    Making the database is most of a first start, so a copy of the fresh one is kept for the next time.
    """
    program, port = install_label_studio(), free_port()  # on a port that is taken it would move to another, silently
    address = f"http://127.0.0.1:{port}"
    environment = _plain_environment() | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_HOST": address,  # what tasks refer to, and the hostname that backends are told
        "LABEL_STUDIO_USERNAME": USER,
        "LABEL_STUDIO_PASSWORD": PASSWORD,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        # Both refuse private addresses unless told otherwise, and the backend is on this machine.
        "ML_BLOCK_LOCAL_IP": "false",
        "SSRF_PROTECTION_ENABLED": "false",
        # It calls nobody.
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }
    options = ["--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    account = ["--username", USER, "--password", PASSWORD, "--enable-legacy-api-token"]
    command = [str(program), "start", *options, *account]
    database, fresh = folder / "label_studio.sqlite3", ENVIRONMENT / "fresh.sqlite3"
    if fresh.is_file():
        shutil.copyfile(fresh, database)
    with running(command, environment, folder / "log.txt", f"{address}/health", end_with=(0, -signal.SIGTERM)):
        if not fresh.is_file():
            _copy_database(database, fresh)
        yield address


def _copy_database(source: Path, target: Path) -> None:
    """Whole, though Label Studio has it open."""
    part = target.with_suffix(".part")
    with closing(sqlite3.connect(source)) as opened, closing(sqlite3.connect(part)) as copy:
        opened.backup(copy)
    part.replace(target)


@contextmanager
def backend(log: Path, *, port: int | None = None, **settings: str) -> Iterator[str]:
    """Our server as people start it, with these settings in its environment; its address. SIGTERM ends it with 0."""
    port = port or free_port()
    command = [sys.executable, "-m", "backends.label_studio", "--port", str(port)]
    with running(command, _plain_environment() | settings, log, f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}"


def metric(address: str, name: str) -> float:
    """The sum of a metric's samples on the backend's /metrics."""
    page = httpx.get(f"{address}/metrics", timeout=CALL_S, trust_env=False).raise_for_status().text
    values = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    ]
    assert values, f"{name} is not on /metrics"
    return sum(values)


# ---------------------------------------------------------------------------------------------------------------
# The platform
# ---------------------------------------------------------------------------------------------------------------


class Client:
    """A logged-in session: what the page itself would send, so no kind of token is needed."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._http = httpx.Client(base_url=address, timeout=CALL_S, trust_env=False)
        self._http.get("/user/login/").raise_for_status()
        form = {"email": USER, "password": PASSWORD, "csrfmiddlewaretoken": self._http.cookies["csrftoken"]}
        answer = self._http.post("/user/login/", data=form, headers={"Referer": f"{address}/user/login/"})
        assert answer.is_redirect, "the login was refused"
        self._http.headers.update({"X-CSRFToken": self._http.cookies["csrftoken"], "Referer": address})

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """JSON of the answer (bytes when it is none); AssertionError when it is not 2xx."""
        answer = self._http.request(method, path, **arguments)
        assert answer.is_success, f"{method} {path}: HTTP {answer.status_code} {answer.text[:500]}"
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.content

    def allow_legacy_tokens(self, allowed: bool) -> None:
        body = {"api_tokens_enabled": True, "legacy_api_tokens_enabled": allowed}
        self.call("POST", "/api/jwt/settings", json=body)

    def personal_access_token(self) -> str:
        """A new one. A user has one at a time: older ones are revoked."""
        for old in self.call("GET", "/api/token/"):
            self.call("POST", "/api/token/blacklist/", json={"refresh": old["token"]})
        return str(self.call("POST", "/api/token/", json={})["token"])

    def project(self, photos: Sequence[Photo], backend_address: str, **form: str) -> Project:
        """A project with the recommended config, a task for each photo, the backend attached; `form` as on its form."""
        title = f"end to end {uuid.uuid4().hex[:8]}"
        project = self.call("POST", "/api/projects", json={"title": title, "label_config": LABELING_CONFIG})
        for photo in photos:
            files = {photo.path.name: (photo.path.name, photo.path.read_bytes())}
            self.call("POST", f"/api/projects/{project['id']}/import", files=files)
        tasks = self.tasks(project["id"])
        body = {"project": project["id"], "url": backend_address, "title": "inter2former", "is_interactive": True}
        ml = self.call("POST", "/api/ml", json=body | form)
        return Project(self, project["id"], ml["id"], ml["model_version"], sorted(task["id"] for task in tasks))

    def drafts(self, task: int) -> list[Entry]:
        return list(self.call("GET", f"/api/tasks/{task}/drafts"))

    def export(self, project: int) -> list[Entry]:
        return list(self.call("GET", f"/api/projects/{project}/export?exportType=JSON"))

    def tasks(self, project: int) -> list[Entry]:
        return list(self.call("GET", f"/api/tasks?project={project}&page_size=100&fields=all")["tasks"])


class Project:
    """A project with a backend: its numbers, and clicks."""

    def __init__(self, client: Client, project: int, ml: int, model_version: str, tasks: list[int]) -> None:
        self.client, self.id, self.ml, self.model_version, self.tasks = client, project, ml, model_version, tasks

    def ask(self, task: int, context: Sequence[Entry]) -> dict[str, Any]:
        """Platform's whole answer to what the page sends after a click; HTTP 200 even when the backend fails."""
        body = {"task": task, "context": {"result": list(context)}}
        answer = self.client.call("POST", f"/api/ml/{self.ml}/interactive-annotating", json=body)
        assert isinstance(answer, dict)
        return answer

    def regions(self, task: int, context: Sequence[Entry]) -> list[Entry]:
        answer = self.ask(task, context)
        assert not answer.get("errors"), answer["errors"]
        assert answer["data"]["model_version"] == self.model_version
        found = answer["data"]["result"]
        assert isinstance(found, list)
        return found

    def mask(self, task: int, context: Sequence[Entry]) -> Mask:
        """The answer's mask, after a check of everything else that the page relies on."""
        return checked_mask(self.regions(task, context), context)

    def annotations(self, task: int) -> list[Entry]:
        return list(self.client.call("GET", f"/api/tasks/{task}/annotations"))


class Photo(NamedTuple):
    """An image file and (width, height) of what the page shows of it."""

    path: Path
    size: tuple[int, int]


def click(x: float, y: float, size: tuple[int, int], positive: bool | None = True, label: str = "Cat") -> Entry:
    """A smart keypoint at percent (x, y) of an image of (width, height) pixels; None: the page forgot the sign."""
    value = {"x": x, "y": y, "width": 0.25, "labels": [label], "keypointlabels": [label]}
    entry = _entry("point", "keypointlabels", size, value)
    return entry if positive is None else entry | {"is_positive": positive}


def rectangle(x: float, y: float, w: float, h: float, size: tuple[int, int], label: str = "Cat") -> Entry:
    """A smart rectangle, in percent."""
    value = {"x": x, "y": y, "width": w, "height": h, "rotation": 0, "rectanglelabels": [label]}
    return _entry("box", "rectanglelabels", size, value)


def forgotten(entry: Entry) -> Entry:
    """The click as the page sends it after a reload: a plain keypoint, without its sign."""
    value = {name: part for name, part in entry["value"].items() if name != "labels"}
    return {name: part for name, part in entry.items() if name != "is_positive"} | {"value": value}


def _entry(
    control: str, kind: Literal["keypointlabels", "rectanglelabels"], size: tuple[int, int], value: Entry
) -> Entry:
    return {
        "id": uuid.uuid4().hex[:10],
        "from_name": control,
        "to_name": "image",
        "type": kind,
        "origin": "manual",
        "original_width": size[0],
        "original_height": size[1],
        "image_rotation": 0,
        "value": value,
    }


def checked_mask(regions: Sequence[Entry], context: Sequence[Entry]) -> Mask:
    """The mask [H, W] of an answer's only region: right size, label and control; every click on its side."""
    assert len(regions) == 1
    region, last = regions[0], context[-1]
    width, height = last["original_width"], last["original_height"]
    assert region["id"]
    assert (region["type"], region["from_name"], region["to_name"]) == ("brushlabels", "brush", "image")
    assert (region["original_width"], region["original_height"]) == (width, height)
    assert region["value"]["format"] == "rle"
    assert region["value"]["brushlabels"] == last["value"][last["type"]]
    assert not region.get("readonly")  # it could not be corrected by hand
    mask = brush_rle.decode(region["value"]["rle"], height, width)
    assert mask.any()
    for entry in context:
        if "is_positive" in entry:
            row, column = (
                min(int(entry["value"][axis] * side / 100.0), side - 1) for axis, side in (("y", height), ("x", width))
            )
            assert mask[row, column] == entry["is_positive"], f"the click {entry['value']} is on the wrong side"
    return mask
