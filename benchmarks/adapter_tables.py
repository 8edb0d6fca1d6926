"""The tables of the page on several tasks, from the result file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown_table

ADAPTER_PAGES = {
    "docs/how-to-several-tasks.md": "en",
    "docs/how-to-several-tasks.zh-CN.md": "zh",
}
CAPTION_PAGE = "docs/how-to-captions.md"
WORDS = {
    "en": {
        "arm": "arm",
        "adapter": "adapter",
        "lost": "lost at most",
        "about": "Mean ± standard deviation of {seeds} seeds on the central test sets; the last "
        "column has the points lost by the worst task, mean over seeds; in bold the merge with "
        "the best validation accuracy. {machine}, commit `{commit}`.",
    },
    "zh": {
        "arm": "方式",
        "adapter": "适配器",
        "lost": "最多损失",
        "about": "{seeds} 个种子在中心测试集上的均值 ± 标准差；"
        "最后一列是损失最大的任务平均损失的百分点；粗体是验证准确率最高的合并。"
        "{machine}，提交 `{commit}`。",
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
        "Image-to-text recall@1 on the held-out families, mean of 3 seeds; commit "
        f"`{result['commit'][:8]}`; `{result['details']['command']}`."
    )
    table = markdown_table(["captions such as", "zero-shot", "trained"], rows)
    return {"captions": f"{table}\n\n{about}"}


def _tasks(result: Mapping[str, Any], words: Mapping[str, str]) -> str:
    details = result["details"]["tasks"]
    rows = details["accuracy"]
    tasks = list(rows["separate"])
    body = []
    for arm, row in rows.items():
        gap = max(details["gaps"][arm].values()) if arm != "separate" else None
        name = f"**{arm}**" if arm == details["best_merge"] else arm
        cells = [f"{row[task]['mean']:.3f} ± {row[task]['sd']:.3f}" for task in tasks]
        body.append([name, *cells, "" if gap is None else f"{100 * gap:+.1f}"])
    about = words["about"].format(
        seeds=len(details["by_seed"]),
        machine=result["machine"]["processor"],
        commit=result["commit"][:8],
    )
    return f"{markdown_table([words['arm'], *tasks, words['lost']], body)}\n\n{about}"


def _matrix(result: Mapping[str, Any], words: Mapping[str, str]) -> str:
    matrix = result["details"]["tasks"]["by_seed"][0]["matrix"]["per_task"]
    tasks = list(result["details"]["tasks"]["accuracy"]["separate"])
    body = [[name, *(f"{row[task]:.3f}" for task in tasks)] for name, row in matrix.items()]
    return markdown_table([words["adapter"], *tasks], body)
