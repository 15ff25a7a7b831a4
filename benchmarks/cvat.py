"""The CVAT door measured: what a click costs beyond the core, how nuclio's workers share, many annotators at once.

    python -m benchmarks.cvat overhead --write
    python -m benchmarks.cvat workers --write
    python -m benchmarks.cvat annotators --write

Prints a table and, with --write, keeps the figures in benchmarks/results/. `workers` and `annotators` start real
servers on this machine.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import gc
import gzip
import json
import os
import queue
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import cv2
import httpx
import numpy as np
import numpy.typing as npt
import typer

from backends.cvat_nuclio.service import Interactor, Reply
from benchmarks.results import write_result
from inter2former.prompts import Click
from inter2former.segmenter import Segmenter, load_segmenter
from inter2former.terminal import print_rows

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "tests" / "fixtures" / "label_studio" / "images"
NAMES = ("coffee.jpg", "chelsea.jpg", "astronaut.jpg", "rocket.jpg")
LIMITS = {"shapes_gzip_kb": 64, "mask_gzip_kb": 300, "overhead_ms": 15}
Mask = npt.NDArray[np.bool_]

app = typer.Typer(add_completion=False, help="The CVAT door measured.")


@app.callback()
def main() -> None:
    """The CVAT door measured."""


def photo(name: str, width: int, height: int) -> bytes:
    """A JPEG as a camera of that size makes it: an enlarged photo with grain, so that its file is not too small."""
    picture = cv2.imread(str(PHOTOS / name))
    assert picture is not None
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 1)).astype(np.float32)
    noisy = np.clip(picture + grain, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def sessions(count: int, clicks: int, width: int, height: int, seed: int = 0) -> list[list[Click]]:
    """Objects that people click on: a positive click, then clicks around it, every third negative and far away."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x, y = (0.2 + 0.6 * rng.random(2)) * (width, height)
        session = [Click(float(x), float(y))]
        for number in range(1, clicks):
            positive = number % 3 != 2
            away, angle = (0.05 if positive else 0.3) * height, rng.random() * 2 * np.pi
            side = np.clip((x + away * np.cos(angle), y + away * np.sin(angle)), 0.5, (width - 0.5, height - 0.5))
            session.append(Click(float(side[0]), float(side[1]), positive))
        made.append(session)
    return made


def in_order(clicks: Sequence[Click]) -> list[Click]:
    """The order that a request of CVAT defines: all positive clicks, then all negative ones."""
    return [click for side in (True, False) for click in clicks if click.positive is side]


def payload(image_base64: str, clicks: Sequence[Click]) -> dict[str, Any]:
    """What CVAT's server sends after the last of these clicks."""
    sides = {side: [[click.x, click.y] for click in clicks if click.positive is side] for side in (True, False)}
    return {"image": image_base64, "pos_points": sides[True], "neg_points": sides[False], "obj_bbox": []}


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": ordered[len(ordered) // 2], "p95": ordered[int(0.95 * (len(ordered) - 1))]}


# -- one click beyond the core ---------------------------------------------------------------------------------------


@app.command()
def overhead(
    objects: Annotated[int, typer.Option(help="objects clicked, each with ten clicks")] = 10,
    width: int = 4000,
    height: int = 3000,
    threads: int = 1,
    write: Annotated[bool, typer.Option("--write", help="keep benchmarks/results/cvat_overhead.json")] = False,
) -> None:
    """Size of the answers, and time of a click beyond the core alone, for a large JPEG that was seen before.

    The core and the door (with a core of its own and equal weights) answer the same clicks by turns. The core gets the
    image by name, so that everything the door does with the request counts: finding and hashing the text, prompts, run
    lengths, JSON, gzip, log line and metrics. CVAT's server accepts gzip, so the sizes on the wire are those with it.
    Exit status 1: a limit is passed, judged by processor time, which a busy machine changes less.
    """
    figures = measure_overhead(objects, width, height, threads)
    print(json.dumps({key: value for key, value in figures.items() if key != "rows"}))
    print_rows(
        f"{width} x {height} JPEG of {figures['jpeg_mb']} MB, {figures['clicks']} clicks, ms beyond the core; "
        f"limits: {LIMITS['overhead_ms']} ms, {LIMITS['shapes_gzip_kb']} kB shapes, {LIMITS['mask_gzip_kb']} kB mask",
        figures["rows"],
    )
    if write:
        print(write_result("cvat_overhead", figures, threads=threads))
    raise typer.Exit(0 if figures["within_limits"] else 1)


