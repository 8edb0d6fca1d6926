"""The tables of the page on speed, in English and Chinese, from the result files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SPEED_PAGES = {"docs/explanation-speed.md": "en", "docs/explanation-speed.zh-CN.md": "zh"}

PROGRAMS = {
    "fedclip": ("fedclip", "fedclip"),
    "serial": ("a serial loop over PEFT", "PEFT 串行循环"),
    "flower": (
        "Flower, a model built for each message, as in its examples",
        "Flower，如其示例为每条消息建模型",
    ),
    "flower cached": ("Flower, the model kept in the actor", "Flower，模型留在 actor 中"),
    "pfl": ("pfl-research", "pfl-research"),
    "nvflare": ("NVFlare's simulator", "NVFlare 模拟器"),
}

# figure: (file, at least or at most, goal, what it is, in Chinese)
GOALS: dict[str, tuple[str, str, float, str, str]] = {
    "round_vs_flower": ("peers", ">=", 4, "round: Flower", "一轮：Flower"),
    "job_vs_flower": ("peers", ">=", 2.6, "whole job: Flower", "整个任务：Flower"),
    "round_vs_serial_peft": ("peers", ">=", 2, "round: serial PEFT", "一轮：PEFT 串行"),
    "small_batches_vs_serial_peft": (
        "peers",
        ">=",
        4,
        "round of small batches: serial PEFT",
        "小批量一轮：PEFT 串行",
    ),
    "round_vs_pfl": ("peers", ">=", 1, "round: pfl-research", "一轮：pfl-research"),
    "b32_vs_recipe": (
        "floor",
        ">=",
        1.3,
        "ViT-B/32 step: PEFT, prompts of 77 tokens",
        "ViT-B/32 一步：PEFT，77 词元提示",
    ),
    "b32_small_batches_vs_serial_peft": (
        "floor",
        ">=",
        1.4,
        "ViT-B/32, 8 clients x 4 images: serial PEFT",
        "ViT-B/32，8 客户端 x 4 图：PEFT 串行",
    ),
    "b32_step_over_floor": (
        "floor",
        "<=",
        1.5,
        "ViT-B/32 step over its FLOP floor",
        "ViT-B/32 一步与其 FLOP 下限之比",
    ),
    "product_rate_over_matmul": (
        "floor",
        ">=",
        1,
        "rate of a frozen matrix's product over `torch.matmul`'s",
        "冻结矩阵乘积与 `torch.matmul` 的速率之比",
    ),
    "prefix_cache_speedup": (
        "prefix",
        ">=",
        1.8,
        "last 4 of 12 layers: prefix computed each time",
        "最后 4 层：每次重算前缀",
    ),
    "prefix_cache_speedup_last2": (
        "prefix",
        ">=",
        2.8,
        "last 2 of 12 layers: prefix computed each time",
        "最后 2 层：每次重算前缀",
    ),
    "overhead_share_100_clients": (
        "scale",
        "<=",
        0.05,
        "share of a round of 100 clients outside local training",
        "100 客户端一轮中本地训练之外的份额",
    ),
    "time_per_client_1000_over_100": (
        "scale",
        "<=",
        1.1,
        "time per client, 1,000 over 100 a round",
        "每客户端用时，一轮 1000 与 100 之比",
    ),
    "memory_10000_over_100_registered": (
        "memory",
        "<=",
        1.05,
        "peak memory, 10,000 over 100 registered",
        "峰值内存，登记 10000 与 100 之比",
    ),
    "lora_step_over_full": (
        "memory",
        "<=",
        0.65,
        "LoRA step over full fine-tuning",
        "LoRA 一步与全参数之比",
    ),
    "lora_memory_over_full": (
        "memory",
        "<=",
        0.75,
        "LoRA peak memory over full fine-tuning",
        "LoRA 峰值内存与全参数之比",
    ),
    "lora_checkpointed_memory_over_full": (
        "memory",
        "<=",
        0.45,
        "the same with gradient checkpointing",
        "同上，梯度检查点",
    ),
    "lora_bytes_over_full": (
        "memory",
        "<=",
        1 / 150,
        "bytes a round over full fine-tuning",
        "每轮字节与全参数之比",
    ),
}
SECOND = "_zen4"  # a second machine's files, measured with `BENCHMARK_SUFFIX=_zen4`
# What is measured on a GPU alone, beside the goals' figures: what it is, in Chinese
GPU_FILES = ("floor", "prefix", "scale", "memory")
GPU_ALONE = {
    "b32_8x32_vs_serial_peft": (
        "ViT-B/32, 8 clients x 32 images: serial PEFT",
        "ViT-B/32，8 客户端 x 32 图：PEFT 串行",
    ),
}
# What is asked of training steps as CUDA graphs, as GOALS.
GRAPH_GOALS: dict[str, tuple[str, str, float, str, str]] = {
    "b32_8x32_step_over_floor": (
        "graphs",
        "<=",
        2,
        "ViT-B/32, 8 clients x 32 images: step over its floor",
        "ViT-B/32，8 客户端 x 32 图：一步与下限之比",
    ),
    "b32_8x32_vs_serial_peft": (
        "graphs",
        ">=",
        25,
        "the same: serial PEFT",
        "同上：PEFT 串行",
    ),
    "b32_8x4_vs_serial_peft": (
        "graphs",
        ">=",
        25,
        "ViT-B/32, 8 clients x 4 images: serial PEFT",
        "ViT-B/32，8 客户端 x 4 图：PEFT 串行",
    ),
    "b32_1x32_step_over_floor": (
        "graphs",
        "<=",
        4,
        "ViT-B/32, one client, 32 images: step over its floor",
        "ViT-B/32，单客户端，32 图：一步与下限之比",
    ),
    "b32_1x32_vs_recipe": (
        "graphs",
        ">=",
        10,
        "the same: PEFT, prompts of 77 tokens",
        "同上：PEFT，77 词元提示",
    ),
    "b16_8x32_step_over_floor": (
        "graphs",
        "<=",
        1.7,
        "ViT-B/16, 8 clients x 32 images: step over its floor",
        "ViT-B/16，8 客户端 x 32 图：一步与下限之比",
    ),
    "b32_8x32_memory_over_eager": (
        "graphs",
        "<=",
        1.15,
        "ViT-B/32, 8 x 32: peak memory, graphs over none",
        "ViT-B/32，8 x 32：峰值内存，有图与无图之比",
    ),
    "b32_8x32_capture_seconds": (
        "graphs",
        "<=",
        10,
        "the same: seconds of capture",
        "同上：捕获用时（秒）",
    ),
    "update_difference": (
        "graphs",
        "<=",
        0.01,
        "largest distance of an update from that without graphs, relative",
        "与无图更新的最大相对差",
    ),
    "time_per_client_1000_over_100": (
        "graphs",
        "<=",
        1.1,
        "time per client, 1,000 over 100 a round",
        "每客户端用时，一轮 1000 与 100 之比",
    ),
    "overhead_share_100_clients": (
        "scale",
        "<=",
        0.05,
        "share of a round of 100 clients outside local training",
        "100 客户端一轮中本地训练之外的份额",
    ),
}
WORDS = {
    "en": {
        "program": "program",
        "columns": ("10 x 2 x 32: round", "whole job", "32 x 2 x 8: round", "whole job"),
        "goal": ("what", "reached", "goal", "held", "`figure`, file"),
        "yes": "yes",
        "no": "**no**",
        "about": "Medians, on {processor}, {cores} cores, {threads} threads; commit `{commit}`.",
        "gpu": ("what", "on the GPU", "`figure`, file"),
        "about_gpu": "{precision}, on {gpu}, torch {torch}; commit {commit}.",
    },
    "zh": {
        "program": "程序",
        "columns": ("10 x 2 x 32：一轮", "整个任务", "32 x 2 x 8：一轮", "整个任务"),
        "goal": ("内容", "达到", "目标", "满足", "`指标`，文件"),
        "yes": "是",
        "no": "**否**",
        "about": "中位数；{processor}，{cores} 核，{threads} 线程；提交 `{commit}`。",
        "gpu": ("内容", "GPU 上", "`指标`，文件"),
        "about_gpu": "{precision}；{gpu}，torch {torch}；提交 {commit}。",
    },
}


def speed_tables(results: Path, language: str) -> dict[str, str]:
    """The page's tables by their mark."""

    def read(names: Iterable[str], suffix: str = "") -> dict[str, Any]:
        return {n: json.loads((results / f"{n}{suffix}.json").read_text("utf-8")) for n in names}

    files = {name for name, *_ in GOALS.values()}
    found = read(files)
    return {
        "peers": _peers(found["peers"], language),
        "goals": _goals(found, language),
        "second": _goals(read(files, SECOND), language, SECOND),
        "graphs": _goals(read(("graphs", "scale"), "_gpu"), language, "_gpu", GRAPH_GOALS),
        "gpu": _gpu(read(GPU_FILES, "_gpu"), language),
    }


