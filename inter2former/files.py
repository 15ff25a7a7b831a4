"""Writing files whole or not at all. Every file that the project writes for a user goes through here."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_LEFT_S = 60.0  # a younger file may belong to a writer that has not locked it yet


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write beside the target, flush to disk, rename: a reader sees the old file or the new one.

    A writer that is killed leaves its unfinished file behind; the next process that writes the same target removes it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _tidy(target.absolute())
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=_prefix(target))
    try:
        with os.fdopen(descriptor, "wb") as file:
            if sys.platform != "win32":
                fcntl.flock(
                    descriptor, fcntl.LOCK_EX
                )  # says that somebody is writing here; the kernel lets go for the dead
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes private files; results are as readable as any other file
            os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _prefix(target: Path) -> str:
    return f".{target.name}."


@functools.lru_cache(maxsize=1024)  # once a process and target is enough
def _tidy(target: Path) -> None:
    """Remove what killed writers of `target` left: unfinished files that nobody locks and nobody touched lately."""
    if sys.platform == "win32":
        return
    for left in target.parent.glob(_pattern(target)):
        try:
            if left.is_symlink() or not left.is_file() or time.time() - left.stat().st_mtime < _LEFT_S:
                continue
            with left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        except OSError:  # somebody is writing it, or it is gone, or not ours
            continue


def _pattern(target: Path) -> str:
    """Names as mkstemp makes them: the prefix and eight letters."""
    escaped = "".join(f"[{char}]" if char in "*?[" else char for char in _prefix(target))
    return escaped + 8 * "[a-z0-9_]"
