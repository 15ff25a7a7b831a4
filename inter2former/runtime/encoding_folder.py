"""Encodings of images in a folder: what was computed once is there after a restart, also what memory has no room for.

One file an encoding, safetensors, written whole or not at all, named by what it belongs to. The folder has a budget in
bytes; what was not used for longest leaves first. It may fail or be emptied at any time: that costs time, never an
answer. One process writes to a folder; several may exceed its budget until one of them starts anew.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from inter2former.errors import ConfigError
from inter2former.files import write_atomically

_NAME = re.compile(r"[A-Za-z0-9_.-]+")

log = logging.getLogger(__name__)


class FolderInfo(NamedTuple):
    """What the folder holds and has done so far. `nbytes` is the sum over its files, never above `budget_bytes`."""

    nbytes: int
    budget_bytes: int
    files: int
    hits: int
    evictions: int


class EncodingFolder:
    """Files of encodings that belong together, in a folder of their own below `folder`. Thread-safe.

    owner    what the encodings were made by: weights, and whatever else decides their numbers and layout
    kinds    the classes of encodings: named tuples whose fields are tensors or lists of tensors

    raises   ConfigError for a folder that cannot be made, an owner that is no file name, or a negative budget
    """

    def __init__(self, folder: Path, budget_bytes: int, owner: str, kinds: Sequence[type[Any]]) -> None:
        if budget_bytes < 0:
            raise ConfigError(f"The budget of the folder of encodings is {budget_bytes}.", "Give 0 or more.")
        if not _NAME.fullmatch(owner):
            raise ConfigError(f"Encodings of {owner!r} cannot be kept in a folder.", "Weights need a digest.")
        self._root, self._folder = folder, folder / owner
        self._budget = budget_bytes
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._lock = threading.Lock()
        self._hits = self._evictions = 0
        self._writes = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files = self._found()
            self._make_room(0)
        except OSError as error:
            raise ConfigError(f"The folder of encodings cannot be used: {error}.") from None

    def load(self, name: str) -> Any | None:
        """The encoding, or None when it is not here or cannot be read; such a file is deleted."""
        path = self._path(name)
        with self._lock:
            if path not in self._files:
                return None
            self._files.move_to_end(path)
        try:
            os.utime(path)  # it leaves late, also after a restart
            encoding = self._unpacked(path.read_bytes())
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("the encoding %s cannot be read and is made again: %s", path.name, error)
            with self._lock:
                self._forget(path)
            return None
        with self._lock:
            self._hits += 1
        return encoding

    def store(self, name: str, encoding: Any) -> None:
        """Write a file, unless it is larger than the budget. A folder that cannot be written to is left alone then."""
        path, data = self._path(name), _packed(encoding)
        if not self._writes or len(data) > self._budget:
            return
        try:
            with self._lock:
                self._make_room(len(data))
                self._files[path] = len(data)  # room for it, before it is there
            write_atomically(path, data)
        except OSError as error:
            log.warning("encodings are no longer kept in %s: %s", self._root, error)
            self._writes = False
            with self._lock:
                self._files.pop(path, None)

    def info(self) -> FolderInfo:
        with self._lock:
            return FolderInfo(sum(self._files.values()), self._budget, len(self._files), self._hits, self._evictions)

    def _path(self, name: str) -> Path:
        assert _NAME.fullmatch(name)
        return self._folder / f"{name}.safetensors"

    def _found(self) -> OrderedDict[Path, int]:
        """Every file of every owner with its bytes, the one not used for longest first."""
        found = sorted((path.stat().st_mtime_ns, path) for path in self._root.glob("*/*.safetensors"))
        return OrderedDict((path, path.stat().st_size) for _, path in found)

    def _make_room(self, nbytes: int) -> None:
        while self._files and sum(self._files.values()) + nbytes > self._budget:
            self._forget(next(iter(self._files)))
            self._evictions += 1

    def _forget(self, path: Path) -> None:
        self._files.pop(path, None)
        path.unlink(missing_ok=True)

    def _unpacked(self, data: bytes) -> Any:
        tensors = load(data)
        name = next(iter(tensors), "").partition("/")[0]
        if name not in self._kinds:
            raise ValueError("it is no encoding of ours")
        parts: dict[str, Any] = {field: [] for field in self._kinds[name]._fields}
        for key, tensor in sorted(tensors.items()):
            if tensor.is_floating_point() and not math.isfinite(float(tensor.sum())):
                raise ValueError("its numbers are not finite")
            field, *number = key.removeprefix(f"{name}/").split("/")
            if number:
                parts[field].append(tensor)
            else:
                parts[field] = tensor
        return self._kinds[name](**parts)


def _packed(encoding: Any) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    name = type(encoding).__name__
    for field, value in zip(encoding._fields, encoding, strict=True):
        if isinstance(value, torch.Tensor):
            tensors[f"{name}/{field}"] = value.contiguous()
        else:
            tensors.update({f"{name}/{field}/{number:03}": part.contiguous() for number, part in enumerate(value)})
    return save(tensors)
