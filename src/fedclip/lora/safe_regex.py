"""Regular expressions from files, bounded so that none can keep a matcher busy.

Python's matcher tries the ways in which a text can be taken apart one after another. Nested
repetition, as in `(a+)+$`, has so many that it would take years. Here the ways are counted from
the parsed expression before it is used, and an expression with too many is refused.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

MAX_LENGTH = 4096
MAX_WAYS = 1_000_000
"""Ways to match one path; three `.*` have as many."""
_PATH = 100  # about the length of a layer's path, and so of what `.*` may take

_PARSER: Any = importlib.import_module("re._parser")
_ONE_WAY = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"}
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


def safe_regex(expression: str) -> str:
    """The expression itself; ValueError for one that is none, that is too much, or not offered."""
    shown = repr(expression) if len(expression) <= 80 else f"{expression[:77]!r}..."
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"{shown} is longer than {MAX_LENGTH} characters")
    try:
        # In a group, as it will stand: flags for the whole expression have no place there.
        ways = _ways(_PARSER.parse(f"({expression})"))
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{shown} is not a regular expression: {error}") from None
    if ways > MAX_WAYS:
        raise ValueError(
            f"{shown} can match in too many ways; repeat no repetition, and use .* at most "
            "three times"
        )
    return expression


def _ways(parsed: Any) -> float:
    """An upper bound on the ways in which an expression can take a path apart."""
    ways = 1.0
    for operator, argument in parsed:
        name = str(operator)
        if name in _REPEATS:
            least, most, body = argument
            ways *= _repeated(_ways(body), int(least), int(most))
        elif name == "SUBPATTERN":
            ways *= _ways(argument[-1])
        elif name == "ATOMIC_GROUP":
            ways *= _ways(argument)
        elif name == "BRANCH":
            ways *= sum(map(_ways, argument[1]))
        elif name not in _ONE_WAY:
            raise ValueError(f"{name.lower().replace('_', ' ')} is not offered in patterns")
        if ways > MAX_WAYS:
            return ways
    return ways


def _repeated(inner: float, least: int, most: int) -> float:
    """Ways of a repetition: how often it is taken, and how each time."""
    if least > MAX_LENGTH:
        return MAX_WAYS + 1.0
    most = min(most, least + _PATH - 1)
    if inner == 1:
        return most - least + 1.0
    # Each time in any of the ways; more than a few times is already too many.
    return sum(min(inner, 1e4) ** min(times, 60) for times in range(least, most + 1))
