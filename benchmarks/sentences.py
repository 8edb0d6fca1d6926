"""Comparative sentences of the pages: those that a reader may take for a claim about figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = (  # from descriptions, help and docstrings
    "reference-configuration.md",
    "reference-configuration.zh-CN.md",
    "reference-commands.md",
    "reference-python.md",
)
WORDS = re.compile(
    r"\b(better|worse|faster|slower|equal|fewer|more|gains?|gained|loses?|lost)\b"
    r"|更好|更差|更快|更慢|快于|慢于|更少|更多|更高|更低|优于|不如|相等|一样快|提升|超过|倍",
    re.IGNORECASE,
)
# Bounds and counts ("more than 200 connections", "超过 3 层"), which compare nothing.
_BOUNDS = re.compile(
    r"\b(?:more|fewer) than(?: once| one\b| a batch|(?= [`\d]))|\b\d+ or more\b|不?超过(?= ?[`\d])"
)
_CODE = re.compile(r"`[^`\n]*`")
# Code, and tables made from result files, which show what was found without a word about it.
_BLOCKS = re.compile(
    r"```.*?```|<!-- ([\w-]+)-table -->.*?<!-- /\1-table -->|<!--.*?-->", re.DOTALL
)
_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[。\uff01\uff1f])\s*|\n\s*\n|\n(?=\s*(?:[-|#*]|\d+\.)\s)")


def pages() -> list[str]:
    """README and all pages, in both languages, by their path."""
    docs = sorted((ROOT / "docs").glob("*.md"))
    found = [ROOT / "README.md", ROOT / "README.zh-CN.md", *docs]
    return [page.relative_to(ROOT).as_posix() for page in found if page.name not in GENERATED]


def comparative(text: str) -> Iterator[str]:
    """The sentences and table rows of a page that compare, each on one line."""
    for sentence in _ENDS.split(_BLOCKS.sub("\n\n", text)):
        heading = sentence.lstrip().startswith("#")
        if not heading and WORDS.search(_CODE.sub("", _BOUNDS.sub("", sentence))):
            yield " ".join(sentence.split())
