"""What happened in one request: seconds by stage, for its log line, its reply and the metrics."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@dataclasses.dataclass
class Trace:
    """What happened in one request, for its log line and its reply."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    image_key: str = ""
    note: str = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - began})

    def add(self, seconds: Mapping[str, float]) -> None:
        for name, spent in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
