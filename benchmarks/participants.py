"""Participants whom one does not trust: hostile clients against robust rules, and all figures.

`python -m benchmarks.participants` runs quickstart's digits with 10 clients of which 3 attack, FFA
on the last layer, for every attack, rule, division and seed. It can be stopped: cells that are done
are in the file of `--cells` and are not run again; with `--read` no more are run. `--result DIR`
writes `participants.json` there: accuracies, shares of the clean run's, and the figures of the
other benchmarks of participants (`masks`, `consent_log`, `fuzz_messages`), from their results in
DIR. `--byzfl FOLDER` (an unpacked wheel of byzfl 0.0.11, which needs torchvision to be imported as
a whole) compares the rules with byzfl's instead.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.common import write_result
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.experiment.run import run
from fedclip.lora import robust_rules as rules
from fedclip.reports.comparison import number
from tests.deploy import test_remote_hostile as hostile
from tests.support.machines import write_images

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
CLIENTS, ATTACKERS = 10, 3
ATTACKS = {
    "none": ("none", None),
    "label flip": ("label_flip", None),
    "sign flip x5": ("sign_flip", 5),
    "gaussian x10": ("gaussian", 10),
    "alie 1.5": ("alie", 1.5),
    "min-max": ("min_max", None),
    "min-max sign": ("min_max_sign", None),
    "min-max std": ("min_max_std", None),
    "ipm 0.5": ("ipm", 0.5),
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
ASSERTED = ("sign flip x5", "gaussian x10", "label flip", "alie 1.5", "min-max std")
"""What every rule but Krum is asked to bear. Min-max in its other directions hurts more, and is
reported beside, as IPM is."""
BESIDE = ("min-max", "min-max sign", "ipm 0.5")
DIVISIONS = {
    "dirichlet 0.3": ["data.partition.name=dirichlet", "data.partition.alpha=0.3"],
    "iid": ["data.partition.name=iid"],
}
OTHERS = {
    "masks": ("masked_relative_error", "masked_site_seconds_100", "masked_server_seconds_100"),
    "consent_log": ("doctored_accepted", "log_mutations_missed", "overhead_seconds_a_round"),
    "fuzz_messages": ("messages_cases", "messages_escaped", "messages_taken_bad"),
}
"""Figures of other benchmarks, by the name of their result."""

Cells = dict[str, dict[str, float]]


def config_of(attack: str, rule: str, division: str, seed: int) -> Config:
    """The configuration of a cell: quickstart's digits, FFA, the last layer only."""
    common = ["federation.strategy=ffa", "model.lora.last_layers=1", f"seed={seed}", "device=cpu"]
    common += [f"federation.num_clients={CLIENTS}", "federation.rounds=8", "evaluation.every=8"]
    name, strength = ATTACKS[attack]
    attacked = [f"attack.name={name}", f"attack.clients={ATTACKERS}"]
    attacked += [] if strength is None else [f"attack.strength={strength}"]
    return load_config(QUICKSTART, [*common, *attacked, *DIVISIONS[division], *RULES[rule]])


def accuracy(attack: str, rule: str, division: str, seed: int) -> dict[str, float]:
    """The last accuracy of one run, and that before training."""
    with tempfile.TemporaryDirectory(prefix="fedclip-attack-") as place:
        found = run(config_of(attack, rule, division, seed), output=Path(place) / "run").summary
    return {"accuracy": found["accuracy"], "zero_shot": found["zero_shot_accuracy"]}


def grid(divisions: list[str], seeds: int) -> Iterator[tuple[str, str, str, int]]:
    """The cells, seed by seed, so that a stopped grid has whole seeds; what is reported last."""
    for beside in (False, True):
        for seed, division, rule in product(range(seeds), divisions, RULES):
            asked = (a for a in ATTACKS if (a in needed(rule)) != beside)
            yield from ((attack, rule, division, seed) for attack in asked)


def measure(cells: Path, divisions: list[str], seeds: int) -> Cells:
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


Table = dict[str, dict[str, dict[str, float]]]


def needed(rule: str) -> tuple[str, ...]:
    """The attacks that figures are made of, of a rule; the others are shown where they were run."""
    return {"mean": ("none", "sign flip x5"), "krum": ()}.get(rule, ("none", *ASSERTED))


def whole_seeds(found: Cells, divisions: list[str]) -> list[int]:
    """The seeds that have every cell that figures are made of."""
    cells = [(a, rule, division) for division in divisions for rule in RULES for a in needed(rule)]
    seeds = sorted({int(name.rpartition(" | ")[2]) for name in found})
    return [s for s in seeds if all(" | ".join((*cell, str(s))) in found for cell in cells)]


def table(
    found: Cells,
    seeds: list[int],
    figure: Callable[[dict[str, float]], float],
    over: Callable[[list[float]], float] = fmean,
) -> Table:
    """Means of a figure by division, rule and attack, `over` those of the seeds that have it."""
    by_cell: dict[tuple[str, str, str], list[float]] = {}
    for name, line in found.items():
        attack, rule, division, seed = name.split(" | ")
        if int(seed) in seeds:
            by_cell.setdefault((division, rule, attack), []).append(figure(line))
    tables: Table = {}
    for (division, rule, attack), values in by_cell.items():
        tables.setdefault(division, {}).setdefault(rule, {})[attack] = over(values)
    return tables