def _peers(result: dict[str, Any], language: str) -> str:
    words: dict[str, Any] = WORDS[language]
    columns = [words["program"], *words["columns"]]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    shapes = result["details"]["programs"]
    for name, titles in PROGRAMS.items():
        cells = []
        for programs in shapes.values():
            facts = programs.get(name)
            for what, digits in (("round_seconds", 2), ("job_seconds", 1)):
                cells.append(f"{facts[what]:.{digits}f} s" if facts else "–")
        lines.append(f"| {titles[language == 'zh']} | {' | '.join(cells)} |")
    about = words["about"].format(
        processor=result["machine"]["processor"],
        cores=result["machine"]["cores"],
        threads=result["details"]["threads"],
        commit=result["commit"][:8],
    )
    return "\n".join([*lines, "", about])


def _gpu(found: dict[str, Any], language: str) -> str:
    words: dict[str, Any] = WORDS[language]
    titles = {figure: goal[3:] for figure, goal in GOALS.items()} | GPU_ALONE
    lines = [f"| {' | '.join(words['gpu'])} |", "|---|---:|---|"]
    for file, result in found.items():
        for figure, value in result["figures"].items():
            if figure.removesuffix("_gpu") not in titles:
                continue  # measured once, of what is no longer there
            title = titles[figure.removesuffix("_gpu")][language == "zh"]
            digits = 4 if value < 0.01 else 2
            lines.append(f"| {title} | {value:.{digits}f} | `{figure}`, `{file}_gpu.json` |")
    facts = {
        (r["details"]["precision"], r["machine"]["gpu"], r["versions"]["torch"])
        for r in found.values()
    }
    ((precision, gpu, torch),) = facts  # measured alike
    by_commit: dict[str, list[str]] = {}
    for file, result in found.items():
        by_commit.setdefault(result["commit"][:8], []).append(f"`{file}`")
    commit = ", ".join(f"`{c}` ({', '.join(files)})" for c, files in by_commit.items())
    about = words["about_gpu"].format(precision=precision, gpu=gpu, torch=torch, commit=commit)
    return "\n".join([*lines, "", about])


def _goals(
    found: dict[str, Any], language: str, suffix: str = "", goals: dict[str, Any] = GOALS
) -> str:
    words: dict[str, Any] = WORDS[language]
    lines = [f"| {' | '.join(words['goal'])} |", "|---|---:|---:|---|---|"]
    for figure, (file, sense, goal, *titles) in goals.items():
        value = found[file]["figures"][figure + suffix]
        held = value >= goal if sense == ">=" else value <= goal
        digits = 4 if goal < 0.01 else 2
        sign = "≥" if sense == ">=" else "≤"
        cells = [
            titles[language == "zh"],
            f"{value:.{digits}f}",
            f"{sign} {goal:.{digits}f}",
            words["yes" if held else "no"],
            f"`{figure}{suffix}`, `{file}{suffix}.json`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
