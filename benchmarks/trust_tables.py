"""The tables of the pages on robust rules and on what privacy costs, from the result files."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.markdown import markdown_table
from fedclip.catalog import own_rows

ROBUST_PAGE = "docs/explanation-robust.md"
PRIVACY_PAGES = {"docs/how-to-privacy.md": "en", "docs/how-to-privacy.zh-CN.md": "zh"}
ATTACKS = {
    "none": "none",
    "label flip": "labels flipped",
    "sign flip x5": "sign x -5",
    "gaussian x10": "noise x 10",
    "alie 1.5": "ALIE 1.5",
    "min-max std": "min-max, deviations",
    "min-max": "min-max, mean",
    "min-max sign": "min-max, signs",
    "ipm 0.5": "IPM 0.5",
}
DIVISIONS = {"dirichlet 0.3": "Dirichlet 0.3", "iid": "IID"}
ORDER = (
    *("mean", "multi_krum", "mixing + trimmed_mean", "krum"),
    *("median", "trimmed_mean", "rfa", "norm_clipping"),
)
RULES = {"mean": "mean by examples", "mixing + trimmed_mean": "mixing, `trimmed_mean`"}
SETS = {"accuracy": "digits", "fashion_mnist": "fashion_mnist", "icons": "icons"}
"""Data sets by the first part of a cell's name."""
WORDS = {
    "en": (
        "data set",
        "no privacy",
        "Means of the runs in brackets, commit `{commit}`; `python -m benchmarks.privacy`.",
    ),
    "zh": (
        "数据集",
        "无隐私",
        "括号内为运行次数，取均值；提交 `{commit}`；`python -m benchmarks.privacy`。",
    ),
}


def robust_tables(results: Path) -> dict[str, str]:
    """Accuracy under attacks by rule, a table for each division; a star where seeds are fewer."""
    result = json.loads((results / "participants.json").read_text("utf-8"))
    details = result["details"]
    tables = []
    for division, heading in DIVISIONS.items():
        accuracy, runs = (details[key][division] for key in ("accuracy", "runs"))
        rows = [
            [RULES.get(rule, f"`{rule}`"), *(_cell(row, runs[rule], details, a) for a in ATTACKS)]
            for rule, row in sorted(accuracy.items(), key=lambda item: ORDER.index(item[0]))
        ]
        tables.append(markdown_table([heading, *ATTACKS.values()], rows))
    commit = details.get("cells_commit", result["commit"])[:8]
    about = f"Commit `{commit}`; `python -m benchmarks.participants`."
    return {"attacks": "\n\n".join([*tables, about]), "attacks-full": _all_layers(results)}


def _all_layers(results: Path) -> str:
    """Accuracy of one seed with adapters in all layers, and how often the backdoor opens."""
    result = json.loads((results / "attacks.json").read_text("utf-8"))
    arms = {tuple(name.split(".name-")): arm for name, arm in result["details"]["arms"].items()}
    attacks = list(dict.fromkeys(attack for _, attack in sorted(arms)))
    attacks.sort(key=["none", *own_rows("attacks")].index)
    rows = [
        [RULES.get(rule, f"`{rule}`")]
        + [f"{arms[rule, attack]['accuracy']['mean']:.3f}" for attack in attacks]
        + [f"{arms[rule, 'backdoor']['backdoor_success']:.2f}"]
        for rule in sorted({rule for rule, _ in arms}, key=ORDER.index)
    ]
    heading = ["all layers, Dirichlet 0.3", *(a.replace("_", " ") for a in attacks), "opened"]
    table = markdown_table(heading, rows)
    return (
        f"{table}\n\nCommit `{result['commit'][:8]}`; `{result['details']['command']} --seeds 0`."
    )


def _cell(row: dict[str, float], runs: dict[str, int], details: Any, attack: str) -> str:
    if attack not in row:
        return "-"
    return f"{row[attack]:.3f}" + ("" if runs[attack] == len(details["seeds"]) else " *")


def privacy_tables(results: Path, language: str) -> dict[str, str]:
    """Accuracy by epsilon of each data set, means over seeds."""
    result = json.loads((results / "privacy.json").read_text("utf-8"))
    found: dict[str, dict[str, list[float]]] = {}
    for name, cell in result["details"]["cells"].items():
        kind, *where = name.split("/")
        if data := SETS.get(kind):
            found.setdefault(data, {}).setdefault(where[0], []).append(cell["accuracy"])
    first, none, about = WORDS[language]
    targets = sorted({t for row in found.values() for t in row if t != "none"}, key=float)
    heading = [first, *(f"ε = {target}" for target in targets), none]
    columns = (*targets, "none")
    rows = [[f"`{data}`", *(_mean(row.get(t)) for t in columns)] for data, row in found.items()]
    about = about.format(commit=result["commit"][:8])
    return {"privacy": f"{markdown_table(heading, rows)}\n\n{about}"}


def _mean(values: list[float] | None) -> str:
    return f"{fmean(values):.3f} ({len(values)})" if values else "-"
