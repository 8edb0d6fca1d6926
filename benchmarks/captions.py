"""Learning from captions: what icon families that nobody trains on gain by it.

Runs configs/captions.yaml once a seed. Its settings were chosen on validation pairs, which are of
the families that train; the held-out families were not looked at.

    python benchmarks/captions.py      a few minutes a seed on 2 cores
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fedclip
from benchmarks.common import ROOT, mean_and_spread, write_result
from fedclip.config_io import load_config
from fedclip.reports.progress import make_progress

CONFIG = ROOT / "configs" / "captions.yaml"
SEEDS = (0, 1, 2)


def captions_figures(seeds: Sequence[int] = SEEDS) -> dict[str, float]:
    """Mean recalls over the seeds, before and after, and `recall_at_1_gain` (image to text)."""
    return figures_of(summaries(seeds))


def summaries(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The summary of the configuration's run with each seed."""
    found = []
    for seed in seeds:
        config = load_config(CONFIG, [f"seed={seed}"])
        with tempfile.TemporaryDirectory() as folder:
            run = fedclip.run(config, output=Path(folder) / "run", listener=make_progress())
        found.append(run.summary)
    return found


def figures_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Flat figures, means over runs."""

    def mean(values: Sequence[float]) -> float:
        return mean_and_spread(values)[0]

    figures = {
        f"{way}_{name}_{when}": mean([run[key][way][name] for run in runs])
        for when, key in (("zero_shot", "zero_shot_retrieval"), ("trained", "retrieval"))
        for way, recalls in runs[0][key].items()
        for name in recalls
    }
    gains = [run["accuracy"] - run["zero_shot_accuracy"] for run in runs]
    return figures | {
        "recall_at_1_gain": mean(gains),
        "validation_recall_at_1": mean([run["validation_accuracy"] for run in runs]),
        "seconds": mean([run["seconds"] for run in runs]),
    }


def main(
    seeds: Annotated[list[int] | None, typer.Option(help="Only these seeds.")] = None,
    write: Annotated[bool, typer.Option(help="Write the result file.")] = True,
) -> None:
    """Runs the seeds, prints the figures and writes the result file."""
    runs = summaries(seeds or SEEDS)
    figures = figures_of(runs)
    for name, value in figures.items():
        Console().print(f"{name:<40} {value:.4f}")
    if write:
        details = {
            "command": "python benchmarks/captions.py",
            "seeds": list(seeds or SEEDS),
            "gain_by_seed": [run["accuracy"] - run["zero_shot_accuracy"] for run in runs],
            "client_accuracy": [run["client_accuracy"] for run in runs],
            "seconds": [run["seconds"] for run in runs],
        }
        Console().print(f"written to {write_result('captions', figures, details)}")


if __name__ == "__main__":
    typer.run(main)
