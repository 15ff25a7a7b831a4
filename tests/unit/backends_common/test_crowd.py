"""R10: clicks that are refused before they are understood, when more come than can be turned down one by one."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator

import pytest

from backends.common.server import refuse_unread


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the caller's, the server's)"""
    caller, server = socket.socketpair()
    with caller, server:
        server.setblocking(False)  # as gunicorn hands it over
        yield caller, server


def request(line: str, body: bytes = b"", *headers: str) -> bytes:
    return "\r\n".join((line, "Host: h", *headers, f"Content-Length: {len(body)}", "", "")).encode() + body


@pytest.mark.parametrize(
    "line", ["POST /predict HTTP/1.1", "POST / HTTP/1.1", "POST /api/function_invocations HTTP/1.1"]
)
@pytest.mark.parametrize("size", [0, 100, 3_000_000])
def test_a_click_is_taken_whole_and_refused(line: str, size: int, ends: tuple[socket.socket, socket.socket]) -> None:
    caller, server = ends
    sender = threading.Thread(target=caller.sendall, args=(request(line, b"x" * size),))
    sender.start()
    assert refuse_unread(server)
    sender.join()
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(1)  # nothing is left that would reset the connection
    answer = http.client.HTTPResponse(caller)
    answer.begin()
    assert (answer.status, answer.headers["Retry-After"], answer.headers["Connection"]) == (503, "1", "close")
    assert b"busy" in answer.read()


@pytest.mark.parametrize(
    "sent",
    [
        request("GET /health HTTP/1.1"),
        request("POST /setup HTTP/1.1", b"{}"),
        request("POST /predictions HTTP/1.1", b"{}"),
        request("POST /predict HTTP/1.1", b"{}", "Expect: 100-continue"),
        b"POST /predict HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n",  # more than a click has
        b"POST /predict HTTP/1.1\r\nHost: h\r\n\r\n",  # of unknown length
        b"POST /predict HTTP/1.1\r\nContent-Le",
        b"POST /predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"",
    ],
)
def test_everything_else_is_left_as_it_was(sent: bytes, ends: tuple[socket.socket, socket.socket]) -> None:
    caller, server = ends
    caller.sendall(sent)
    caller.shutdown(socket.SHUT_WR)
    assert not refuse_unread(server)
    assert server.recv(1 << 16) == sent


def test_a_caller_who_left_is_no_error(ends: tuple[socket.socket, socket.socket]) -> None:
    caller, server = ends
    caller.sendall(request("POST /predict HTTP/1.1", b"x" * 100)[:-50])
    caller.close()
    assert refuse_unread(server)
