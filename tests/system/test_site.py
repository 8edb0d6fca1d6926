"""The documentation site: every page is in its navigation once, in the language of its branch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NAVIGATION = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]["nav"]


def pages(entry: Any) -> list[str]:
    """The files below an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    below = entry.values() if isinstance(entry, dict) else entry
    return [page for part in below for page in pages(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(pages(NAVIGATION)) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


def test_chinese_pages_are_in_the_chinese_branch() -> None:
    for entry in NAVIGATION:
        chinese = {page.endswith(".zh-CN.md") for page in pages(entry)}
        assert chinese == {"中文" in entry}