def measure_overhead(objects: int, width: int, height: int, threads: int) -> dict[str, Any]:
    jpeg = photo("coffee.jpg", width, height)
    text = base64.b64encode(jpeg).decode()
    clicked = [session[:count] for session in sessions(objects, 10, width, height) for count in range(1, 11)]
    core = load_segmenter(threads=threads)
    known = dataclasses.replace(core.known(jpeg), image=jpeg)
    core.prefetch(known)
    rows: list[dict[str, Any]] = []
    core_ms: list[float] = []
    for what, form, as_bytes in (
        ("shapes, body as bytes", "shapes", True),
        ("shapes, body as dict", "shapes", False),
        ("mask, body as bytes", "mask", True),
    ):
        door = Interactor(load_segmenter(threads=threads), form=form)  # type: ignore[arg-type]
        door.answer(payload(text, [Click(5, 5)]))
        wall, cpu, sizes, sent, wrong = [], [], [], [], 0
        core.clear_cache()
        core.prefetch(known)
        gc.collect()
        for number, clicks in enumerate(clicked if form == "shapes" else clicked[::4]):
            fields = payload(text, clicks)
            body: object = json.dumps(fields).encode() if as_bytes else fields
            ordered = in_order(clicks)
            calls: list[Callable[[], Any]] = [
                functools.partial(core.segment, known, ordered),
                functools.partial(door.answer, body, accepts_gzip=True),
            ]
            spent: dict[int, tuple[float, float, Any]] = {}
            for which in ((0, 1), (1, 0))[number % 2]:
                began = time.perf_counter(), time.process_time()
                result = calls[which]()
                spent[which] = time.perf_counter() - began[0], time.process_time() - began[1], result
            wall.append(1000 * (spent[1][0] - spent[0][0]))
            cpu.append(1000 * (spent[1][1] - spent[0][1]))
            core_ms.append(1000 * spent[0][1])
            sizes.append(len(plain(spent[1][2])) / 1000)
            sent.append(len(spent[1][2].body) / 1000)
            if form == "shapes":
                found = shapes_mask(plain(spent[1][2]), height, width)
                wrong += not np.array_equal(found, spent[0][2].mask)
        rows.append(
            {
                "form": what,
                "wall_p50": round(statistics.median(wall), 1),
                "cpu_p50": round(statistics.median(cpu), 1),
                "cpu_p95": round(spread(cpu)["p95"], 1),
                "kb_p50": round(statistics.median(sizes), 1),
                "kb_max": round(max(sizes), 1),
                "kb_above_64": sum(size > LIMITS["shapes_gzip_kb"] for size in sizes),
                "gzip_kb_p50": round(statistics.median(sent), 1),
                "gzip_kb_max": round(max(sent), 1),
                "wrong": wrong,
            }
        )
    fits = all(
        row["gzip_kb_max"] <= LIMITS["shapes_gzip_kb" if row["form"].startswith("shapes") else "mask_gzip_kb"]
        and (row["cpu_p50"] <= LIMITS["overhead_ms"] or row["form"].startswith("mask"))
        for row in rows
    )
    return {
        "pixels": [width, height],
        "jpeg_mb": round(len(jpeg) / 1e6, 1),
        "clicks": len(clicked),
        "core_cpu_ms_p50": round(statistics.median(core_ms), 1),
        "limits": LIMITS,
        "within_limits": fits,
        "rows": rows,
    }


def plain(reply: Reply) -> bytes:
    return gzip.decompress(reply.body) if "Content-Encoding" in reply.headers else reply.body


def shapes_mask(body: bytes, height: int, width: int) -> Mask:
    """The mask in a `shapes` answer, as CVAT's page paints it."""
    mask = np.zeros((height, width), np.bool_)
    for shape in json.loads(body)["shapes"]:
        *runs, left, top, right, bottom = shape["points"]
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(bottom - top + 1, right - left + 1)
        mask[top : bottom + 1, left : right + 1] = inside
    return mask


