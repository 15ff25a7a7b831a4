"""Both doors as real processes, an image server beside them, and how a page asks. Used by tests/soak and by the quick
tests of whole processes; holds no tests.

Every process runs under guarded.py, which refuses connections beyond this machine and says so in the log.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from synthetic import encode_png, make_image

from inter2former import Click, Segmenter, brush_rle

ROOT = Path(__file__).parents[1]
DOORS = {"label_studio": "backends.label_studio", "cvat": "backends.cvat_nuclio"}
SIZES = [(120, 160), (97, 61), (300, 200), (256, 256), (64, 400), (33, 47), (180, 320), (240, 241)]  # height, width
START_S = 180.0  # a busy machine needs long for the imports
CONFIG = """<View><Image name="image" value="$image"/><KeyPointLabels name="kp" toName="image"><Label value="Cat"/>
</KeyPointLabels><BrushLabels name="brush" toName="image"><Label value="Cat"/></BrushLabels></View>"""
Mask = np.ndarray[Any, np.dtype[np.bool_]]
_ids = itertools.count()


@dataclass(frozen=True, eq=False)
class Picture:
    number: int
    height: int
    width: int

    @functools.cached_property
    def pixels(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return make_image(self.height, self.width, self.number)

    @functools.cached_property
    def png(self) -> bytes:
        return encode_png(self.pixels)

    @property
    def path(self) -> str:
        return f"/data/upload/1/{self.number}.png"

    def clicks(self, count: int, seed: int) -> tuple[Click, ...]:
        """Positive ones first, as CVAT sorts them; off the middle of pixels, so that no rounding decides."""
        rng = np.random.default_rng([self.number, seed])
        places = zip(rng.integers(self.width, size=count), rng.integers(self.height, size=count), strict=True)
        n_positive = 1 + int(rng.integers(count))
        return tuple(Click(int(x) + 0.37, int(y) + 0.37, n < n_positive) for n, (x, y) in enumerate(places))


def pictures(count: int = 8) -> list[Picture]:
    return [Picture(number, *SIZES[number % len(SIZES)]) for number in range(count)]


# -- the place that images come from ---------------------------------------------------------------------------------


class ImageServer:
    """Serves `files` by path; `faults[path](handler)` plays something else instead. A context manager."""

    def __init__(self, shown: Sequence[Picture] = ()) -> None:
        self.files = {picture.path: picture.png for picture in shown}
        self.faults: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        me = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                me.asked.append(path)
                with contextlib.suppress(ConnectionError):
                    if path in me.faults:
                        me.faults[path](self)
                    elif path in me.files:
                        send(self, 200, me.files[path])
                    else:
                        send(self, 404, b"nothing here")

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that go away are the point
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def __enter__(self) -> ImageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "image/png", "Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


# -- what a page sends and reads -------------------------------------------------------------------------------------


def label_studio_body(picture: Picture, clicks: Sequence[Click], *, address: str | None = None) -> bytes:
    """A click of Label Studio's page, on an object that nobody else clicks on."""
    name = f"object-{os.getpid()}-{next(_ids)}"
    entries = [
        {
            "original_width": picture.width,
            "original_height": picture.height,
            "value": {
                "x": 100 * click.x / picture.width,
                "y": 100 * click.y / picture.height,
                "width": 0.2,
                "keypointlabels": ["Cat"],
            },
            "id": f"{name}-{n}",
            "from_name": "kp",
            "to_name": "image",
            "type": "keypointlabels",
            "is_positive": click.positive,
        }
        for n, click in enumerate(clicks)
    ]
    body = {
        "tasks": [{"id": 7, "data": {"image": address or picture.path}}],
        "project": "1.2",
        "label_config": CONFIG,
        "params": {"context": {"result": entries}},
    }
    return json.dumps(body).encode()


def cvat_body(picture: Picture, clicks: Sequence[Click]) -> bytes:
    sides: dict[bool, list[list[float]]] = {True: [], False: []}
    for click in clicks:
        sides[click.positive].append([click.x, click.y])
    image = base64.b64encode(picture.png).decode()
    return json.dumps({"image": image, "pos_points": sides[True], "neg_points": sides[False], "obj_bbox": []}).encode()


def mask_in(kind: str, answer: Any, picture: Picture) -> Mask:
    """bool [H, W] of a door's JSON answer."""
    if kind == "cvat":
        return np.array(answer["mask"], np.bool_)
    regions = answer["results"][0]["result"]
    if not regions:
        return np.zeros((picture.height, picture.width), np.bool_)
    (region,) = regions
    return brush_rle.decode(region["value"]["rle"], picture.height, picture.width) > 0


