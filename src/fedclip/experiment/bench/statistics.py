"""From finished runs to comparable figures: means, intervals, differences on the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclip.experiment.bench.comparisons import (
    Interval,
    holm,
    image_error,
    interval,
    p_value,
    ratio,
    verdict,
)
from fedclip.experiment.bench.plan import RATE, Plan
from fedclip.experiment.bench.runner import Finished
from fedclip.experiment.bench.schedule import Results

SHARE_OF_GAIN = 0.95
WORST_SHARE = 0.1
# Figures of a run that only some configurations give; means of them are shown where they exist.
OPTIONAL = ("base_accuracy", "new_accuracy", "harmonic_mean", "backdoor_success")


def run_figures(run: Finished) -> dict[str, Any]:
    """The figures of one run."""
    summary = run.summary
    clients = summary.get("client_accuracy") or {}
    return {
        "seed": run.cell.seed,
        "accuracy": summary["accuracy"],
        "zero_shot_accuracy": summary["zero_shot_accuracy"],
        "validation_accuracy": summary.get("validation_accuracy"),
        "validation_loss": summary.get("validation_loss"),
        "client_accuracy_mean": clients.get("mean"),
        "client_accuracy_min": clients.get("min"),
        "client_accuracy_worst_tenth": worst_clients(run.metrics),
        "bytes_up_per_client_round": summary["bytes_up_per_client_round"],
        "bytes_down_per_client_round": summary["bytes_down_per_client_round"],
        "bytes_total": total_bytes(run),
        "rounds": summary["rounds"],
        "seconds": summary["seconds"],
        **time_to_gain(run.metrics, run.timing, SHARE_OF_GAIN),
        "peak_memory_bytes": run.measured.get("peak_memory_bytes"),
        "cpu_seconds": run.measured.get("cpu_seconds"),
        "trainable_parameters": summary.get("trainable_parameters"),
        **{name: summary[name] for name in OPTIONAL if summary.get(name) is not None},
        **{f"metric_{name}": summary[name] for name in summary.get("metrics", ())},
        **_forgetting(summary),
    }


def total_bytes(run: Finished) -> float:
    """All that travelled in a run, both ways."""
    lines = [m for m in run.metrics if "bytes_up" in m]
    if lines:
        return sum(m["bytes_up"] + m["bytes_down"] for m in lines)
    summary = run.summary
    each = summary["bytes_up_per_client_round"] + summary["bytes_down_per_client_round"]
    return each * summary["clients_per_round"] * summary["rounds"]


def worst_clients(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean accuracy of the tenth of the clients that is worst off at the end, one at least."""
    by_client = metrics[-1].get("accuracy_by_client") if metrics else None
    known = sorted(value for value in (by_client or {}).values() if value is not None)
    return statistics.fmean(known[: math.ceil(WORST_SHARE * len(known))]) if known else None


def time_to_gain(
    metrics: Sequence[Mapping[str, Any]], timing: Sequence[Mapping[str, Any]], share: float
) -> dict[str, float | None]:
    """Rounds, seconds and bytes until a share of the run's final gain was reached.

    Seconds and bytes count from the first round on: loading and the first evaluation are left out,
    later evaluations are not. None where not every round was evaluated, or nothing was gained.
    """
    names = ("rounds_to_95", "seconds_to_95", "bytes_to_95")
    unknown: dict[str, float | None] = dict.fromkeys(names)
    if len(metrics) < 2 or any(line.get("accuracy") is None for line in metrics):
        return unknown
    first, last = metrics[0]["accuracy"], metrics[-1]["accuracy"]
    if last <= first:
        return unknown
    goal = first + share * (last - first)
    reached = next(m["server_round"] for m in metrics if m["accuracy"] >= goal)
    seconds = sum(t["seconds"] for t in timing if 0 < t["server_round"] <= reached)
    before = [m for m in metrics if m["server_round"] <= reached]
    travelled = sum(m.get("bytes_up", 0) + m.get("bytes_down", 0) for m in before)
    return dict(zip(names, (reached, seconds, travelled), strict=True))


def arm_figures(plan: Plan, results: Results) -> dict[str, dict[str, Any]]:
    """The figures of each arm that has a finished run, best accuracy first.

    Differences are the arm's accuracy minus the reference's, seed by seed, over the seeds that
    both have: runs of one seed share their division of the data, and all share their test images.
    """
    runs = {arm: results.of(arm) for arm in plan.arms if results.of(arm)}
    rows = {arm: _row(arm, own, plan, results) for arm, own in runs.items()}
    for reference in plan.grid.reference:
        _compare(plan, reference, runs, rows)
    return dict(sorted(rows.items(), key=lambda row: -row[1]["accuracy"]["mean"]))


