"""The results in a run's card: accuracies, figures by class, recalls, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedclip.models.adapter_card import markdown
from fedclip.reports.closing import number, recall_of
from fedclip.reports.share import interval_of
from fedclip.reports.tables import retrieval_rows


def accuracies(summary: Mapping[str, Any]) -> list[str]:
    """The table of a run's figures, before and after training."""
    what = "image-to-text recall@1" if "retrieval" in summary else "accuracy"
    lines = [
        f"| {what} | |",
        "|---|---|",
        f"| before training (zero-shot) | {number(summary['zero_shot_accuracy'])} |",
        f"| trained | {number(summary['accuracy'])} |",
    ]
    if interval := interval_of(summary["accuracy"], summary.get("test_examples")):
        lines.append(f"| its 95 % interval, by the number of test images | {interval} |")
    for key, words in (("mean", "mean over clients"), ("min", "lowest client"), ("max", "highest")):
        if summary["client_accuracy"]:
            lines.append(f"| {words} | {number(summary['client_accuracy'][key])} |")
    lines += _by_class(summary)
    for name in summary.get("metrics", ()):
        change = f"{number(summary[f'zero_shot_{name}'])} before, {number(summary[name])} after"
        lines.append(f"| {name} | {change} |")
    for data, found in (summary.get("forgetting") or {}).items():
        change = f"{number(found['zero_shot'])} before, {number(found['accuracy'])} after"
        lines.append(f"| {data}, not trained | {change} |")
    return lines


def recalls(summary: Mapping[str, Any]) -> list[str]:
    """All recalls of a run on captions, before and after; nothing of another run."""
    rows = retrieval_rows(summary)
    if not rows:
        return []
    lines = [
        f"| {row['recall']} | {number(row['zero_shot'])} | {number(row['trained'])} |"
        for row in rows
    ]
    return ["", "| recall | zero-shot | trained |", "|---|---|---|", *lines]


def whose(run: Path, summary: Mapping[str, Any]) -> list[str]:
    """Whose models were measured, where it was not this adapter alone."""
    if not (summary.get("personal") or (run / "adapter_of").is_dir()):
        return []
    return [
        "",
        "Measured with the clients' own adapters (or their groups'), each on its own images. This "
        "adapter is what they share, or their merge; by itself it may do worse.",
    ]


def _by_class(summary: Mapping[str, Any]) -> list[str]:
    """Rows of the figures by class; none of a run on captions or of an older version."""
    if summary.get("worst_class") is None:
        return []
    macro = (
        f"{number(summary.get('zero_shot_macro_f1'))} before, {number(summary['macro_f1'])} after"
    )
    before, after = (
        markdown(recall_of(summary.get(f"{when}worst_class"), summary.get(f"{when}accuracy")))
        for when in ("zero_shot_", "")
    )
    return [
        f"| majority-class rate | {number(summary['majority_class_rate'])} |",
        f"| macro-F1 | {macro} |",
        f"| worst class | before: {before}; after: {after} |",
    ]