class References:
    """What is right: the masks of one Segmenter asked by one thread, with nothing remembered from other requests."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self._known: dict[tuple[int, tuple[Click, ...]], Mask] = {}
        self._lock = threading.Lock()

    def __call__(self, picture: Picture, clicks: tuple[Click, ...]) -> Mask:
        key = (picture.number, clicks)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._segmenter.segment(picture.pixels, clicks, model_size=256).mask
            return self._known[key]


# -- the process -----------------------------------------------------------------------------------------------------


@dataclass
class Door:
    """A door that answers on `url`. `process` is gunicorn's parent; the work is done by its child."""

    kind: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def click_url(self) -> str:
        return self.url + ("/predict" if self.kind == "label_studio" else "/")

    @property
    def worker(self) -> int:
        """The process id of the one worker."""
        return children(self.process.pid)[-1]

    def body(self, picture: Picture, clicks: Sequence[Click]) -> bytes:
        return (label_studio_body if self.kind == "label_studio" else cvat_body)(picture, clicks)

    def post(self, body: bytes) -> httpx.Response:
        return self.client.post(self.click_url, content=body, headers={"Content-Type": "application/json"})

    def ask(self, picture: Picture, clicks: Sequence[Click], *, patience_s: float = 0.0) -> Mask:
        """The mask; who is patient asks again as long as the door is busy."""
        end = time.monotonic() + patience_s
        answer = self.post(self.body(picture, clicks))
        while answer.status_code == 503 and time.monotonic() < end:
            time.sleep(float(answer.headers["Retry-After"]))
            answer = self.post(self.body(picture, clicks))
        assert answer.status_code == 200, answer.text
        return mask_in(self.kind, answer.json(), picture)

    def metric(self, name: str) -> float:
        """The sum over the labels of a metric."""
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.client.get(self.url + "/metrics").text, re.MULTILINE)
        return sum(map(float, found))

    def wait(self, timeout_s: float = START_S) -> None:
        """Until it answers."""
        end = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get(self.url + "/health").status_code == 200:
                    return
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Parent and child, at once and without asking."""
        pids = [*children(self.process.pid), self.process.pid] if self.process.poll() is None else []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(
    kind: str, checkpoint: Path, folder: Path, images: ImageServer | None = None, **more: Any
) -> Iterator[Door]:
    """A door under gunicorn, until it answers; killed at the end when it still runs.

    folder       for its log
    environment  (in `more`) further variables; None takes one away
    options      (in `more`) further arguments of the command
    """
    with started(kind, checkpoint, folder, images, **more) as door:
        door.wait()
        yield door


@contextlib.contextmanager
def started(
    kind: str,
    checkpoint: Path,
    folder: Path,
    images: ImageServer | None = None,
    *,
    environment: Mapping[str, str | None] | None = None,
    options: Sequence[str] = (),
    cwd: Path = ROOT,
    **popen: Any,
) -> Iterator[Door]:
    """The same without waiting."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    variables: dict[str, str | None] = {
        **os.environ,
        "I2F_CHECKPOINT": str(checkpoint),
        "I2F_MODEL_SIZE": "256",
        "I2F_THREADS": "1",
        "I2F_CVAT_RESPONSE": "mask",
        "LABEL_STUDIO_URL": images.url if images else "http://127.0.0.1:9",
        "LABEL_STUDIO_API_KEY": "key",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **(environment or {}),
    }
    log = folder / f"{kind}-{port}.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "guarded.py"), DOORS[kind], "--port", str(port), *options],
            cwd=cwd,
            env={name: value for name, value in variables.items() if value is not None},
            **{"stdout": stderr, "stderr": stderr, **popen},
        )
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    with httpx.Client(timeout=120, limits=limits, trust_env=False) as client:
        door = Door(kind, port, process, log, client)
        try:
            yield door
        finally:
            door.kill()


# -- clients without manners -----------------------------------------------------------------------------------------


def head_of(door: Door, body: bytes) -> bytes:
    path = httpx.URL(door.click_url).path
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode()


def abort(door: Door, body: bytes, how: int) -> None:
    """Begin a click and reset the connection: 0 in the headers, 1 in the body, 2 right after it, 3 a little later."""
    with socket.create_connection(("127.0.0.1", door.port), timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
        if how == 0:
            connection.sendall(head_of(door, body)[:40])
        else:
            connection.sendall(head_of(door, body) + (body[: len(body) // 2] if how == 1 else body))
        if how == 3:
            time.sleep(0.02)


def begin(door: Door, body: bytes) -> tuple[socket.socket, bytes]:
    """A click of which the last byte is not sent yet."""
    connection = socket.create_connection(("127.0.0.1", door.port), timeout=120)
    connection.sendall(head_of(door, body) + body[:-1])
    return connection, body[-1:]


def finish(connection: socket.socket, rest: bytes) -> tuple[int, str]:
    """(status, body) of the answer; (0, "") when the connection was closed without one."""
    with connection, connection.makefile("rb") as reader:
        connection.sendall(rest)
        head = reader.readline()
        length = 0
        while (line := reader.readline().strip()) != b"":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return (int(head.split()[1]), reader.read(length).decode()) if head else (0, "")


# -- what the kernel knows -------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def niceness(pid: int) -> set[int]:
    """Of all threads of a process."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return {int(stat.rpartition(")")[2].split()[16]) for stat in stats}


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def listening(port: int) -> set[str]:
    """The IPv4 and IPv6 addresses on which somebody listens on `port`, in the kernel's spelling."""
    lines = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    return {local[1].split(":")[0] for local in lines if local[3] == "0A" and int(local[1].split(":")[1], 16) == port}
