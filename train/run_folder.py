"""The folder of a run: whose it is. What a run writes into it is its own business."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inter2former.errors import ConfigError
from inter2former.files import write_atomically


def claim(out: Path, identity: dict[str, Any], resume: bool) -> None:
    """Make the folder this run's own, or check that it is: `identity` (JSON) decides what can be continued.

    Raises ConfigError when it holds a run and `resume` is not given, or another run, naming what changed.
    """
    path, identity = out / "run.json", json.loads(json.dumps(identity))
    if not path.is_file():
        write_atomically(path, json.dumps(identity, indent=1).encode())
        return
    if not resume:
        raise ConfigError(f"{out} holds a run already.", "Give --resume to continue it, or another --out.")
    earlier = json.loads(path.read_bytes())
    if changed := sorted(key for key in identity if earlier.get(key) != identity[key]):
        raise ConfigError(f"The run in {out} cannot be continued: {', '.join(changed)} changed.", "Give another --out.")
