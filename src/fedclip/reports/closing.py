"""The last lines of a run: its figures, beside those of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedclip.errors import harmless


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a run ends with, from `summary.json`; the accuracy comes last."""
    chosen = [
        f"{name} {number(summary[name])} ({number(summary[f'initial_{name}'])} before)"
        for name in summary.get("metrics", ())
    ]
    if summary.get("backdoor_success") is not None:
        chosen.append(f"backdoor success {number(summary['backdoor_success'])}")
    early = f", ended early: {summary['stopped_by']}" if summary.get("stopped_by") else ""
    accuracy = ""
    if summary["accuracy"] is not None:
        zero_shot = number(summary.get("zero_shot_accuracy"))
        accuracy = f"accuracy {number(summary['accuracy'])} (zero-shot {zero_shot}) "
    last = f"{accuracy}after {summary['rounds']} rounds{early}"
    return [*chosen, *_by_class(summary), *_by_site(summary), *_best(summary), last]


def _by_class(summary: Mapping[str, Any]) -> list[str]:
    """The figures that accuracy alone hides; none of a run on captions or without test images."""
    if summary.get("worst_class") is None:
        return []
    return [
        f"majority-class rate {number(summary['majority_class_rate'])}: the accuracy of always "
        "answering the most frequent class",
        f"macro-F1 {number(summary['macro_f1'])} "
        f"(zero-shot {number(summary.get('zero_shot_macro_f1'))})",
        f"worst class: {recall_of(summary['worst_class'])} "
        f"(zero-shot: {recall_of(summary.get('zero_shot_worst_class'))})",
    ]


def _by_site(summary: Mapping[str, Any]) -> list[str]:
    """The site that fares worst, where sites have tests and the run tells of them."""
    worst = summary.get("worst_site")
    if not worst:
        return []
    name = harmless(worst["name"], lines=False)
    return [f"worst site: {name}, accuracy {number(worst['accuracy'])}"]


def _best(summary: Mapping[str, Any]) -> list[str]:
    """The best round by validation, where the run kept it."""
    best = summary.get("best")
    if not best:
        return []
    return [
        f"best round by validation: {best['server_round']}, accuracy "
        f"{number(best.get('accuracy'))} (validation {number(best['validation_accuracy'])}); "
        "--best uses it"
    ]


def recall_of(worst: Mapping[str, Any] | None) -> str:
    """A class and its recall, on one line."""
    if worst is None:
        return "-"
    return f"{harmless(worst['name'], lines=False)}, recall {number(worst['recall'])}"


def number(value: float | None) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"
