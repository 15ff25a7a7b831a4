"""A door as a process, from start to stop: where it listens (R41), whom it talks to (R42), what it measures (R43), what
clients that go away leave behind (R14), who goes first (R11), how it stops (R19). Longer versions are in tests/soak."""

from __future__ import annotations

import ast
import contextlib
import json
import signal
import socket
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from doors import (
    ROOT,
    Door,
    ImageServer,
    References,
    abort,
    begin,
    finish,
    listening,
    mask_in,
    niceness,
    open_files,
    pictures,
    running,
)

from inter2former.runtime import native
from inter2former.segmenter import load_segmenter

LOOPBACK = "0100007F"  # 127.0.0.1, as the kernel writes it


@pytest.mark.parametrize("kind", ["label_studio", "cvat"])
def test_r11_r14_r19_r41_r42_r43_from_start_to_stop(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One process, because starting one is what costs time."""
    shown = pictures(4)
    right = References(load_segmenter(tiny_checkpoint, threads=1))
    with ImageServer(shown) as images, running(kind, tiny_checkpoint, tmp_path, images) as door:
        assert listening(door.port) == {LOOPBACK}  # R41
        for picture in shown:
            assert np.array_equal(door.ask(picture, picture.clicks(3, 0)), right(picture, picture.clicks(3, 0)))
        clicking, encoding = sorted(niceness(door.worker))
        assert clicking < encoding  # R11
        files = open_files(door.worker)
        for n in range(24):  # as many as there are places
            abort(door, door.body(shown[0], shown[0].clicks(3, n)), n % 4)
        end = time.monotonic() + 60
        while open_files(door.worker) > files:  # R14
            assert time.monotonic() < end, open_files(door.worker) - files
            time.sleep(0.05)
        metrics = httpx.get(door.url + "/metrics", trust_env=False).text
        for name in ("requests_total", "stage_seconds_bucket", "encodes_total", "cache_bytes", "cache_hits_total",
                     "cache_evictions_total", "queue", "info", "errors_total"):  # fmt: skip
            assert f"inter2former_{name}" in metrics  # R43
        assert f'instruction_set="{native.status().instruction_set or "none"}"' in metrics
        assert images.url not in metrics
        drain(door, right)  # R19
        text = door.text()
    assert "Traceback" not in text
    assert "FORBIDDEN" not in text  # R42
    assert [path.name for path in tmp_path.iterdir()] == [door.log.name]


def drain(door: Door, right: References) -> None:
    """Eight clicks are on their way when the server is told to stop: eight right answers. Who comes later, or asks
    whether it is ready, gets a 503; then nobody listens.
    """
    asked = [(picture, picture.clicks(3, seed)) for picture in pictures(4) for seed in (1, 2)]
    with contextlib.ExitStack() as stack:
        flights = [begin(door, door.body(*click)) for click in asked]
        for connection, _ in flights:
            stack.enter_context(connection)
        time.sleep(0.3)  # until the server has begun to read
        door.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 20
        while (health := door.client.get(door.url + "/health")).status_code != 503:
            assert time.monotonic() < end
        late = door.post(door.body(*asked[0]))
        for refused in (health, late):
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert refused.json()["error"] == "busy"
        for (connection, rest), (picture, clicks) in zip(flights, asked, strict=True):
            status, text = finish(connection, rest)
            assert status == 200, text
            assert np.array_equal(mask_in(door.kind, json.loads(text), picture), right(picture, clicks))
        assert door.process.wait(60) == 0
    assert not listening(door.port)


def test_r41_every_server_listens_on_this_machine_unless_told_otherwise() -> None:
    """R41: no default of a --host option is another address, and nobody runs Flask's own server."""
    found = []
    for file in (ROOT / "backends").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            if first == "--host":
                default = named["default"]
                assert isinstance(default, ast.Constant)
                found.append(default.value)
            assert "debug" not in named, file
    assert found
    assert set(found) == {"127.0.0.1"}


def test_the_guard_refuses_the_rest_of_the_world(tmp_path: Path) -> None:
    """What R42 relies on."""
    from guarded import guard, is_here

    assert is_here("127.0.0.1")
    assert is_here("::1")
    assert is_here("localhost")
    for host in ("8.8.8.8", "example.org", "10.0.0.1", "0.0.0.0"):
        assert not is_here(host)
        with pytest.raises(PermissionError):
            guard("socket.getaddrinfo", (host, 80, 0, 0, 0))
    with socket.socket() as unused, pytest.raises(PermissionError):
        guard("socket.connect", (unused, ("192.0.2.1", 80)))