def _row(arm: str, runs: Mapping[int, Finished], plan: Plan, results: Results) -> dict[str, Any]:
    own = [run_figures(run) for run in runs.values()]
    choice = results.choices[arm]
    plain = [key for key in own[0] if key not in ("seed", "accuracy", "zero_shot_accuracy")]
    gains = [r["accuracy"] - r["zero_shot_accuracy"] for r in own]
    rate = choice.knobs.get(RATE)
    return {
        "accuracy": _shown([r["accuracy"] for r in own], share=True),
        "zero_shot_accuracy": _shown([r["zero_shot_accuracy"] for r in own], share=True),
        "gain": _shown(gains),
        "minus": {},
        "personal": any(run.summary.get("personal", False) for run in runs.values()),
        "learning_rate": rate and rate.value,
        "learning_rate_edge": rate and rate.edge,
        "edge": choice.edge,
        "untuned": [key for key in plan.grid.tune if key not in plan.arms[arm].tuned],
        "tuning": {
            key: {"value": k.value, "edge": k.edge, "ties": list(k.ties), "losses": dict(k.losses)}
            for key, k in choice.knobs.items()
        },
        "tuning_runs": results.tuning_runs(arm),
        **{key: _mean([r.get(key) for r in own]) for key in plain},
        "runs": own,
    }


def _compare(
    plan: Plan,
    reference: str,
    runs: Mapping[str, Mapping[int, Finished]],
    rows: Mapping[str, dict[str, Any]],
) -> None:
    """Adds to each row how it differs from its reference, corrected over the whole table."""
    apart: dict[str, tuple[list[float], float]] = {}
    for arm, row in rows.items():
        name = reference + plan.arms[arm].family
        seeds = [seed for seed in runs[arm] if seed in runs.get(name, {})]
        if name == arm or not seeds:
            continue
        pairs = [(runs[arm][seed], runs[name][seed]) for seed in seeds]
        ours, theirs = [[run.summary["accuracy"] for run in side] for side in zip(*pairs)]  # noqa: B905
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        hits = _hits(pairs)
        error = 0.0 if hits is None else image_error(hits[0] - hits[1])
        row["minus"][reference] = {
            **_of(interval(differences, image_error=error)),
            "seeds": len(pairs),
            "image_error": error,
            "p": p_value(differences, error),
            "p_holm": None,
            "verdict": None,
            "excluded": _excluded(arm, row, name, rows[name]),
            "ratio": _of(ratio(ours, theirs, hits)),
        }
        if row["minus"][reference]["excluded"] is None and len(pairs) > 1:
            apart[arm] = differences, error
    adjusted = holm({arm: rows[arm]["minus"][reference]["p"] for arm in apart})
    for arm, (p, level) in adjusted.items():
        differences, error = apart[arm]
        corrected = interval(differences, image_error=error, level=level)
        rows[arm]["minus"][reference] |= {
            "p_holm": p,
            "verdict": verdict(corrected.mean, p),
            "corrected_low": corrected.low,
            "corrected_high": corrected.high,
        }


def _hits(
    pairs: Sequence[tuple[Finished, Finished]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Both arms' hits, `[seeds, images]`; None where a run has not kept them."""
    if any(run.hits is None for pair in pairs for run in pair):
        return None
    ours, theirs = (
        np.array([run.hits for run in side], dtype=np.float64) for side in zip(*pairs, strict=True)
    )
    return ours, theirs


def _excluded(
    arm: str, row: Mapping[str, Any], reference: str, other: Mapping[str, Any]
) -> str | None:
    """Why a difference takes part in no claim."""
    if row["personal"] != other["personal"]:
        return "personalised and shared models are not compared"
    for name, one in ((arm, row), (reference, other)):
        if one["edge"]:
            return f"the best {one['edge']} of {name} is the last one tried"
        if one["untuned"]:
            return f"{one['untuned'][0]} of {name} was not tuned"
    return None


def _shown(values: Sequence[float], share: bool = False) -> dict[str, float | None]:
    return _of(interval(values, share=share))


def _of(found: Interval) -> dict[str, float | None]:
    return {"mean": found.mean, "ci95": found.half, "low": found.low, "high": found.high}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _forgetting(summary: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy on other data sets, minus the base model's there."""
    other = summary.get("forgetting") or {}
    return {f"forgetting_{name}": v["accuracy"] - v["zero_shot"] for name, v in other.items()}
