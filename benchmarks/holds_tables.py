"""The table of the page "what holds and what does not", from `holds.yaml` and the result files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.claims import Ends, bounds_of, excluded, interval, levels
from benchmarks.markdown import markdown_table

HOLDS = Path(__file__).with_name("holds.yaml")
HOLDS_PAGES = {
    "docs/explanation-what-holds.md": "en",
    "docs/explanation-what-holds.zh-CN.md": "zh",
}
WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "columns": ("claim", "whose", "verdict", "95 % interval", "again by"),
        "holds": "**holds**",
        "fails": "**does not hold**",
        "open": "not decided",
        "excluded": "no claim: tuned to an edge",
        "missing": "not measured yet",
        "guide": "the guide's",
    },
    "zh": {
        "columns": ("说法", "出处", "结论", "95 % 区间", "重做的命令"),
        "holds": "**成立**",
        "fails": "**不成立**",
        "open": "未能判定",
        "excluded": "不下结论：最佳值在边缘",
        "missing": "尚未测量",
        "guide": "指南",
    },
}
FORMS = {
    "share": "{:.1%} to {:.1%}",
    "rounds": "{:+.1f} to {:+.1f} rounds",
    "ratio": "{:.2f} to {:.2f}",
    "difference": "{:+.4f} to {:+.4f}",
}


def holds_tables(results: Path, language: str) -> dict[str, str]:
    """The page's table by its mark."""
    claims = yaml.safe_load(HOLDS.read_text(encoding="utf-8"))
    words = WORDS[language]
    rows = []
    for claim, level in zip(claims, levels(claims), strict=True):
        verdict, ends = _tried(claim, results, level)
        shown = "–" if ends is None else FORMS[claim["form"]].format(*ends)
        if language == "zh":
            shown = shown.replace(" to ", " 到 ").replace("rounds", "轮")
        by = words.get(claim["by"], claim["by"])
        rows.append([claim[language], by, words[verdict], shown, f"`{claim['command']}`"])
    return {"what-holds": markdown_table(words["columns"], rows)}


def _tried(claim: Mapping[str, Any], results: Path, level: float) -> tuple[str, Ends | None]:
    """What the interval says of a claim: `holds`, `fails` or `open`, or why there is none."""
    file = results / claim["file"]
    if not file.exists():
        return "missing", None
    result = json.loads(file.read_text(encoding="utf-8"))
    try:
        if excluded(claim, result):
            return "excluded", None
        low, high = interval(claim, result, level)
    except KeyError:  # this part of the comparison has not been run
        return "missing", None
    lowest, highest = bounds_of(claim)
    if lowest < low and high < highest:
        return "holds", (low, high)
    return ("fails" if high < lowest or low > highest else "open"), (low, high)
