"""The tables of the page on strategies, in English and Chinese, from the result files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown_table
from fedclip.reports.comparison import accuracy_table, number, spread

LORA_PAGES = {
    "docs/explanation-strategies.md": "en",
    "docs/explanation-strategies.zh-CN.md": "zh",
}
GRIDS = ("strategies", "heterogeneity", "layers", "ranks")
VERDICTS = {"better": "更好", "worse": "更差", "tie": "持平", "no claim": "不下结论"}
WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "guide": (
            "data set",
            "arm",
            "accuracy",
            "of full, 95 % interval",
            "against full",
            "trained",
            "rounds to 95 %",
            "rate",
            "tuning runs",
        ),
        "columns": {},
        "verdicts": {name: name for name in VERDICTS},
        "full": "full fine-tuning",
        "about": "Means of {seeds} seeds; {processor}, {cores} cores; commit `{commit}`; "
        "`{command}`. Each knob of each arm had {budget} values on {tuning} tuning seeds; `!`: the "
        "best value is the last one tried, so the arm takes part in no claim; `~`: others tie.",
    },
    "zh": {
        "guide": (
            "数据集",
            "方法",
            "准确率",
            "占全参数，95 % 区间",
            "与全参数相比",
            "训练参数",
            "到 95 % 的轮数",
            "学习率",
            "调参运行",
        ),
        "columns": {
            "arm": "方法",
            "seeds": "种子",
            "accuracy": "准确率",
            "personalised": "个性化准确率",
            "over zero-shot": "高于零样本",
            "verdict": "结论",
            "lowest client": "最低客户端",
            "lowest 10 %": "最低 10 %",
            "rate": "学习率",
        },
        "verdicts": VERDICTS,
        "full": "全参数微调",
        "about": "{seeds} 个种子的均值；{processor}，{cores} 核；提交 `{commit}`；`{command}`。"
        "每个方法的每个超参数在 {tuning} 个调参种子上试 {budget} 个值；`!`：最佳值是最后试的一个，"
        "该方法不参与任何结论；`~`：有其他值与之持平。",
    },
}


def lora_tables(results: Path, language: str) -> dict[str, str]:
    """The page's tables by their mark, of the comparisons that have a result."""
    found = {}
    for name in ("guide", *GRIDS):
        file = results / f"{name}.json"
        if file.exists():
            result = json.loads(file.read_text("utf-8"))
            maker = _guide if name == "guide" else _grids
            found[name] = maker(result, WORDS[language])
    return found


def _guide(result: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    rows = []
    for data, grid in result["details"]["grids"].items():
        arms = grid["arms"]
        for arm in (name for name in grid["grid"]["arms"] if name in arms):
            row = arms[arm]
            minus = row["minus"].get("full")
            rate = row["tuning"]["client.learning_rate"]
            marks = ("!" if rate["edge"] else "") + ("~" if rate["ties"] else "")
            rows.append(
                [
                    data,
                    words["full"] if arm == "full" else f"LoRA r={arm[1:]}",
                    spread(row["accuracy"]),
                    "–" if minus is None else percent(minus["ratio"]),
                    "–" if minus is None else words["verdicts"][_verdict(minus)],
                    number(row["trainable_parameters"], ",.0f"),
                    number(row["rounds_to_95"], ".1f"),
                    f"{rate['value']:g} {marks}".rstrip(),
                    str(row["tuning_runs"]),
                ]
            )
    return f"{markdown_table(words['guide'], rows)}\n\n{_about(result, words)}"


def _grids(result: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    """A table for each grid, the one of `fedclip bench` itself."""
    parts = []
    for grid in result["details"]["grids"].values():
        cells = accuracy_table(grid["arms"], grid["grid"]["reference"])
        columns = [words["columns"].get(name, name) for name in cells.columns]
        rows = [[words["verdicts"].get(cell, cell) for cell in row] for row in cells.rows]
        parts.append(markdown_table(columns, rows))
    return "\n\n".join([*parts, _about(result, words)])


def _about(result: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    grid = next(iter(result["details"]["grids"].values()))["grid"]
    about: str = words["about"].format(
        seeds=seeds_of(result),
        processor=result["machine"]["processor"],
        cores=result["machine"]["cores"],
        commit=(result["commit"] or "")[:8],
        command=result["details"]["command"],
        budget=grid["tuning"]["budget"],
        tuning=len(grid["tuning"]["seeds"]),
    )
    return about


def seeds_of(result: Mapping[str, Any]) -> str:
    """How many seeds the arms of a comparison have: `5`, or `3-5`."""
    grids = result["details"]["grids"].values()
    counts = {len(row["runs"]) for grid in grids for row in grid["arms"].values()}
    return "-".join(map(str, sorted({min(counts), max(counts)})))


def _verdict(minus: Mapping[str, Any]) -> str:
    return "no claim" if minus["excluded"] else minus["verdict"] or "no claim"


def percent(ratio: Mapping[str, float | None]) -> str:
    """A ratio with its interval, in per cent."""
    mean, low, high = ratio["mean"], ratio["low"], ratio["high"]
    if mean is None or low is None or high is None:
        return "–"
    return f"{mean:.1%} [{low:.1%}, {high:.1%}]"
