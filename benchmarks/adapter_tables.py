"""The tables of the page on several tasks, from the result file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.markdown import markdown_table
from fedclip.experiment.bench.comparisons import Interval, interval
from fedclip.reports.comparison import spread

ADAPTER_PAGES = {
    "docs/how-to-several-tasks.md": "en",
    "docs/how-to-several-tasks.zh-CN.md": "zh",
}
CAPTION_PAGE = "docs/how-to-captions.md"
WORDS = {
    "en": {
        "arm": "arm",
        "adapter": "adapter",
        "minus": "mean of tasks, minus separate",
        "about": "Mean ± standard deviation of {seeds} seeds on the central test sets; the last "
        "column has the paired difference and its 95 % interval over seeds. {machine}, commit "
        "`{commit}`, measured by earlier rules: one learning rate for all arms, test images "
        "drawn anew by each seed.",
    },
    "zh": {
        "arm": "方式",
        "adapter": "适配器",
        "minus": "各任务均值减 separate",
        "about": "{seeds} 个种子在中央测试集上的均值 ± 标准差；"
        "最后一列是配对差及其在种子上的 95 % 区间。{machine}，提交 `{commit}`，"
        "按早先的规则测得：所有方法同一个学习率，每个种子重抽测试图像。",
    },
}


def adapter_tables(results: Path, language: str) -> dict[str, str]:
    """The page's tables by their mark; none without a result."""
    file = results / "adapters.json"
    if not file.exists():
        return {}
    result = json.loads(file.read_text("utf-8"))
    words = WORDS[language]
    return {"tasks": _tasks(result, words), "matrix": _matrix(result, words)}


def caption_tables(results: Path) -> dict[str, str]:
    """The table of the page on captions by its mark; none without a result."""
    file = results / "adapters.json"
    if not file.exists():
        return {}
    result = json.loads(file.read_text("utf-8"))
    found = result["details"]["captions"]
    rows = [
        [
            words,
            f"{found[f'{kind}recall_at_1_zero_shot']:.3f}",
            f"{found[f'{kind}recall_at_1_trained']:.3f}",
        ]
        for words, kind in (
            ("a pictogram of a heart", "image_to_text_"),
            ("an icon of a heart", "familiar_"),
        )
    ]
    about = (
        "Image-to-text recall@1 on the held-out families, mean of 3 seeds, whose spread was not "
        f"kept; commit `{result['commit'][:8]}`; `{result['details']['command']}`."
    )
    table = markdown_table(["captions such as", "zero-shot", "trained"], rows)
    return {"captions": f"{table}\n\n{about}"}


def _tasks(result: Mapping[str, Any], words: Mapping[str, str]) -> str:
    details = result["details"]["tasks"]
    rows = details["accuracy"]
    tasks = list(rows["separate"])
    body = []
    for arm, row in rows.items():
        if arm.startswith("merged:") and arm != "merged: searched":
            continue  # weights were searched for one method only: the others are no comparison
        cells = [f"{row[task]['mean']:.3f} ± {row[task]['sd']:.3f}" for task in tasks]
        apart = [
            fmean(seed["accuracy"][arm][t] - seed["accuracy"]["separate"][t] for t in tasks)
            for seed in details["by_seed"]
        ]
        minus = "" if arm == "separate" else spread(as_dict(interval(apart)), sign=True)
        body.append([arm, *cells, minus])
    about = words["about"].format(
        seeds=len(details["by_seed"]),
        machine=result["machine"]["processor"],
        commit=result["commit"][:8],
    )
    return f"{markdown_table([words['arm'], *tasks, words['minus']], body)}\n\n{about}"


def as_dict(found: Interval) -> dict[str, float | None]:
    """An interval as the tables take it."""
    return {"mean": found.mean, "ci95": found.half, "low": found.low, "high": found.high}


def _matrix(result: Mapping[str, Any], words: Mapping[str, str]) -> str:
    matrix = result["details"]["tasks"]["by_seed"][0]["matrix"]["per_task"]
    tasks = list(result["details"]["tasks"]["accuracy"]["separate"])
    body = [[name, *(f"{row[task]:.3f}" for task in tasks)] for name, row in matrix.items()]
    return markdown_table([words["adapter"], *tasks], body)
