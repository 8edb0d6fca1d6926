"""Names and messages on a screen: as they are, never as markup, and never as terminal commands."""

from __future__ import annotations

import json
from typing import Any

from rich.text import Text

from fedclip.errors import harmless


def plain(value: object) -> Text:
    """A cell or label: brackets are no markup, `:smile:` no emoji, and it stays on one line."""
    return Text(harmless(str(value), lines=False))


def message(text: str) -> Text:
    """The same for text of several lines."""
    return Text(harmless(text))


def no_formula(name: str) -> str:
    """Escape a name for a plot: matplotlib takes what is between dollars for a formula."""
    return harmless(name, lines=False).replace("$", r"\$")


def json_text(value: Any, indent: int | None = 2) -> str:
    """JSON that can be printed anywhere: what is not printable is escaped, the rest is readable."""
    return printable_json(json.dumps(value, indent=indent, ensure_ascii=False))


def printable_json(text: str) -> str:
    """The same of JSON that is a text already; outside of its strings all is printable anyway."""
    return "".join(
        c if c.isprintable() or c == "\n" else json.dumps(c, ensure_ascii=True)[1:-1] for c in text
    )
