"""A loopback stand-in for Label Studio: serves the recorded photos to whoever has a token, refreshes personal access
tokens, and misbehaves on request. And small readers for the recorded calls and for the answers.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

FIXTURES = Path(__file__).parents[2] / "fixtures" / "label_studio"
LEGACY = "0123456789abcdef-legacy-canary"
PAT = "eyJhbGciOiJIUzI1NiJ9.cmVmcmVzaC1jYW5hcnk.c2lnbmF0dXJlLWNhbmFyeQ"


def recorded(name: str) -> dict[str, Any]:
    """A recorded call by the number it begins with."""
    (path,) = FIXTURES.glob(f"{name}_*.json")
    return json.loads(path.read_text())


def request_of(name: str) -> dict[str, Any]:
    return recorded(name)["backend_request"]["body"]


def photo(name: str) -> bytes:
    return (FIXTURES / "images" / name).read_bytes()


def jwt(**payload: Any) -> str:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part(payload)}.c2lnbmF0dXJl"


class Platform:
    """`answers` maps a path to (status, headers, body) or to a function of the handler; everything else is as usual."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.refreshes = 0
        self.legacy_on = True
        self.access: list[str] = []
        platform = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                platform._get(self)

            def do_POST(self) -> None:
                platform._post(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.requests]

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        headers = {key.lower(): value for key, value in handler.headers.items()}
        self.requests.append(("GET", handler.path, headers))
        special = self.answers.get(parts.path)
        if callable(special):
            special(handler)
            return
        if special is not None:
            self._send(handler, *special)
            return
        if not self._allowed(headers.get("authorization", "")):
            self._send(handler, 401, {}, b'{"detail":"canary-in-a-body"}')
            return
        name = parts.path.rpartition("/")[2].rpartition("-")[2]
        if parts.path == "/data/local-files/":
            name = parse_qs(parts.query)["d"][0].rpartition("/")[2]
        if parts.path.endswith("/presign/"):
            uri = base64.urlsafe_b64decode(parse_qs(parts.query)["fileuri"][0]).decode()
            name = uri.rpartition("/")[2]
        file = FIXTURES / "images" / name
        if name and file.is_file():
            self._send(handler, 200, {"Content-Type": "image/jpeg"}, file.read_bytes())
        else:
            self._send(handler, 404, {}, b"canary-in-a-body")

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.requests.append(("POST", handler.path, {}))
        if handler.path == "/api/token/refresh/" and json.loads(body) == {"refresh": PAT}:
            self.refreshes += 1
            access = jwt(exp=int(time.time()) + 300, n=self.refreshes)
            self.access.append(access)
            self._send(handler, 200, {}, json.dumps({"access": access}).encode())
        else:
            self._send(handler, 401, {}, b"{}")

    def _allowed(self, authorization: str) -> bool:
        if authorization == f"Token {LEGACY}":
            return self.legacy_on
        return authorization.removeprefix("Bearer ") in self.access[-1:] and authorization.startswith("Bearer ")

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(body)


def decode_rle(rle: list[int], height: int, width: int) -> np.ndarray:
    """The page's way to read `value.rle`, bit by bit: the alpha of every pixel, uint8 [H, W]."""
    bits = "".join(format(byte, "08b") for byte in rle)
    position = 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position], 2)

    n_values, word = take(32), take(5) + 1
    widths = [take(4) + 1 for _ in range(4)]
    assert n_values == 4 * height * width
    values = bytearray()
    while len(values) < n_values:
        repeated = take(1)
        length = take(widths[take(2)]) + 1
        values += bytes([take(word)]) * length if repeated else bytes(take(word) for _ in range(length))
    assert len(values) == n_values
    return np.frombuffer(bytes(values), np.uint8).reshape(height, width, 4)[..., 3]


def mask_of(region: dict[str, Any]) -> np.ndarray:
    """bool [H, W] of an answered brush region."""
    return decode_rle(region["value"]["rle"], region["original_height"], region["original_width"]) > 0


def at(mask: np.ndarray, x: float, y: float) -> bool:
    """The mask under a point in percent."""
    height, width = mask.shape
    return bool(mask[min(int(y * height / 100), height - 1), min(int(x * width / 100), width - 1)])
