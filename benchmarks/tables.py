"""Writes the tables of the pages from the result files, so that no figure is typed by hand.

python benchmarks/tables.py            writes them
python benchmarks/tables.py --check    fails when they are not current
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.adapter_tables import ADAPTER_PAGES, CAPTION_PAGE, adapter_tables, caption_tables
from benchmarks.holds_tables import HOLDS_PAGES, holds_tables
from benchmarks.lora_tables import LORA_PAGES, lora_tables
from benchmarks.machine_tables import MACHINE_PAGES, machine_tables
from benchmarks.speed_tables import SPEED_PAGES, speed_tables

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "main_job.json"
DATA = ("digits", "fashion_mnist", "icons")
HEADINGS = {
    "README.md": (
        "data set",
        "zero-shot",
        "LoRA",
        "full fine-tuning",
        "LoRA from random weights",
        "sent per client and round: LoRA / full",
        "Accuracy on the central test set: mean ± standard deviation of {seeds} seeds, on "
        "{processor}, {cores} cores, commit `{commit}`. The quickstart took {seconds:.0f} s.",
    ),
    "README.zh-CN.md": (
        "数据集",
        "零样本",
        "LoRA",
        "全参数微调",
        "随机权重上的 LoRA",
        "每客户端每轮发送：LoRA / 全参数",
        "中心测试集上的准确率：{seeds} 个种子的均值 ± 标准差；{processor}，{cores} 核，"
        "提交 `{commit}`。快速上手用时 {seconds:.0f} 秒。",
    ),
}


def table(result: dict[str, Any], headings: tuple[str, ...]) -> str:
    """The main job's table in Markdown, with a line about where it was measured."""
    figures, cells = result["figures"], result["details"]["cells"]
    *columns, caption = headings
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for data in DATA:
        arms = [
            f"{figures[f'accuracy_{data}_{arm}']:.3f} ± "
            f"{cells[f'{data}_{arm}']['standard_deviation']:.3f}"
            for arm in ("lora", "full", "random")
        ]
        lora, full = (
            f"{cells[f'{data}_{arm}']['bytes_up_per_client_round'] / 1e6:.2f} MB"
            for arm in ("lora", "full")
        )
        zero_shot = f"{figures[f'zero_shot_{data}']:.3f}"
        lines.append(f"| {data} | {zero_shot} | {' | '.join(arms)} | {lora} / {full} |")
    about = caption.format(
        seeds=len(result["details"]["seeds"]),
        processor=result["machine"]["processor"],
        cores=result["machine"]["cores"],
        commit=result["commit"][:8],
        seconds=figures["quickstart_seconds"],
    )
    return "\n".join([*lines, "", about])


def main(arguments: list[str]) -> int:
    """Writes or checks the tables; the exit code says whether they were current."""
    if not RESULT.exists():
        print(f"{RESULT.name} is missing; run python benchmarks/main_job.py", file=sys.stderr)
        return 1
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    pages = {name: {"main-job": table(result, words)} for name, words in HEADINGS.items()}
    pages |= {name: speed_tables(RESULT.parent, language) for name, language in SPEED_PAGES.items()}
    pages |= {name: lora_tables(RESULT.parent, language) for name, language in LORA_PAGES.items()}
    pages |= {
        name: adapter_tables(RESULT.parent, language) for name, language in ADAPTER_PAGES.items()
    }
    pages |= {
        name: machine_tables(RESULT.parent, language) for name, language in MACHINE_PAGES.items()
    }
    pages |= {name: holds_tables(RESULT.parent, language) for name, language in HOLDS_PAGES.items()}
    pages[CAPTION_PAGE] = caption_tables(RESULT.parent)
    stale = []
    for name, tables in pages.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = text
        for mark, body in tables.items():
            start, end = f"<!-- {mark}-table -->", f"<!-- /{mark}-table -->"
            before, rest = wanted.split(start)
            _, after = rest.split(end)
            wanted = f"{before}{start}\n{body}\n{end}{after}"
        if text != wanted:
            stale.append(name)
            if "--check" not in arguments:
                path.write_text(wanted, encoding="utf-8")
    if "--check" in arguments and stale:
        print(f"not current: {', '.join(stale)}; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
