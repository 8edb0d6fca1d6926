"""The last lines of a run: its figures, beside those of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedclip.errors import harmless
from fedclip.reports.share import few, interval_of, none_is_worse


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a run ends with, from `summary.json`; the accuracy comes last, and how sure it is."""
    chosen = [
        f"{name} {number(summary[name])} ({number(summary[f'initial_{name}'])} before)"
        for name in summary.get("metrics", ())
    ]
    if summary.get("backdoor_success") is not None:
        chosen.append(f"backdoor success {number(summary['backdoor_success'])}")
    early = f", ended early: {summary['stopped_by']}" if summary.get("stopped_by") else ""
    last = f"{_accuracy(summary)}after {summary['rounds']} rounds{early}"
    little = few(summary.get("test_examples"))
    return [
        *chosen,
        *_by_class(summary),
        *_by_site(summary),
        *_best(summary),
        last,
        *([little] if little else []),
    ]


def evaluation_facts(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation says to people: figures of three digits, worst classes in words."""
    told: dict[str, Any] = {}
    for key, value in figures.items():
        if key in ("worst_class", "zero_shot_worst_class"):
            value = recall_of(value, figures.get(key.replace("worst_class", "accuracy")))
        elif key == "worst_class_by_task":
            means = figures["accuracy_by_task"]
            value = {task: recall_of(own, means.get(task)) for task, own in value.items()}
        told[key] = three_digits(value)
        if key == "accuracy" and (interval := _interval(figures)):
            told["accuracy: 95 % interval"] = interval
    return told


def three_digits(value: Any) -> Any:
    """Figures as they are shown, alone, by name or in rows; what is no fraction stays."""
    if isinstance(value, Mapping):
        return {key: three_digits(own) for key, own in value.items()}
    if isinstance(value, list):
        return [three_digits(own) for own in value]
    return number(value) if isinstance(value, float) else value


def _accuracy(summary: Mapping[str, Any]) -> str:
    """The accuracy, of how many images it is, and its interval; nothing of a run without."""
    if summary["accuracy"] is None:
        return ""
    count, interval = summary.get("test_examples"), _interval(summary)
    images = f" on {count:,} test image{'' if count == 1 else 's'}" if count else ""
    sure = f"95 % interval {interval}; " if interval else ""
    zero_shot = number(summary.get("zero_shot_accuracy"))
    return f"accuracy {number(summary['accuracy'])}{images} ({sure}zero-shot {zero_shot}) "


def _interval(figures: Mapping[str, Any]) -> str | None:
    tasks = bool(figures.get("tasks") or figures.get("accuracy_by_task"))
    return interval_of(figures["accuracy"], figures.get("test_examples"), tasks=tasks)


def _by_class(summary: Mapping[str, Any]) -> list[str]:
    """The figures that accuracy alone hides; none of a run on captions or without test images."""
    if summary.get("worst_class") is None:
        return []
    return [
        f"majority-class rate {number(summary['majority_class_rate'])}: the accuracy of always "
        "answering the most frequent class",
        f"macro-F1 {number(summary['macro_f1'])} "
        f"(zero-shot {number(summary.get('zero_shot_macro_f1'))})",
        f"worst class: {recall_of(summary['worst_class'], summary['accuracy'])} (zero-shot: "
        f"{recall_of(summary.get('zero_shot_worst_class'), summary.get('zero_shot_accuracy'))})",
    ]


def _by_site(summary: Mapping[str, Any]) -> list[str]:
    """The site that fares worst, where sites have tests and the run tells of them."""
    worst = summary.get("worst_site")
    if not worst:
        return []
    accuracy = number(worst["accuracy"])
    if none_is_worse(worst["accuracy"], (summary.get("client_accuracy") or {}).get("mean")):
        return [f"worst site: none, all have accuracy {accuracy}"]
    return [f"worst site: {harmless(worst['name'], lines=False)}, accuracy {accuracy}"]


def _best(summary: Mapping[str, Any]) -> list[str]:
    """The best round by validation, where the run kept it."""
    best = summary.get("best")
    if not best:
        return []
    return [
        f"best round by validation: {best['server_round']}, validation accuracy "
        f"{number(best['validation_accuracy'])}, test accuracy {number(best.get('accuracy'))}; "
        "--best uses it"
    ]


def recall_of(worst: Mapping[str, Any] | None, accuracy: float | None) -> str:
    """The class of the lowest recall with it, on one line; none where all have the same.

    Accuracy is the mean of all recalls, weighted by the classes' images.
    """
    if worst is None:
        return "-"
    if none_is_worse(worst["recall"], accuracy):
        return f"none, all have recall {number(worst['recall'])}"
    return f"{harmless(worst['name'], lines=False)}, recall {number(worst['recall'])}"


def number(value: float | None) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"
