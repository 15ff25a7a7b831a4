"""`python guarded.py MODULE ARGS...` runs a module that may talk to this machine only.

A look-up, connection or datagram to anywhere else is refused, and named on standard error as FORBIDDEN.
"""

from __future__ import annotations

import ipaddress
import os
import runpy
import sys
from typing import Any

_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_SENDS = ("socket.connect", "socket.sendto", "socket.sendmsg")


def is_here(host: Any) -> bool:
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _LOOKUPS:
        host = arguments[0]
    elif event in _SENDS and isinstance(arguments[1], tuple):  # an address of another kind is a file
        host = arguments[1][0]
    else:
        return
    if not is_here(host):
        os.write(2, f"FORBIDDEN {event} {host!r}\n".encode())
        raise PermissionError(f"{event} {host!r}: no network in tests")


if __name__ == "__main__":
    sys.addaudithook(guard)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
