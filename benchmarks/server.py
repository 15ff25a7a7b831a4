"""The Label Studio backend under several annotators: 200 clicks over 10 tasks, at once and one after the other.

    python -m benchmarks.server --users 4

Starts the server as people do, three times: for users who click again as soon as they have an answer, for users who
take PAUSE_S to look at it, which is still fast for a person, and for one alone who makes the same clicks; every mask of
the first two has to equal that of the third. Then the same clicks with 100 accepted masks in each task's draft. Written
to benchmarks/results/server.json.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import cv2
import httpx
import numpy as np
import typer
from PIL import Image

from benchmarks.results import write_result
from inter2former import brush_rle

TASKS, CLICKS = 10, 10  # a task has as many objects as users visit it
PAUSE_S = 0.4
ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "tests" / "fixtures" / "label_studio" / "images"
CONFIG = (ROOT / "docs" / "label_studio.md").read_text("utf-8").split("```xml\n")[1].split("```")[0]


@contextlib.contextmanager
def server(folder: Path, **settings: str) -> Iterator[str]:
    """The backend as a process that reads images from `folder`; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("I2F_", "LABEL_STUDIO_"))}
    environment = kept | {"I2F_LOCAL_FILES_ROOT": str(folder)} | settings
    command = [sys.executable, "-m", "backends.label_studio", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 600
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False)
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server ended with {process.poll()}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def make_images(folder: Path) -> list[tuple[int, int]]:
    """Ten pictures of different sizes, 0.jpg to 9.jpg; their (width, height)."""
    sizes = []
    names = ("chelsea.jpg", "coffee.jpg", "astronaut.jpg", "rocket.jpg")
    for number in range(TASKS):
        with Image.open(PHOTOS / names[number % len(names)]) as photo:
            width = 400 + 20 * number
            picture = photo.convert("RGB").resize((width, width * photo.height // photo.width))
        picture.save(folder / f"{number}.jpg", quality=90)
        sizes.append(picture.size)
    return sizes


def call(task: int, user: int, clicks: int, size: tuple[int, int], drafts: list[Any]) -> dict[str, Any]:
    """What the platform sends after the latest of so many clicks."""
    entries = []
    for number in range(clicks):
        # Around the user's own place, every third one negative and far away from it.
        positive = number % 3 != 2
        angle, away = 2.4 * number, 4 + number if positive else 35 + number
        x, y = (min(max(40 + 5 * user + away * turn, 1), 99) for turn in (np.cos(angle), np.sin(angle)))
        entries.append(
            {
                "id": f"t{task}u{user}c{number}",
                "from_name": "point",
                "to_name": "image",
                "type": "keypointlabels",
                "is_positive": positive,
                "original_width": size[0],
                "original_height": size[1],
                "value": {"x": float(x), "y": float(y), "width": 0.3, "keypointlabels": ["Cat"], "labels": ["Cat"]},
            }
        )
    return {
        "tasks": [{"id": task, "data": {"image": f"/data/local-files/?d={task}.jpg"}, "drafts": drafts}],
        "project": "1.2",
        "label_config": CONFIG,
        "params": {"context": {"result": entries}},
    }


def hundred_masks(size: tuple[int, int]) -> list[Any]:
    """A draft with 100 accepted masks, each stored twice as the page does."""
    width, height = size
    result = []
    for number in range(100):
        disc = np.zeros((height, width), np.uint8)
        centre = (width * (number % 10) // 10 + 15, height * (number // 10) // 10 + 10)
        cv2.circle(disc, centre, 12, 1, -1)
        value = {"format": "rle", "rle": brush_rle.encode(disc)}
        place = {"id": f"mask{number}", "to_name": "image", "original_width": width, "original_height": height}
        result.append(
            {**place, "type": "brushlabels", "from_name": "brush", "value": {**value, "brushlabels": ["Cat"]}}
        )
        points = {**value, "keypointlabels": ["Cat"]}
        result.append({**place, "type": "keypointlabels", "from_name": "point", "value": points})
    return [{"result": result}]


class Annotators:
    """Users with a task each at a time; what they got and how long it took."""

    def __init__(
        self, address: str, sizes: list[tuple[int, int]], users: int, drafts: list[list[Any]], pause_s: float = 0.0
    ) -> None:
        self.answers: dict[tuple[int, int, int], tuple[int, bytes]] = {}
        self.masks: dict[tuple[int, int, int], bytes] = {}
        self.first_s: list[float] = []
        self.later_s: list[float] = []
        self.errors: list[str] = []
        self._address, self._sizes, self._users, self._drafts = address, sizes, users, drafts
        self._lock, self._pause_s = threading.Lock(), pause_s
        self._ready = threading.Barrier(users)

    def objects(self, user: int) -> list[int]:
        """The tasks of a user, in order: each task is visited by two users, if there are two."""
        each = 2 * TASKS // self._users
        return [(user * each + number) % TASKS for number in range(each)]

    def work(self, user: int) -> None:
        # Written before and read after, by the smallest client there is: real users have machines of their own for it.
        bodies = {
            (task, clicks): json.dumps(call(task, user, clicks, self._sizes[task], self._drafts[task])).encode()
            for task in self.objects(user)
            for clicks in range(1, CLICKS + 1)
        }
        self._ready.wait()
        with contextlib.closing(http.client.HTTPConnection(self._address.removeprefix("http://"), timeout=120)) as line:
            for (task, clicks), body in bodies.items():
                began = time.perf_counter()
                line.request("POST", "/predict", body, {"Content-Type": "application/json"})
                answer = line.getresponse()
                text = answer.read()
                spent = time.perf_counter() - began
                with self._lock:
                    (self.first_s if clicks == 1 else self.later_s).append(spent)
                    self.answers[task, user, clicks] = (answer.status, text)
                time.sleep(self._pause_s)

    def _look(self) -> None:
        for (task, user, clicks), (status, text) in self.answers.items():
            width, height = self._sizes[task]
            found = json.loads(text)["results"][0]["result"] if status == 200 else []
            if found:
                mask = brush_rle.decode(found[0]["value"]["rle"], height, width)
                self.masks[task, user, clicks] = np.packbits(mask).tobytes()
            else:
                self.errors.append(f"task {task}, user {user}, click {clicks}: {status} {text[:200]!r}")

    def together(self) -> None:
        threads = [threading.Thread(target=self.work, args=(user,)) for user in range(self._users)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._look()

    def in_turn(self) -> None:
        self._ready = threading.Barrier(1)
        for user in range(self._users):
            self.work(user)
        self._look()


def encodes(address: str) -> int:
    text = httpx.get(f"{address}/metrics", timeout=60, trust_env=False).text
    return int(
        sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("inter2former_encodes_total"))
    )


def health_ms(address: str, stop: threading.Event, spent: list[float]) -> None:
    """Ask /health and /setup while others work."""
    with contextlib.closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)) as line:
        while not stop.is_set():
            for method, path in (("GET", "/health"), ("POST", "/setup")):
                began = time.perf_counter()
                line.request(method, path, b'{"project": "1.2"}', {"Content-Type": "application/json"})
                line.getresponse().read()
                spent.append(1000 * (time.perf_counter() - began))
            stop.wait(0.2)


def measure(users: int = 4, **settings: str) -> dict[str, Any]:
    """All figures. `wrong` and `errors` are 0 and `encodes` is `images` when all is well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = make_images(folder)
        empty: list[list[Any]] = [[] for _ in sizes]
        with server(folder, **settings) as address:
            crowd = Annotators(address, sizes, users, empty)
            before = encodes(address)  # the server has warmed up
            stop, spent = threading.Event(), list[float]()
            watch = threading.Thread(target=health_ms, args=(address, stop, spent))
            watch.start()
            crowd.together()
            stop.set()
            watch.join()
            encoded = encodes(address) - before
        with server(folder, **settings) as address:
            people = Annotators(address, sizes, users, empty, PAUSE_S)
            people.together()
        with server(folder, **settings) as address:
            alone = Annotators(address, sizes, users, empty)
            alone.in_turn()
            # Warm by now: the drafts are all that differs, and both are asked by turns.
            pairs = []
            for task, size in enumerate(sizes):
                draft = hundred_masks(size)
                for clicks in range(2, CLICKS + 1):
                    times = []
                    for drafts in ([], draft):
                        body = call(task, task * users // TASKS % users, clicks, size, drafts)
                        content = json.dumps(body).encode()
                        began = time.perf_counter()
                        httpx.post(f"{address}/predict", content=content, timeout=120, trust_env=False)
                        times.append(time.perf_counter() - began)
                    pairs.append(times[1] - times[0])
    wrong = sum(some.masks[key] != alone.masks.get(key) for some in (crowd, people) for key in some.masks)
    single = statistics.median(alone.later_s)
    p95, paused_p95 = (sorted(some.later_s)[int(0.95 * len(some.later_s))] for some in (crowd, people))
    errors = crowd.errors + people.errors + alone.errors
    return {
        "clicks": len(crowd.first_s) + len(crowd.later_s),
        "users": users,
        "images": len(sizes),
        "encodes": encoded,
        "errors": len(errors),
        "first_error": (*errors, "")[0],
        "wrong": wrong,
        "alone_median_ms": 1000 * single,
        "together_median_ms": 1000 * statistics.median(crowd.later_s),
        "together_p95_ms": 1000 * p95,
        "p95_over_alone_median": p95 / single,
        "paused_median_ms": 1000 * statistics.median(people.later_s),
        "paused_p95_ms": 1000 * paused_p95,
        "paused_p95_over_alone_median": paused_p95 / single,
        "first_click_median_ms": 1000 * statistics.median(crowd.first_s),
        "hundred_masks_add_ms": 1000 * statistics.median(pairs),
        "health_and_setup_p95_ms": sorted(spent)[int(0.95 * len(spent))],
    }


def main(
    users: Annotated[int, typer.Option(min=1, max=20)] = 4,
    keep: Annotated[bool, typer.Option(help="write benchmarks/results/server.json")] = True,
) -> None:
    figures = measure(users)
    for key, value in figures.items():
        print(f"{key:26} {value:.1f}" if isinstance(value, float) else f"{key:26} {value}")
    if keep:
        print(write_result("server", figures, threads=os.cpu_count() or 1))


if __name__ == "__main__":
    typer.run(main)
