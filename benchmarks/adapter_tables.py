"""The tables of the page on several tasks, from the result file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ADAPTER_PAGES = ("docs/how-to-several-tasks.md",)


def adapter_tables(results: Path) -> dict[str, str]:
    """The page's tables by their mark; none without a result."""
    file = results / "adapters.json"
    if not file.exists():
        return {}
    result = json.loads(file.read_text("utf-8"))
    return {"tasks": _tasks(result), "matrix": _matrix(result)}


def _tasks(result: Mapping[str, Any]) -> str:
    details = result["details"]["tasks"]
    rows = details["accuracy"]
    tasks = list(rows["separate"])
    body = []
    for arm, row in rows.items():
        gap = max(details["gaps"][arm].values()) if arm != "separate" else None
        name = f"**{arm}**" if arm == details["best_merge"] else arm
        cells = [f"{row[task]['mean']:.3f} ± {row[task]['sd']:.3f}" for task in tasks]
        body.append([name, *cells, "" if gap is None else f"{100 * gap:+.1f}"])
    seeds, machine = len(details["by_seed"]), result["machine"]["processor"]
    about = (
        f"Mean ± standard deviation of {seeds} seeds on the central test sets; the last column has "
        "the points lost by the worst task, mean over seeds; in bold the merge with the best "
        f"validation accuracy. {machine}, commit `{result['commit'][:8]}`."
    )
    return f"{_table(['arm', *tasks, 'lost at most'], body)}\n\n{about}"


def _matrix(result: Mapping[str, Any]) -> str:
    matrix = result["details"]["tasks"]["by_seed"][0]["matrix"]["per_task"]
    tasks = list(result["details"]["tasks"]["accuracy"]["separate"])
    body = [[name, *(f"{row[task]:.3f}" for task in tasks)] for name, row in matrix.items()]
    return _table(["adapter", *tasks], body)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heading)} |", "|---|" + "---:|" * (len(heading) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