def figures_of(tables: Table) -> dict[str, float]:
    """Shares of the clean mean's accuracy, in the worst division each."""
    clean = {division: rows["mean"]["none"] for division, rows in tables.items()}

    def least(attack: str) -> float:
        shares = (
            rows[rule][attack] / clean[division]
            for division, rows in tables.items()
            for rule in RULES
            if rule not in ("mean", "krum") and attack in rows[rule]
        )
        return min(shares)

    shares = {f"defended_min_ratio_{re.sub('[ .-]', '_', a)}": least(a) for a in BESIDE}
    undefended = (rows["mean"]["sign flip x5"] / clean[name] for name, rows in tables.items())
    least_of_all = min(map(least, ASSERTED))
    return {"undefended_ratio": max(undefended), "defended_min_ratio": least_of_all} | shares


def lost(found: Cells, divisions: list[str]) -> dict[str, dict[str, list[float]]]:
    """Points that each rule loses with nobody attacking, by division and seed that has both."""

    def clean(rule: str, division: str) -> dict[str, float]:
        named = {name.rpartition(" | "): line for name, line in found.items()}
        start = f"none | {rule} | {division}"
        return {seed: line["accuracy"] for (own, _, seed), line in named.items() if own == start}

    points: dict[str, dict[str, list[float]]] = {rule: {} for rule in RULES if rule != "mean"}
    for rule, by_division in points.items():
        for division in divisions:
            ours, theirs = clean(rule, division), clean("mean", division)
            by_division[division] = [100 * (theirs[s] - ours[s]) for s in ours if s in theirs]
    return points


def lost_figures(points: Mapping[str, Mapping[str, list[float]]]) -> dict[str, float]:
    """The mean loss of each rule over seeds, in its worst division, and the largest but Krum's."""
    means = {
        rule: max(fmean(seeds) for seeds in own.values() if seeds)
        for rule, own in points.items()
        if any(own.values())
    }
    named = {f"no_attack_loss_points_{r.replace(' + ', '_')}": loss for r, loss in means.items()}
    return {"no_attack_loss_points": max(m for r, m in means.items() if r != "krum")} | named


def hostile_answers() -> dict[str, int]:
    """Answers of a hostile site that rounds over messages took in, of all kinds that are tested."""
    cases = hostile.NUMBERS | {
        name: attack for name, (attack, _) in (hostile.TENSORS | hostile.HEADERS).items()
    }
    with tempfile.TemporaryDirectory(prefix="fedclip-hostile-") as place:
        images = Path(place) / "images"
        write_images(images)
        records, _ = hostile.attacked(images, Path(place), list(cases.values()))
    taken = [record for record in records[2:] if "north" in record["clients"]]
    return {"hostile_answers": len(cases), "hostile_accepted": len(taken)}


def others(folder: Path) -> dict[str, float]:
    """The figures that other benchmarks have measured."""
    found = {name: json.loads((folder / f"{name}.json").read_text())["figures"] for name in OTHERS}
    return {key: found[name][key] for name, keys in OTHERS.items() for key in keys}


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
    parser.add_argument("--read", action="store_true", help="run no more cells")
    parser.add_argument("--commit", help="at which the cells were run, where that was another")
    parser.add_argument("--byzfl", type=Path, metavar="FOLDER")
    parser.add_argument("--result", type=Path, metavar="DIR", help="write participants.json there")
    options = parser.parse_args(arguments)
    if options.byzfl:
        worst = compare_with_byzfl(options.byzfl)
        print(worst)
        return int(max(worst.values()) > 1e-9)
    found = measure(options.cells, options.divisions, 0 if options.read else options.seeds)
    seeds = whole_seeds(found, options.divisions)[: options.seeds]
    if not seeds:
        print(f"{options.cells} has no seed with all cells", file=sys.stderr)
        return 1
    tables = table(found, seeds, lambda line: line["accuracy"])
    gains = table(found, seeds, lambda line: line["accuracy"] - line["zero_shot"])
    for division, rows in tables.items():
        print(f"\n| {division} | " + " | ".join(ATTACKS) + " |")
        for rule, row in rows.items():
            print(f"| {rule} | " + " | ".join(number(row.get(a), ".3f") for a in ATTACKS) + " |")
    points = lost(found, options.divisions)
    figures = figures_of(tables) | lost_figures(points)
    if options.result:
        figures |= hostile_answers() | others(options.result)
        details = {"seeds": seeds, "accuracy": tables, "over_zero_shot": gains}
        details |= {"no_attack_loss_points": points}
        details |= {"runs": table(found, seeds, lambda line: 1, sum)}
        details |= {"cells_commit": options.commit} if options.commit else {}
        write_result("participants", figures, details, options.result)
    print(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