# -- real servers ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Server:
    """A process that answers on `address`."""

    address: str
    process: subprocess.Popen[bytes]
    http: httpx.Client

    def post(self, body: bytes, path: str = "/") -> httpx.Response:
        headers = {"Content-Type": "application/json", "x-nuclio-function-name": "inter2former", "x-nuclio-path": "/"}
        return self.http.post(self.address + path, content=body, headers=headers)

    def encodes(self) -> int:
        found = re.findall(r"^inter2former_encodes_total (\S+)$", self.http.get(self.address + "/metrics").text, re.M)
        return int(sum(map(float, found)))

    def _ids(self) -> list[int]:
        own = self.process.pid
        return [own, *map(int, Path(f"/proc/{own}/task/{own}/children").read_text().split())]

    def memory_mb(self) -> float:
        """Of the process and its children; what they share is counted once."""
        texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self._ids()]
        return sum(float(re.findall(r"^Pss:\s+(\d+)", text, re.M)[0]) / 1024 for text in texts)

    def cpu_s(self) -> float:
        """Processor time so far, of the process and its children."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self._ids()]
        return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def server(module: str, *options: str, **settings: str) -> Iterator[Server]:
    """A command of ours on a free port of this machine, from its first answer on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("I2F_", "CVAT_", "OMP_"))}
    command = [sys.executable, "-m", module, "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=kept | settings, stderr=subprocess.DEVNULL)
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(timeout=300, trust_env=False, limits=limits) as http:
        try:
            end = time.monotonic() + 600
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if http.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{module} ended with {process.poll()}")
                time.sleep(0.2)
            yield Server(f"http://127.0.0.1:{port}", process, http)
        finally:
            process.terminate()
            process.wait(60)


@dataclasses.dataclass(frozen=True)
class Work:
    """What people do: person by person (image, clicks so far) in the order in which they ask."""

    jpegs: list[bytes]
    size: tuple[int, int]  # width, height
    people: list[list[tuple[int, list[Click]]]]

    @classmethod
    def of(cls, people: int, images: int, clicks: int, size: tuple[int, int] = (1280, 720)) -> Work:
        """So many clicks in all; objects of up to ten clicks, several people on every image."""
        each = -(-clicks // people)
        asked = []
        for person in range(people):
            objects = sessions(-(-each // 10), 10, *size, seed=1000 + person)
            asked.append([(person % images, one[:n]) for one in objects for n in range(1, 11)][:each])
        return cls([photo(NAMES[n % len(NAMES)], *size) for n in range(images)], size, asked)

    def ask(self, post: Callable[[bytes], httpx.Response]) -> Answers:
        """Everybody at once, each waiting for an answer before the next click."""
        texts = [base64.b64encode(jpeg).decode() for jpeg in self.jpegs]
        answers = Answers()

        def person(number: int) -> None:
            for turn, (image, clicks) in enumerate(self.people[number]):
                body = json.dumps(payload(texts[image], clicks)).encode()
                began = time.perf_counter()
                reply = post(body)
                answers.add((number, turn), reply, time.perf_counter() - began)

        began = time.perf_counter()
        with ThreadPoolExecutor(len(self.people)) as threads:
            list(threads.map(person, range(len(self.people))))
        answers.seconds = time.perf_counter() - began
        return answers

    def wrong(self, answers: Answers, core: Segmenter) -> int:
        """How many of the answers are not what the core gives when it is asked alone, one click after the other."""
        count = 0
        for number, asked in enumerate(self.people):
            for turn, (image, clicks) in enumerate(asked):
                if (body := answers.bodies.get((number, turn))) is not None:
                    mask = core.segment(self.jpegs[image], in_order(clicks)).mask
                    count += not np.array_equal(shapes_mask(body, *mask.shape), mask)
        return count


class Answers:
    """Answers by (person, turn), and what they took."""

    def __init__(self) -> None:
        self.bodies: dict[tuple[int, int], bytes] = {}
        self.first_ms: list[float] = []
        self.later_ms: list[float] = []
        self.errors: list[str] = []
        self.seconds = 0.0
        self._lock = threading.Lock()

    def add(self, key: tuple[int, int], reply: httpx.Response, seconds: float) -> None:
        with self._lock:
            (self.later_ms if key[1] else self.first_ms).append(1000 * seconds)
            if reply.status_code == 200:
                self.bodies[key] = reply.content
            else:
                self.errors.append(f"{reply.status_code} {reply.text[:200]}")

    def figures(self) -> dict[str, Any]:
        clicks = len(self.first_ms) + len(self.later_ms)
        return {
            "clicks": clicks,
            "errors": len(self.errors),
            "clicks_per_s": round(clicks / self.seconds, 1),
            "first_ms": round(statistics.median(self.first_ms)),
            "p50_ms": round(spread(self.later_ms)["p50"]),
            "p95_ms": round(spread(self.later_ms)["p95"]),
        }


# -- which workers of nuclio -----------------------------------------------------------------------------------------

SHAPES = {"I2F_CVAT_RESPONSE": "shapes"}
FUNCTION, GATEWAY = "backends.cvat_nuclio", "backends.cvat_nuclio.gateway"


@app.command()
def workers(
    people: int = 4,
    clicks: int = 120,
    write: Annotated[bool, typer.Option("--write", help="keep benchmarks/results/cvat_workers.json")] = False,
) -> None:
    """Ways to have several nuclio workers: a free worker gets the next click, as nuclio's processor does it."""
    cores = os.cpu_count() or 1
    work = Work.of(people, 2, clicks)
    rows = []
    for what, count, shared, threads in (
        ("one worker, its threads on all cores", 1, False, cores),
        (f"{cores} workers with weights of their own, one thread each", cores, False, 1),
        (f"{people} thin workers of one server", people, True, cores),
    ):
        with contextlib.ExitStack() as stack:
            own = {**SHAPES, "I2F_THREADS": str(threads)}
            computing = [stack.enter_context(server(FUNCTION, **own))] if shared else []
            settings = {**SHAPES, "I2F_CVAT_SERVERS": computing[0].address} if shared else own
            asked = [stack.enter_context(server(FUNCTION, "--workers", "1", **settings)) for _ in range(count)]
            computing = computing or asked
            before, cpu = sum(one.encodes() for one in computing), _cpu_s([*asked, *computing])
            answers = work.ask(functools.partial(_free, _queue(asked)))
            rows.append(
                {
                    "workers": what,
                    **answers.figures(),
                    "encodes": sum(one.encodes() for one in computing) - before,
                    "cpu_ms_a_click": round(1000 * (_cpu_s([*asked, *computing]) - cpu) / clicks),
                    "memory_mb": round(
                        sum(one.memory_mb() for one in {id(x): x for x in [*asked, *computing]}.values())
                    ),
                    "wrong": work.wrong(answers, load_segmenter(threads=threads)),
                }
            )
    print(json.dumps(rows))
    print_rows(f"{people} people on 2 images, {clicks} clicks, {cores} cores", rows)
    if write:
        print(write_result("cvat_workers", {"people": people, "images": 2, "rows": rows}, threads=cores))


def _cpu_s(servers: Sequence[Server]) -> float:
    return sum(one.cpu_s() for one in {one.address: one for one in servers}.values())


def _queue(asked: Sequence[Server]) -> queue.Queue[Server]:
    free: queue.Queue[Server] = queue.Queue()
    for one in asked:
        free.put(one)
    return free


def _free(free: queue.Queue[Server], body: bytes) -> httpx.Response:
    worker = free.get()
    try:
        return worker.post(body)
    finally:
        free.put(worker)


# -- many annotators -------------------------------------------------------------------------------------------------


@app.command()
def annotators(
    people: int = 8,
    images: int = 4,
    clicks: int = 400,
    replicas: int = 2,
    write: Annotated[bool, typer.Option("--write", help="keep benchmarks/results/cvat_annotators.json")] = False,
) -> None:
    """People at once through the gateway, several on every image. Exit status 1: an error, an encode too many or a mask
    that differs from the one that the core gives alone."""
    figures = measure_annotators(people, images, clicks, replicas)
    print(json.dumps(figures))
    print_rows(f"{people} people on {images} images, gateway with {replicas} replicas", [figures])
    if write:
        print(write_result("cvat_annotators", figures, threads=os.cpu_count() or 1))
    raise typer.Exit(0 if (figures["errors"], figures["encodes"], figures["wrong"]) == (0, images, 0) else 1)


def measure_annotators(people: int, images: int, clicks: int, replicas: int) -> dict[str, Any]:
    work = Work.of(people, images, clicks)
    with contextlib.ExitStack() as stack:
        computing = [stack.enter_context(server(FUNCTION, **SHAPES)) for _ in range(replicas)]
        options = [option for one in computing for option in ("--replica", one.address)]
        gateway = stack.enter_context(server(GATEWAY, *options))
        before = [one.encodes() for one in computing]
        answers = work.ask(functools.partial(gateway.post, path="/api/function_invocations"))
        encodes = [one.encodes() - begun for one, begun in zip(computing, before, strict=True)]
    wrong = work.wrong(answers, load_segmenter())
    if answers.errors:
        print(answers.errors[0], file=sys.stderr)
    return {**answers.figures(), "encodes": sum(encodes), "encodes_by_replica": encodes, "wrong": wrong}


if __name__ == "__main__":
    app()
