"""Files are written whole or not at all, and what a killed writer left is removed later (R18)."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from inter2former import files

WRITER = """
import os, signal, sys
from inter2former import files
files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(sys.argv[1], b"half")
"""


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_r18_what_a_killed_writer_left_is_removed_by_the_next_process(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")
    killed = subprocess.run([sys.executable, "-c", WRITER, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - {target}
    assert target.read_bytes() == b"old"
    age(left, 3600)
    files.write_atomically(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert target.read_bytes() == b"new"


def test_r18_nothing_else_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "a[1].json"
    young, written = tmp_path / ".a[1].json.abcdefgh", tmp_path / ".a[1].json.abcdefgi"
    kept = [
        young,
        written,
        *(tmp_path / name for name in (".a[1].json.bak", ".a1.json.abcdefgh", "a[1].json.abcdefgh")),
    ]
    for path in kept:
        path.write_bytes(b"x")
        age(path, 3600)
    age(young, 1)
    link = tmp_path / ".a[1].json.abcdefgj"
    link.symlink_to(tmp_path / "elsewhere")
    left = tmp_path / ".a[1].json.abcdefgk"
    left.write_bytes(b"x")
    age(left, 3600)
    with written.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its writer does
        files.write_atomically(target, b"new")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in [target, link, *kept]}
