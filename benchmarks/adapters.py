"""Adapters of several tasks against separate runs and merged into one, and of captions.

    python benchmarks/adapters.py     about three quarters of an hour on 2 cores

Three tasks (digits, clothing photos, icons), three seeds. Every arm trains on the same examples
for the same number of rounds. Merges are of the adapters of the run `per_task`; the method is
chosen by validation accuracy, and so are the weights where they are searched. Finished runs are
read, started ones resumed. For captions see `benchmarks/captions.py`.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.captions import captions_figures
from benchmarks.common import ROOT, mean_and_spread, write_result
from fedclip.adapters.merge_search import Validation, search_weights
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.experiment import run as experiment
from fedclip.experiment.build import build
from fedclip.experiment.context import for_task
from fedclip.experiment.evaluate import evaluate_merged
from fedclip.experiment.folder import RunFolder
from fedclip.lora.merge_methods import METHODS
from fedclip.models.adapter_merge import check_recipe, combine
from fedclip.models.adapter_updates import read_lora, write_lora
from fedclip.reports.progress import PlainProgress

CONFIG = ROOT / "configs" / "tasks.yaml"
MODES = ("per_task", "shared+task", "shared")
SEEDS = (0, 1, 2)
Row = dict[str, float]
app = typer.Typer(help=__doc__)


@app.command()
def main(
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(map(str, SEEDS)),
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = ROOT / "runs" / "adapters",
) -> None:
    """Run what is missing, and write adapters.json."""
    by_seed = [one_seed(int(seed), work) for seed in seeds.split(",")]
    tasks = list(by_seed[0]["accuracy"]["separate"])
    arms = {
        arm: {task: [found["accuracy"][arm][task] for found in by_seed] for task in tasks}
        for arm in by_seed[0]["accuracy"]
    }
    validated = {
        arm: statistics.mean(found["validation"][arm] for found in by_seed)
        for arm in by_seed[0]["validation"]
    }
    best = max(validated, key=validated.__getitem__)
    gaps = {
        arm: {
            task: statistics.mean(
                one - other for one, other in zip(arms["separate"][task], own[task], strict=True)
            )
            for task in tasks
        }
        for arm, own in arms.items()
    }
    figures = {
        "multi_task_gap_max": max(gaps["per_task"].values()),
        "best_merge_gap_max": max(gaps[best].values()),
        "shared_task_gap_max": max(gaps["shared+task"].values()),
        "shared_gap_max": max(gaps["shared"].values()),
    }
    rows = {
        arm: {
            task: dict(zip(("mean", "sd"), mean_and_spread(values), strict=True))
            for task, values in own.items()
        }
        for arm, own in arms.items()
    }
    details = {
        "best_merge": best,
        "merge_validation_accuracy": validated,
        "accuracy": rows,
        "gaps": gaps,
        "by_seed": by_seed,
    }
    retrieval = captions_figures([int(seed) for seed in seeds.split(",")])
    figures["recall_at_1_gain"] = retrieval["recall_at_1_gain"]
    command = "python benchmarks/adapters.py"
    path = write_result(
        "adapters", figures, {"command": command, "tasks": details, "captions": retrieval}
    )
    show(rows, tasks)
    Console().print(f"best merge by validation: {best}\nwritten to {path}")


def one_seed(seed: int, work: Path) -> dict[str, Any]:
    """Accuracies of every arm on every task, and of the merges on validation too."""
    config = load_config(CONFIG, [f"seed={seed}", "evaluation.every=10"])
    accuracy: dict[str, Row] = {}
    separate = {task: for_task(config, task) for task in config.tasks}
    accuracy["separate"] = {
        task: finished(own, work / f"{task}-{seed}").summary["accuracy"]
        for task, own in separate.items()
    }
    runs = {}
    for mode in MODES:
        runs[mode] = finished(shared_by(config, mode), work / f"{mode}-{seed}")
        tasks = runs[mode].summary["tasks"]
        accuracy[mode] = {task: tasks[task]["accuracy"] for task in config.tasks}
    merges, validation = merged(runs["per_task"].folder, seed)
    return {
        "seed": seed,
        "accuracy": accuracy | merges,
        "validation": validation,
        "matrix": {mode: run.summary["adapters"] for mode, run in runs.items()},
    }


def merged(run: Path, seed: int) -> tuple[dict[str, Row], dict[str, float]]:
    """Each method's accuracies by task, and its mean validation accuracy.

    The best by validation comes a second time with its weights searched.
    """
    listener = PlainProgress()
    config = load_config(run / "config.yaml")
    context = build(config, listener)
    adapters = [read_lora(run / "adapter_of" / task) for task in sorted(config.tasks)]
    validations = Validation.of_run(run, adapters[0], listener)
    recipes = {name: check_recipe(adapters, name, seed=seed) for name in METHODS}
    judged: dict[str, float] = {}
    for name, recipe in recipes.items():
        adapter, _ = combine(adapters, recipe)
        judged[name] = statistics.mean(own.judge(adapter)[0] for own in validations)
    best = max(judged, key=judged.__getitem__)
    weights, rows = search_weights(adapters, recipes[best], validations)
    recipes["searched"] = replace(recipes[best], weights=weights)
    judged["searched"] = rows[-1]["after"]
    accuracy: dict[str, Row] = {}
    for name, recipe in recipes.items():
        folder = run.parent / f"merged-{name}-{seed}"
        write_lora(folder, combine(adapters, recipe)[0])
        row = evaluate_merged(context, folder)
        accuracy[f"merged: {name}"] = {t: v for t, v in row.items() if v is not None}
    return accuracy, {f"merged: {name}": value for name, value in judged.items()}


def shared_by(config: Config, mode: str) -> Config:
    """The configuration in another mode of sharing."""
    sharing = config.federation.sharing.model_copy(update={"mode": mode})
    federation = config.federation.model_copy(update={"sharing": sharing})
    return config.model_copy(update={"federation": federation})


def finished(config: Config, folder: Path) -> experiment.Run:
    """The run of a configuration in that folder, gone on with or begun where need be."""
    if RunFolder(folder).is_run():
        return experiment.resume(folder, listener=PlainProgress())
    return experiment.run(config, output=folder, listener=PlainProgress())


def show(rows: dict[str, dict[str, dict[str, float]]], tasks: list[str]) -> None:
    """Print the table."""
    table = Table("", *tasks)
    for arm, row in rows.items():
        table.add_row(arm, *(f"{row[t]['mean']:.3f} ± {row[t]['sd']:.3f}" for t in tasks))
    Console().print(table)


if __name__ == "__main__":
    app()
