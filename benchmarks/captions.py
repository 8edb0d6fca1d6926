"""Learning from captions: what icon families that nobody trains on gain by it.

Runs configs/captions.yaml once a seed, and again with captions in words that the embedded model was
pretrained on, where there is less to gain. Settings were chosen with other families held out (17
to 25 in order); the test families were not looked at.

    python benchmarks/captions.py      about a quarter of an hour on 2 cores
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fedclip
from benchmarks.common import ROOT, mean_and_spread, write_result
from fedclip.config.loading import load_config
from fedclip.reports.progress import make_progress

CONFIG = ROOT / "configs" / "captions.yaml"
SEEDS = (0, 1, 2)
# The embedded model was pretrained on sentences like this one, and not on the configuration's.
FAMILIAR = "data.templates=['an icon of a {}']"
Summaries = Sequence[Mapping[str, Any]]


def captions_figures(seeds: Sequence[int] = SEEDS) -> dict[str, float]:
    """Means over the seeds: recalls before and after, and `recall_at_1_gain` (image to text).

    `familiar_` figures are of the same runs with captions in words of the pretraining.
    """
    return figures_of(summaries(seeds), summaries(seeds, FAMILIAR))


def summaries(seeds: Sequence[int], *overrides: str) -> list[dict[str, Any]]:
    """The summary of the configuration's run with each seed."""
    found = []
    for seed in seeds:
        config = load_config(CONFIG, [f"seed={seed}", *overrides])
        with tempfile.TemporaryDirectory() as folder:
            run = fedclip.run(config, output=Path(folder) / "run", listener=make_progress())
        found.append(run.summary)
    return found


def figures_of(runs: Summaries, familiar: Summaries) -> dict[str, float]:
    """Flat figures, means over runs."""
    figures = {
        f"{way}_{name}_{when}": _mean(run[key][way][name] for run in runs)
        for when, key in (("zero_shot", "zero_shot_retrieval"), ("trained", "retrieval"))
        for way, recalls in runs[0][key].items()
        for name in recalls
    }
    return figures | {
        "recall_at_1_gain": _mean(map(gain, runs)),
        "recall_at_1_gain_over_familiar_words": _mean(
            run["accuracy"] - other["zero_shot_accuracy"]
            for run, other in zip(runs, familiar, strict=True)
        ),
        "familiar_recall_at_1_zero_shot": _mean(run["zero_shot_accuracy"] for run in familiar),
        "familiar_recall_at_1_trained": _mean(run["accuracy"] for run in familiar),
        "familiar_recall_at_1_gain": _mean(map(gain, familiar)),
        "seconds": _mean(run["seconds"] for run in runs),
    }


def gain(run: Mapping[str, Any]) -> float:
    """What training adds to image-to-text recall@1 on the held-out families."""
    return float(run["accuracy"] - run["zero_shot_accuracy"])


def _mean(values: Iterable[float]) -> float:
    return mean_and_spread(list(values))[0]


def main(
    seeds: Annotated[list[int] | None, typer.Option(help="Only these seeds.")] = None,
    write: Annotated[bool, typer.Option(help="Write the result file.")] = True,
) -> None:
    """Runs the seeds, prints the figures and writes the result file."""
    chosen = seeds or list(SEEDS)
    runs, familiar = summaries(chosen), summaries(chosen, FAMILIAR)
    figures = figures_of(runs, familiar)
    for name, value in figures.items():
        Console().print(f"{name:<40} {value:.4f}")
    if write:
        details = {
            "command": "python benchmarks/captions.py",
            "seeds": chosen,
            "gain_by_seed": [gain(run) for run in runs],
            "familiar_gain_by_seed": [gain(run) for run in familiar],
            "client_accuracy": [run["client_accuracy"] for run in runs],
            "seconds_by_seed": [run["seconds"] for run in runs],
        }
        Console().print(f"written to {write_result('captions', figures, details)}")


if __name__ == "__main__":
    typer.run(main)
