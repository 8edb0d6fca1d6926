"""What all benchmarks share: where their result files lie."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedclip.experiment.bench import result

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write_result(
    name: str, figures: Mapping[str, float], details: Mapping[str, Any], folder: Path = RESULTS
) -> Path:
    """Writes `<name>.json`: flat figures by key, and whatever explains them under `details`."""
    return result.write_result(folder / f"{name}.json", name, figures, details)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
