"""The backend as a class for the label-studio-ml library, for those who run their models under it: the same contract
and service behind another server. Our own server (app.py) needs none of this and does more.

    label-studio-ml init my_backend --script backends/label_studio/model.py:Inter2FormerModel

Works with the signatures of 1.0.9 (the newest on PyPI, which needs `redis` and `rq` installed beside it) and with those
of the repository's newer versions. The library makes and throws away instances at will, so weights belong to the
process and are loaded at the first prediction. Images on private addresses need LABEL_STUDIO_URL.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from label_studio_ml.model import LabelStudioMLBase  # type: ignore[import-not-found]  # not ours to install

from backends.common.server import warm_segmenter
from backends.common.settings import load_settings
from backends.label_studio.service import Backend

_lock = threading.Lock()
_backend: Backend | None = None


def shared_backend() -> Backend:
    """The process's one backend, made when it is first needed.

    raises  ConfigError, CheckpointError
    """
    global _backend
    with _lock:
        if _backend is None:
            settings = load_settings()
            _backend = Backend(warm_segmenter(settings), settings)
        return _backend


class Inter2FormerModel(LabelStudioMLBase):  # type: ignore[misc]  # the library has no types
    """Interactive masks. No work is done in the constructor: it runs at every opening of a page."""

    def predict(
        self, tasks: Sequence[Mapping[str, Any]], context: Mapping[str, Any] | None = None, **_: Any
    ) -> list[dict[str, Any]]:
        """One prediction a task, in order. Errors are Inter2FormerErrors, which the library turns into HTTP 500."""
        backend = shared_backend()
        project = str(tasks[0].get("project", "")) if tasks else ""
        config = str(getattr(self, "label_config", None) or "")
        hostname = str(getattr(self, "hostname", None) or "")
        if hostname:
            token = str(getattr(self, "access_token", None) or "")
            told = {"project": project, "schema": config, "hostname": hostname, "access_token": token}
            backend.setup(told, peer="", proven=False)
        body = {"tasks": list(tasks), "project": project, "label_config": config, "params": {"context": context}}
        results: list[dict[str, Any]] = backend.predict(body)["results"]
        return results

    def fit(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Training is a command of its own (`python -m train finetune`): events change nothing."""
        return {}
