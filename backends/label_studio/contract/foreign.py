"""Readers of JSON that others wrote: each takes anything and gives a value of its type, or an empty one or None."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def as_object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def as_objects(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18 else ""


def as_number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_index(value: Any) -> int | None:
    """A whole number, also one written as 1.0, or None."""
    number = as_number(value)
    return int(number) if number is not None and number.is_integer() else None
