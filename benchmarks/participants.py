"""Hostile clients against robust rules, on one grid: what attacks cost, and what rules save.

`python -m benchmarks.participants` runs quickstart's digits with 10 clients of which 3 attack, FFA
on the last layer, for every attack, rule, division and seed, and writes `participants.json` with
the accuracies, and as a share of the clean run's. It can be stopped: cells that are done are in the
file of `--cells` and are not run again. `--byzfl FOLDER` (an unpacked wheel of byzfl 0.0.11, which
needs torchvision to be imported as a whole) compares the rules with byzfl's instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import attacks
from benchmarks.common import write_result
from fedclip.config import Config
from fedclip.config.loading import dump_config, load_config
from fedclip.experiment.build import build
from fedclip.experiment.context import ONLY, RunContext
from fedclip.experiment.engine import create_engine
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.run import carry_out
from fedclip.experiment.strategy import choose_strategy
from fedclip.lora import robust_rules as rules
from fedclip.reports.listener import Listener

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
CLIENTS, ATTACKERS = 10, 3
ATTACKS: dict[str, attacks.Attack | None] = {
    "none": None,
    "label flip": None,  # of the data, not of the update
    "sign flip x5": attacks.sign_flip(5),
    "gaussian x10": attacks.gaussian(10),
    "alie 1.5": attacks.alie(1.5),
    "min-max": attacks.min_max(),
    "ipm 0.5": attacks.inner_product(0.5),
}
RULES: dict[str, list[str]] = {
    "mean": [],
    **{
        name: [f"robust.rule={name}", f"robust.attackers={ATTACKERS}"]
        for name in ("multi_krum", "krum", "median", "trimmed_mean", "rfa", "norm_clipping")
    },
    "mixing + trimmed_mean": [
        *("robust.rule=trimmed_mean", f"robust.attackers={ATTACKERS}", "robust.mixing=true")
    ],
}
ASSERTED = ("sign flip x5", "gaussian x10", "label flip", "alie 1.5", "min-max")
DIVISIONS = {
    "dirichlet 0.3": ["data.partition.name=dirichlet", "data.partition.alpha=0.3"],
    "iid": ["data.partition.name=iid"],
}


def config_of(rule: str, division: str, seed: int) -> Config:
    """The configuration of a cell: quickstart's digits, FFA, the last layer only."""
    common = ["federation.strategy=ffa", "model.lora.last_layers=1", f"seed={seed}", "device=cpu"]
    common += [f"federation.num_clients={CLIENTS}", "federation.rounds=8", "evaluation.every=8"]
    return load_config(QUICKSTART, [*common, *DIVISIONS[division], *RULES[rule]])


def accuracy(attack: str, rule: str, division: str, seed: int) -> dict[str, float]:
    """The last accuracy of one run, and that before training."""
    config = config_of(rule, division, seed)
    with tempfile.TemporaryDirectory(prefix="fedclip-attack-") as place:
        context = build(config, Listener())
        hostile = sorted(
            np.random.default_rng(seed).choice(sorted(context.clients), ATTACKERS, False)
        )
        engine: Any = create_engine(
            _poisoned(context, hostile) if attack == "label flip" else context
        )
        if (change := ATTACKS[attack]) is not None:
            engine = attacks.Attacked(engine, hostile, change, seed)
        folder = RunFolder.create(Path(place) / "run", dump_config(context.config))
        strategy, started = choose_strategy(context), time.perf_counter()
        found = carry_out(context, strategy, folder, Listener(), started, engine).summary
    return {"accuracy": found["accuracy"], "zero_shot": found["zero_shot_accuracy"]}


def _poisoned(context: RunContext, hostile: list[str]) -> RunContext:
    """The same run with flipped labels of the hostile clients' training examples."""
    labels = context.data.labels.copy()
    for client in hostile:
        rows = context.training[client]
        labels[rows] = attacks.flipped(labels[rows], len(context.data.class_names))
    task = replace(context.tasks[ONLY], data=replace(context.data, labels=labels))
    return replace(context, tasks={ONLY: task})


def grid(divisions: list[str], seeds: int) -> Iterator[tuple[str, str, str, int]]:
    """The cells, seed by seed, so that a stopped grid has whole seeds."""
    for seed in range(seeds):
        for division in divisions:
            for rule in RULES:
                yield from ((attack, rule, division, seed) for attack in ATTACKS)


