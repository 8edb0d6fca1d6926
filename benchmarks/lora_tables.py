"""The tables of the page on strategies, in English and Chinese, from the result files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown_table

LORA_PAGES = {
    "docs/explanation-strategies.md": "en",
    "docs/explanation-strategies.zh-CN.md": "zh",
}
DATA = ("digits", "fashion_mnist", "icons")
WORDS = {
    "en": {
        "guide": (
            "data set",
            "arm",
            "accuracy",
            "of full",
            "trained",
            "peak memory",
            "processor seconds",
            "rounds to 95 %",
            "processor seconds to 95 %",
        ),
        "strategies": (
            "algorithm",
            "accuracy",
            "over zero-shot",
            "minus FedIT",
            "minus centralised",
            "up, MB",
            "down, MB",
            "seconds",
            "digits, clothing",
        ),
        "ranks": ("arm", "accuracy", "minus reference", "whole run, MB"),
        "full": "full fine-tuning",
        "about": "Means of {seeds} seeds, ± half of the 95 % confidence interval; {processor}, "
        "{cores} cores, two runs at a time; commit `{commit}`; `{command}`.",
        "b32": "Of ViT-B/32's {base:,} parameters, r=8 on q, k, v and out of both towers trains "
        "{r8:.2%}, r=16 {r16:.2%} ({r16_of_all:.2%} of all, its own included).",
        "edge": "`!`: the best rate was the last of the list.",
    },
    "zh": {
        "guide": (
            "数据集",
            "方法",
            "准确率",
            "占全参数",
            "训练参数",
            "峰值内存",
            "处理器秒数",
            "到 95 % 的轮数",
            "到 95 % 的处理器秒数",
        ),
        "strategies": (
            "算法",
            "准确率",
            "高于零样本",
            "减 FedIT",
            "减集中式",
            "上行 MB",
            "下行 MB",
            "秒",
            "digits、服装",
        ),
        "ranks": ("方法", "准确率", "减参照", "整个运行 MB"),
        "full": "全参数微调",
        "about": "{seeds} 个种子的均值，± 为 95 % 置信区间的一半；{processor}，{cores} 核，"
        "同时两个运行；提交 `{commit}`；`{command}`。",
        "b32": "在 ViT-B/32 的 {base:,} 个参数中，两个塔的 q、k、v、out 上 r=8 训练 {r8:.2%}，"
        "r=16 训练 {r16:.2%}。",
        "edge": "`!`：最佳学习率位于列表的末端。",
    },
}


def lora_tables(results: Path, language: str) -> dict[str, str]:
    """The page's tables by their mark, of the benchmarks that have a result."""
    makers = {
        "guide": _guide,
        "strategies": _strategies,
        "ranks": _ranks,
        "ranks_projection": _projection,
    }
    files = {name: results / f"{name}.json" for name in makers}
    return {
        name: makers[name](json.loads(file.read_text("utf-8")), WORDS[language])
        for name, file in files.items()
        if file.exists()
    }


def _guide(result: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    rows = []
    for data in DATA:
        arms = result["details"]["grids"][data]["arms"]
        full = arms["full"]["accuracy"]["mean"]
        for arm in ("full", "r4", "r8", "r16"):
            row = arms[arm]
            # Processor time: unlike the clock, it does not depend on what else ran beside.
            to_95 = row["seconds_to_95"] / row["seconds"] * row["cpu_seconds"]
            rows.append(
                [
                    data,
                    words["full"] if arm == "full" else f"LoRA r={arm[1:]}",
                    _interval(row["accuracy"]),
                    f"{row['accuracy']['mean'] / full:.1%}",
                    f"{row['trainable_parameters']:,.0f}",
                    f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
                    f"{row['cpu_seconds']:.0f}",
                    _number(row["rounds_to_95"], 1),
                    _number(to_95, 0),
                ]
            )
    figures = result["figures"]
    b32 = words["b32"].format(
        base=151_277_313,
        r8=figures["b32_trainable_share_r8"],
        r16=figures["b32_trainable_share_r16"],
        r16_of_all=1 / (1 + 1 / figures["b32_trainable_share_r16"]),
    )
    grid = result["details"]["grids"]["digits"]
    return f"{markdown_table(words['guide'], rows)}\n\n{_about(result, grid, words)} {b32}"


def _strategies(result: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    grid = result["details"]["grid"]
    rows = []
    for arm, row in grid["arms"].items():
        edge = " `!`" if row["learning_rate_edge"] else ""
        other = [_signed(row.get(f"forgetting_{data}")) for data in ("digits", "fashion_mnist")]
        rows.append(
            [
                f"{arm}{edge}",
                _interval(row["accuracy"]),
                _signed(row["gain"]["mean"]),
                _difference(row["minus"].get("fedit")),
                _difference(row["minus"].get("centralised")),
                _number(row["bytes_up_per_client_round"] / 1e6, 2),
                _number(row["bytes_down_per_client_round"] / 1e6, 2),
                f"{row['seconds']:.0f}",
                ", ".join(other),
            ]
        )
    edge = words["edge"]
    return f"{markdown_table(words['strategies'], rows)}\n\n{_about(result, grid, words)} {edge}"


def _ranks(result: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    parts = []
    for name in ("mixed", "mixed_icons", "mixed_fashion_mnist", "dynamic"):
        if name not in result["details"]:
            continue
        parts.append(_ranks_of(result, result["details"][name], words))
    return "\n\n".join(parts)


def _projection(result: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    return _ranks_of(result, result["details"]["grid"], words)


def _ranks_of(result: Mapping[str, Any], grid: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    (reference,) = grid["grid"]["reference"]
    rows = [
        [
            arm,
            _interval(row["accuracy"]),
            _difference(row["minus"].get(reference)),
            _number(row["bytes_total"] / 1e6, 1),
        ]
        for arm, row in grid["arms"].items()
    ]
    return f"{markdown_table(words['ranks'], rows)}\n\n{_about(result, grid, words)}"


def _about(result: Mapping[str, Any], grid: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    about: str = words["about"].format(
        seeds=len(grid["grid"]["seeds"]),
        processor=result["machine"]["processor"],
        cores=result["machine"]["cores"],
        commit=(result["commit"] or "")[:8],
        command=result["details"]["command"],
    )
    return about


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} ± {value['ci95']:.3f}"


def _difference(value: Mapping[str, float] | None) -> str:
    return f"{value['mean']:+.3f} ± {value['ci95']:.3f}" if value else "–"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
