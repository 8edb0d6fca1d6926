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
from benchmarks.lora_tables import LORA_PAGES, lora_tables, percent, seeds_of
from benchmarks.machine_tables import MACHINE_PAGES, machine_tables
from benchmarks.markdown import markdown_table
from benchmarks.speed_tables import SPEED_PAGES, speed_tables
from benchmarks.trust_tables import PRIVACY_PAGES, ROBUST_PAGE, privacy_tables, robust_tables
from fedclip.reports.comparison import spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADINGS = {
    "README.md": (
        "data set",
        "zero-shot",
        "LoRA r=8",
        "full fine-tuning",
        "LoRA of full, 95 % interval",
        "sent per client and round: LoRA / full",
        "Accuracy on one test set, means of {seeds} seeds with 95 % intervals, commit `{commit}`; "
        "`{command}`.",
    ),
    "README.zh-CN.md": (
        "数据集",
        "零样本",
        "LoRA r=8",
        "全参数微调",
        "LoRA 占全参数，95 % 区间",
        "每客户端每轮发送：LoRA / 全参数",
        "同一测试集上的准确率，{seeds} 个种子的均值与 95 % 区间，提交 `{commit}`；`{command}`。",
    ),
}


def readme_table(result: dict[str, Any], headings: tuple[str, ...]) -> str:
    """LoRA of rank 8 beside full fine-tuning, from the guide's comparison."""
    *columns, caption = headings
    rows = []
    for data, grid in result["details"]["grids"].items():
        lora, full = grid["arms"]["r8"], grid["arms"]["full"]
        sent = [f"{arm['bytes_up_per_client_round'] / 1e6:.2f} MB" for arm in (lora, full)]
        accuracy = [spread(arm["accuracy"]) for arm in (lora, full)]
        share = percent(lora["minus"]["full"]["ratio"])
        zero_shot = f"{full['zero_shot_accuracy']['mean']:.3f}"
        rows.append([data, zero_shot, *accuracy, share, " / ".join(sent)])
    about = caption.format(
        seeds=seeds_of(result),
        commit=result["commit"][:8],
        command=result["details"]["command"],
    )
    return f"{markdown_table(columns, rows)}\n\n{about}"


def main(arguments: list[str]) -> int:
    """Writes or checks the tables; the exit code says whether they were current."""
    guide = json.loads((RESULTS / "guide.json").read_text(encoding="utf-8"))
    pages = {name: {"results": readme_table(guide, words)} for name, words in HEADINGS.items()}
    for tables, of_page in (
        (speed_tables, SPEED_PAGES),
        (lora_tables, LORA_PAGES),
        (holds_tables, HOLDS_PAGES),
        (adapter_tables, ADAPTER_PAGES),
        (machine_tables, MACHINE_PAGES),
        (privacy_tables, PRIVACY_PAGES),
    ):
        pages |= {name: tables(RESULTS, language) for name, language in of_page.items()}
    pages[CAPTION_PAGE] = caption_tables(RESULTS)
    pages[ROBUST_PAGE] = robust_tables(RESULTS)
    stale = []
    for name, marked in pages.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = text
        for mark, body in marked.items():
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
