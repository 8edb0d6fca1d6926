"""The table of the page on several machines, from the result file."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.markdown import markdown_table

MACHINE_PAGES = {"docs/how-to-machines.md": "en", "docs/how-to-machines.zh-CN.md": "zh"}
WORDS = {
    "en": {
        "what": "what",
        "measured": "measured",
        "equal": "largest relative difference from the sequential engine's adapter",
        "floor": "a round of Flower's own with an empty model, seconds",
        "resident": "a round of fedclip's, training and evaluation apart: seconds above that",
        "anew": "the same with `resident: false`",
        "up": "bytes of a site's messages in a round, up: sent / foreseen by `fedclip info`",
        "down": "the same, down",
        "socket": "bytes at the site's socket in a round, up / down: with TLS, HTTP and Flower",
        "int8": "`deploy.up: int8`: how many times fewer bytes up, embedded model / ViT-B/32",
        "accuracy": "accuracy on digits, three seeds: fp32 / int8",
        "about": "Medians of {rounds} rounds, three sites on one machine with TLS and keys; "
        "{processor}, {cores} cores, commit `{commit}`; `python benchmarks/machines.py`. Sites "
        "share the cores here, so seconds are for comparison only.",
    },
    "zh": {
        "what": "项目",
        "measured": "测量值",
        "equal": "与顺序引擎的适配器相比的最大相对差异",
        "floor": "Flower 自身（空模型）一轮的秒数",
        "resident": "fedclip 一轮（不计训练与评估）比它多用的秒数",
        "anew": "同上，`resident: false`",
        "up": "一个站点每轮消息的上行字节：实际 / `fedclip info` 的预测",
        "down": "同上，下行",
        "socket": "站点套接字上每轮的字节，上行 / 下行：含 TLS、HTTP 和 Flower",
        "int8": "`deploy.up: int8`：上行字节减少的倍数，内置模型 / ViT-B/32",
        "accuracy": "digits 上的准确率，三个种子：fp32 / int8",
        "about": "{rounds} 轮的中位数，三个站点在同一台机器上，启用 TLS 和密钥；{processor}，"
        "{cores} 核，提交 `{commit}`；`python benchmarks/machines.py`。"
        "各站点共用处理器核心，秒数仅供比较。",
    },
}


def machine_tables(results: Path, language: str) -> dict[str, str]:
    """The page's table by its mark; none without a result."""
    file = results / "machines.json"
    if not file.exists():
        return {}
    result = json.loads(file.read_text("utf-8"))
    words, details = WORDS[language], result["details"]
    above, size = details["over_floor_seconds"], details["bytes_per_site_and_round"]
    tiny, large = details["int8_ratios"].values()
    accuracy = {form: mean(found) for form, found in details["accuracy"].items()}
    values = {
        "equal": f"{result['figures']['flower_equals_sequential']:.1g}",
        "floor": f"{median(details['resident']['floor_seconds']):.1f}",
        "resident": f"{above['resident']:+.1f}",
        "anew": f"{above['anew_for_each_message']:+.1f}",
        "up": f"{size['up']:,.0f} / {size['up_foreseen']:,.0f}",
        "down": f"{size['down']:,.0f} / {size['down_foreseen']:,.0f}",
        "socket": f"{size['socket_up']:,.0f} / {size['socket_down']:,.0f}",
        "int8": f"{tiny:.2f} / {large:.2f}",
        "accuracy": f"{accuracy['fp32']:.3f} / {accuracy['int8']:.3f}",
    }
    about = words["about"].format(**_where(result))
    rows = [[words[key], value] for key, value in values.items()]
    return {"machines": f"{markdown_table([words['what'], words['measured']], rows)}\n\n{about}"}


def _where(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "rounds": result["details"]["rounds"],
        "processor": result["machine"]["processor"],
        "cores": result["machine"]["cores"],
        "commit": result["commit"][:8],
    }
