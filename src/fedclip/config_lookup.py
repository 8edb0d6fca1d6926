"""Reading nested mappings in which anything may be missing or of a wrong type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CrossProblem:
    """Keys that do not fit together: the one to blame first, and what to say."""

    key: str
    text: str


def lookup(values: Any, key: str) -> Any:
    """Value at `a.b.c`, or None where the way there ends."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values


def number(values: Mapping[str, Any], key: str) -> float | None:
    """The number at a key; None for anything else."""
    value = lookup(values, key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
