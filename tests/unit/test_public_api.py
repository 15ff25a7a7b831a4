"""What users may import: exactly this list, and nothing happens on import."""

from __future__ import annotations

import subprocess
import sys

import inter2former

PUBLIC = [
    "Box",
    "CheckpointError",
    "Click",
    "ConfigError",
    "ImageError",
    "Inter2FormerError",
    "ModelConfig",
    "NumericError",
    "PromptError",
    "Segmentation",
    "Segmenter",
    "load_segmenter",
]


def test_the_public_names_are_these() -> None:
    assert inter2former.__all__ == PUBLIC == sorted(PUBLIC)
    assert all(hasattr(inter2former, name) for name in PUBLIC)


def test_every_error_has_its_own_code_and_one_base() -> None:
    errors = [getattr(inter2former, name) for name in PUBLIC if name.endswith("Error")]
    assert all(issubclass(error, inter2former.Inter2FormerError) for error in errors)
    assert len({error.code for error in errors}) == len(errors)


def test_an_import_starts_no_thread_and_brings_no_server() -> None:
    program = (
        "import sys, threading, inter2former\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "loaded = {'flask', 'gunicorn', 'httpx', 'backends', 'train', 'typer'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
