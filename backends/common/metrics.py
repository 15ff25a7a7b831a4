"""What Prometheus may know of a door: counts and seconds, never a URL, a user or a task.

One `Metrics` belongs to one server; nothing is global, so it can be created twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inter2former.runtime import native
from inter2former.segmenter import Segmenter

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
# From a warm click of milliseconds to the encoding of a large image on a slow machine.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The numbers of one door ("label_studio", "cvat") and, unless others compute for it, of its segmenter."""

    def __init__(self, door: str, segmenter: Segmenter | None = None) -> None:
        self._registry = CollectorRegistry()
        self._door = door
        self._requests = Counter(
            "inter2former_requests_total", "Requests by endpoint and status.", ["door", "endpoint", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._stages = Histogram(
            "inter2former_stage_seconds", "Seconds by stage of a click.", ["door", "stage"], buckets=BUCKETS,
            registry=self._registry,
        )  # fmt: skip
        self._errors = Counter(
            "inter2former_errors_total", "Errors by code.", ["door", "code"], registry=self._registry
        )
        self._work = Counter(
            "inter2former_annotation", "Objects begun, prompts answered, prompts taken back.", ["door", "what"],
            registry=self._registry,
        )  # fmt: skip
        self.queue = Gauge("inter2former_queue", "Clicks waiting or at work.", registry=self._registry)
        if segmenter is not None:
            self._registry.register(_SegmenterCollector(segmenter))

    def request(self, endpoint: str, status: int) -> None:
        self._requests.labels(self._door, endpoint, str(status)).inc()

    def error(self, code: str) -> None:
        self._errors.labels(self._door, code).inc()

    def annotation(self, what: Literal["objects", "prompts", "undone"], count: int = 1) -> None:
        """Prompts by objects is how many clicks an object takes; undone by prompts, how often a click was wrong."""
        self._work.labels(self._door, what).inc(count)

    def stages(self, seconds: Mapping[str, float]) -> None:
        for stage, spent in seconds.items():
            self._stages.labels(self._door, stage).observe(spent)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return prometheus_client.generate_latest(self._registry)


class _SegmenterCollector(Collector):
    """Reads the segmenter when it is asked, so that nothing has to be kept in step."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter

    def collect(self) -> Iterable[Metric]:
        cache = self._segmenter.cache_info()
        yield CounterMetricFamily("inter2former_encodes", "Runs of the image encoder.", value=self._segmenter.encodes)
        yield CounterMetricFamily("inter2former_cache_hits", "Found in the cache.", value=cache.hits)
        yield CounterMetricFamily("inter2former_cache_misses", "Not found in the cache.", value=cache.misses)
        yield CounterMetricFamily("inter2former_cache_evictions", "Made room for others.", value=cache.evictions)
        yield GaugeMetricFamily("inter2former_cache_bytes", "Bytes in the cache.", value=cache.nbytes)
        yield GaugeMetricFamily("inter2former_cache_budget_bytes", "Bytes it may hold.", value=cache.budget_bytes)
        folder = self._segmenter.folder_info()
        if folder is not None:
            yield CounterMetricFamily("inter2former_folder_hits", "Encodings found on disk.", value=folder.hits)
            yield CounterMetricFamily("inter2former_folder_evictions", "Made room on disk.", value=folder.evictions)
            yield GaugeMetricFamily("inter2former_folder_bytes", "Bytes on disk.", value=folder.nbytes)
            yield GaugeMetricFamily("inter2former_folder_budget_bytes", "May be there.", value=folder.budget_bytes)
        info = GaugeMetricFamily(
            "inter2former_info", "What is running.", labels=["version", "model", "instruction_set"]
        )
        # Without the native module PyTorch does its work, more slowly: worth an alert.
        info.add_metric([version(), self._segmenter.digest[:16], native.status().instruction_set or "none"], 1)
        yield info


def version() -> str:
    """The installed version; "unknown" when run from a clone that was never installed."""
    try:
        return metadata.version("inter2former")
    except metadata.PackageNotFoundError:
        return "unknown"
