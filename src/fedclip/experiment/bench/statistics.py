"""From finished runs to comparable figures: means, intervals, differences on the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from fedclip.experiment.bench.plan import Plan
from fedclip.experiment.bench.runner import Finished
from fedclip.experiment.bench.schedule import Results

SHARE_OF_FINAL = 0.95
# Figures of a run that only some configurations give; means of them are shown where they exist.
OPTIONAL = ("base_accuracy", "new_accuracy", "harmonic_mean")


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half-width of its 95 % confidence interval, by Student's t.

    `ci95` is None for fewer than two values.
    """
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "ci95": None}
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "ci95": half}


def run_figures(run: Finished) -> dict[str, Any]:
    """The figures of one run."""
    summary = run.summary
    rounds, seconds = time_to_share(run.metrics, run.timing, SHARE_OF_FINAL)
    clients = summary.get("client_accuracy") or {}
    return {
        "seed": run.cell.seed,
        "accuracy": summary["accuracy"],
        "zero_shot_accuracy": summary["zero_shot_accuracy"],
        "validation_accuracy": summary.get("validation_accuracy"),
        "client_accuracy_mean": clients.get("mean"),
        "client_accuracy_min": clients.get("min"),
        "bytes_up_per_client_round": summary["bytes_up_per_client_round"],
        "bytes_down_per_client_round": summary["bytes_down_per_client_round"],
        "bytes_total": total_bytes(run),
        "rounds": summary["rounds"],
        "seconds": summary["seconds"],
        "rounds_to_95": rounds,
        "seconds_to_95": seconds,
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


def time_to_share(
    metrics: Sequence[Mapping[str, Any]], timing: Sequence[Mapping[str, Any]], share: float
) -> tuple[int | None, float | None]:
    """Rounds and seconds until accuracy first reached a share of the run's own last accuracy.

    Seconds count from the first round on: loading and the first evaluation are left out, later
    evaluations are not. None, None where not every round was evaluated.
    """
    if not metrics or any(line.get("accuracy") is None for line in metrics):
        return None, None
    goal = share * metrics[-1]["accuracy"]
    reached = next(m["server_round"] for m in metrics if m["accuracy"] >= goal)
    return reached, sum(t["seconds"] for t in timing if 0 < t["server_round"] <= reached)


def arm_figures(plan: Plan, results: Results) -> dict[str, dict[str, Any]]:
    """The figures of each arm that has a finished run, best accuracy first.

    Differences are the arm's accuracy minus the reference's, seed by seed, over the seeds that
    both have: runs of one seed share their division of the data and their test images.
    """
    runs = {arm: [run_figures(r) for r in results.of(arm).values()] for arm in plan.arms}
    rows = {arm: _row(arm, own, runs, plan, results) for arm, own in runs.items() if own}
    return dict(sorted(rows.items(), key=lambda row: -row[1]["accuracy"]["mean"]))


def _row(
    arm: str,
    own: list[dict[str, Any]],
    runs: Mapping[str, list[dict[str, Any]]],
    plan: Plan,
    results: Results,
) -> dict[str, Any]:
    choice = results.choices[arm]
    plain = [key for key in own[0] if key not in ("seed", "accuracy", "zero_shot_accuracy")]
    return {
        "accuracy": interval([r["accuracy"] for r in own]),
        "zero_shot_accuracy": interval([r["zero_shot_accuracy"] for r in own]),
        "gain": interval([r["accuracy"] - r["zero_shot_accuracy"] for r in own]),
        "minus": {
            name: difference
            for name in plan.grid.reference
            if name != arm and (difference := _difference(own, runs.get(name, [])))
        },
        "learning_rate": choice.rate,
        "learning_rate_edge": choice.edge,
        "tuning": choice.validation,
        **{key: _mean([r.get(key) for r in own]) for key in plain},
        "runs": own,
    }


def _difference(
    own: list[dict[str, Any]], others: list[dict[str, Any]]
) -> dict[str, float | None] | None:
    other = {r["seed"]: r["accuracy"] for r in others}
    pairs = [r["accuracy"] - other[r["seed"]] for r in own if r["seed"] in other]
    return interval(pairs) | {"seeds": len(pairs)} if pairs else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _forgetting(summary: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy on other data sets, minus the base model's there."""
    other = summary.get("forgetting") or {}
    return {f"forgetting_{name}": v["accuracy"] - v["zero_shot"] for name, v in other.items()}
