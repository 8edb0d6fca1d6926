"""The head of a node's log, which its messages carry: how many lines, and the last one's digest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedclip.deploy.messages.envelope import BadMessage
from fedclip.errors import shortened

LOG = "log"
"""The key of a header under which it stands; a message without it confirms nothing."""
MOST_LINES = 1_000_000_000
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Head:
    """A log up to its line `n` (from 1), whose SHA-256 this is."""

    n: int
    sha256: str

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Head | None:
        """The head in a header, or in a line of a log; raises BadMessage for what cannot be one."""
        value: Any = header.get(LOG)
        if value is None:
            return None
        if isinstance(value, dict) and value.keys() == {"n", "sha256"}:
            n, digest = value["n"], value["sha256"]
            fits = type(n) is int and 1 <= n <= MOST_LINES and isinstance(digest, str)
            if fits and _DIGEST.fullmatch(digest):
                return cls(n, digest)
        raise BadMessage(f"the head of its log cannot be read: {shortened(value)}")

    def header(self) -> dict[str, Any]:
        """The head as part of a header."""
        return {LOG: asdict(self)}