def measure(cells: Path, divisions: list[str], seeds: int) -> dict[str, dict[str, float]]:
    """Runs what is not in the file of cells yet; gives all of them."""
    lines = cells.read_text().splitlines() if cells.exists() else []
    done = {line["cell"]: line for line in map(json.loads, lines)}
    for cell in grid(divisions, seeds):
        name = " | ".join(map(str, cell))
        if name in done:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done[name] = {"cell": name, **accuracy(*cell)}
        with cells.open("a") as file:
            file.write(json.dumps(done[name]) + "\n")
        print(name, f"{done[name]['accuracy']:.3f}", flush=True)
    return done


def table(found: dict[str, dict[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean accuracies by division, rule and attack, over the seeds that have all cells."""
    by_cell: dict[tuple[str, str, str], list[float]] = {}
    for name, line in found.items():
        attack, rule, division, _ = name.split(" | ")
        by_cell.setdefault((division, rule, attack), []).append(line["accuracy"])
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for (division, rule, attack), values in by_cell.items():
        tables.setdefault(division, {}).setdefault(rule, {})[attack] = fmean(values)
    return tables


def figures_of(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The ratios to the clean mean, the worst division each; points lost with nobody attacking."""
    tables = table(found).values()
    defended = [rule for rule in RULES if rule not in ("mean", "krum")]

    def ratio(rows: dict[str, dict[str, float]], rule: str, attack: str) -> float:
        return rows[rule][attack] / rows["mean"]["none"]

    return {
        "undefended_ratio": max(ratio(rows, "mean", "sign flip x5") for rows in tables),
        "defended_min_ratio": min(
            ratio(rows, rule, attack)
            for rows in tables for rule in defended for attack in ASSERTED
        ),
        **{
            f"no_attack_loss_points_{rule.replace(' + ', '_')}": max(
                100 * (rows["mean"]["none"] - rows[rule]["none"]) for rows in tables
            )
            for rule in RULES if rule != "mean"
        },
        "zero_shot": fmean(line["zero_shot"] for line in found.values()),
    }  # fmt: skip


def compare_with_byzfl(folder: Path) -> dict[str, float]:
    """The largest difference of each rule to byzfl's, Krum's with byzfl's count of neighbours."""
    for name in ("byzfl", "byzfl.aggregators"):  # whose own __init__ wants torchvision
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module
    from byzfl.aggregators import aggregators as their  # type: ignore[import-not-found]
    from byzfl.aggregators.preaggregators import NNM  # type: ignore[import-not-found]

    worst: dict[str, float] = {}
    for n, f, seed in ((n, f, s) for n, f in ((7, 2), (10, 3), (12, 3)) for s in range(10)):
        x = np.random.default_rng(seed).normal(size=(n, 20)) + 0.5
        x[:f] *= -5
        gram = x @ x.T
        best = np.argsort(rules.krum_scores(gram, f - 1), kind="stable")[: n - f]
        pairs = {
            "median": (rules.median(x, f), their.Median()(x)),
            "trimmed_mean": (rules.trimmed_mean(x, f), their.TrMean(f)(x)),
            "rfa": (rules.rfa(gram, f) @ x, their.GeometricMedian(nu=1e-6, T=50)(x)),
            "mixing": (rules.mixing(gram, f) @ x, NNM(f)(x)),
            "krum": (rules.krum(gram, f - 1) @ x, their.Krum(f)(x)),
            "multi_krum": (x[best].mean(axis=0), their.MultiKrum(f)(x)),
        }
        for name, (own, other) in pairs.items():
            worst[name] = max(worst.get(name, 0.0), float(np.abs(own - other).max()))
    return worst


def main(arguments: list[str] | None = None) -> int:
    """Runs the grid and prints the tables, or compares with byzfl."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--divisions", nargs="*", default=list(DIVISIONS), choices=DIVISIONS)
    parser.add_argument("--cells", type=Path, default=Path("participants.jsonl"))
    parser.add_argument("--byzfl", type=Path, metavar="FOLDER")
    parser.add_argument("--result", type=Path, metavar="DIR", help="write participants.json there")
    options = parser.parse_args(arguments)
    if options.byzfl:
        worst = compare_with_byzfl(options.byzfl)
        print(worst)
        return int(max(worst.values()) > 1e-9)
    found = measure(options.cells, options.divisions, options.seeds)
    tables, figures = table(found), figures_of(found)
    for division, rows in tables.items():
        print(f"\n| {division} | " + " | ".join(ATTACKS) + " |")
        for rule, row in rows.items():
            print(f"| {rule} | " + " | ".join(f"{row[a]:.3f}" for a in ATTACKS) + " |")
    print(figures)
    if options.result:
        details = {"seeds": options.seeds, "accuracy": tables}
        write_result("participants", figures, details, options.result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
