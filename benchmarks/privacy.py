"""Differential privacy: what it costs in accuracy and time, and what attacks make of it.

`python -m benchmarks.privacy --result benchmarks/results` measures, cell by cell, the accuracy of
`configs/privacy.yaml` by epsilon, that of clients hidden among 250, the attacks of `fedclip audit`
with and without privacy, the audit of a build whose noise is a tenth, and what a private step costs
beside a plain one. It can be stopped: cells that are done are in the file of `--cells` and are not
run again. `--only NAME` runs the cells whose name begins so.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import ROOT, write_result
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.experiment.audit.canaries import example_audit
from fedclip.experiment.audit.directions import direction_audit
from fedclip.experiment.audit.figures import Audit
from fedclip.experiment.audit.membership import membership_audit
from fedclip.experiment.build import build, load_data
from fedclip.experiment.engine import create_engine
from fedclip.experiment.run import run
from fedclip.federated.privacy.accounting import Spent, epsilon
from fedclip.federated.privacy.dp_sgd import ClientDpSgd, DpSgd
from fedclip.federated.privacy.ledger import request_sha256
from fedclip.federated.privacy.secret import Draws
from fedclip.records import TrainRequest
from fedclip.reports.listener import Listener

RECIPE, PLAIN = ROOT / "configs" / "privacy.yaml", ROOT / "configs" / "quickstart.yaml"
SEEDS, EPSILONS = range(5), (8, 2)
CURVE, CURVE_SEEDS = ("none", "8", "4", "2"), range(2)
DATA = {
    "digits": [],
    "fashion_mnist": ["data.name=fashion_mnist", "data.max_train_examples=2000"],
    "icons": ["data.name=icons", "data.partition.name=natural"],
}
"""Data sets of the recipe, which was chosen on the first one."""
NO_NOISE = ["privacy.unit=null", "privacy.target_epsilon=null", "privacy.delta=null"]
CLIENTS = [
    *("federation.strategy=ffa", "model.lora.last_layers=1", "data.partition.name=iid"),
    *("federation.num_clients=250", "federation.clients_per_round=100", "federation.rounds=30"),
    *("privacy.unit=client", "privacy.target_epsilon=4", "privacy.delta=1e-3"),
]
ONE_SITE = [
    *("federation.strategy=centralised", "federation.num_clients=1", "data.partition.name=iid"),
    *("model.lora.last_layers=1", "client.local_epochs=5"),
]
"""The audit's: one site with all images, of whom 400 have wrong labels."""
NOISE = [f"privacy.{key}" for key in ("unit=example", "target_epsilon=2.5", "delta=1e-4")]
DIRECTIONS = [*ONE_SITE, *NOISE, "federation.rounds=1"]
SITES = ["data.partition.name=iid"]
"""The membership attack's: sites of which half the images are still a batch."""
# Sampling rate, steps, delta, noise multiplier, and dp-accounting 0.6.0's epsilon (PLD).
ACCOUNTED = [
    (0.1, 100, 1e-3, 1.0, 4.784),
    (0.01, 100, 1e-4, 0.8, 1.044),
    (1.0, 50, 1e-2, 2.0, 13.713),
    (0.1, 100, 1e-3, 2.0, 1.544),
    (0.032, 500, 1e-5, 1.0, 4.606),
    (0.254, 64, 1e-3, 1.5, 5.490),
    (0.970, 32, 1e-2, 1.5, 14.505),
    (0.0512, 800, 1e-5, 0.8, 15.921),
]
TINY = ["data.partition.name=iid", "optimizer.name=sgd"]
B32 = [
    *("model.model_name=random:openai/clip-vit-base-patch32", "data.batch_size=16"),
    *("data.max_train_examples=16", "federation.num_clients=1", "data.partition.name=iid"),
]

Cell = Callable[[], dict[str, Any]]


def accuracy(file: Path, changes: list[str]) -> dict[str, Any]:
    """The figures of a run, evaluated after its last round only."""
    config = _config(file, changes)
    every = config.evaluation.model_copy(update={"every": config.federation.rounds})
    with tempfile.TemporaryDirectory(prefix="fedclip-privacy-") as place, _quiet():
        config = config.model_copy(update={"evaluation": every})
        summary = run(config, output=Path(place) / "run").summary
    kept = ("accuracy", "zero_shot_accuracy", "privacy")
    return {key: summary[key] for key in kept if key in summary}


def audited(attack: Callable[[Config], Audit], file: Path, changes: list[str]) -> dict[str, Any]:
    """The figures of an audit, and how long it took."""
    started = time.perf_counter()
    with _quiet():
        figures = attack(_config(file, changes)).figures
    return figures | {"seconds": time.perf_counter() - started}


def with_a_tenth_of_the_noise() -> dict[str, Any]:
    """The direction audit of a build that adds a tenth of the noise that it accounts for."""
    noise = ClientDpSgd.noise
    with mock.patch.object(ClientDpSgd, "noise", lambda *args: noise(*args) / 10):
        return audited(partial(direction_audit, canaries=400), PLAIN, DIRECTIONS)


def accounting() -> dict[str, Any]:
    """The largest distance of epsilon from Opacus', and from dp-accounting's as a share of it."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    from_opacus, from_google = [], []
    for q, steps, delta, noise, pld in ACCOUNTED:
        own, prv, rdp = epsilon(Spent(q, noise, steps), delta), PRVAccountant(), RDPAccountant()
        prv.history = rdp.history = [(noise, q, steps)]
        with _quiet():
            from_opacus.append(abs(own.rdp - rdp.get_epsilon(delta=delta)))
            from_opacus.append(abs(own.least - prv.get_epsilon(delta=delta)))
        from_google.append(abs(own.least / pld - 1))
    return {"from_opacus": max(from_opacus), "from_dp_accounting": max(from_google)}


def step_ratio(changes: list[str], images: int, rounds: int) -> dict[str, Any]:
    """Seconds of a plain and of a private round of the same steps, one after the other."""
    steps = {name: _steps(changes, images, name == "private") for name in ("plain", "private")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step(number)
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["private"], strict=True)]
    return {"ratio": statistics.median(ratios), "seconds": seconds}


def _steps(changes: list[str], images: int, private: bool) -> Callable[[int], None]:
    """A round in which every client trains on so many images, in batches of the same size."""
    config = _config(PLAIN, [*changes, "client.local_epochs=1", "device=cpu"])
    data = load_data(config, Listener())
    clients = tuple(replace(c, train=c.train[:images]) for c in data.clients)
    context = build(config, Listener(), data=replace(data, clients=clients))
    noise = dict.fromkeys(context.clients, 1.0)
    draws = Draws(bytes(32), "benchmark")
    dp_sgd = DpSgd(1.0, noise, draws, config.data.batch_size) if private else None
    engine, state = create_engine(context, dp_sgd), context.model.get_parameters()

    def step(number: int) -> None:
        ids = tuple(sorted(context.clients))
        request = TrainRequest(number + 1, ids, state, examples=context.clients)
        list(engine.train(replace(request, digest=request_sha256(request))))

    return step


def memory() -> dict[str, Any]:
    """The most memory of a process that takes a step of ViT-B/32, privately over plainly."""
    found = {}
    for name in ("plain", "private"):
        command = [sys.executable, "-m", "benchmarks.privacy", "--one-step", name]
        ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        found[name] = float(ran.stdout.split()[-1])
    return {"ratio": found["private"] / found["plain"], "megabytes": found}


def _one_step(name: str) -> None:
    _steps(B32, 16, name == "private")(0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def _config(file: Path, changes: list[str]) -> Config:
    return load_config(file, changes)


class _quiet(warnings.catch_warnings):
    """Passes over warnings: what the runs are warned of is known."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        warnings.simplefilter("ignore")
        return found


def cells() -> Iterator[tuple[str, Cell]]:
    """All that is measured, by name, the most telling first."""
    for target in EPSILONS:
        yield f"accuracy/{target}/0", _accuracy(target, 0)
    private, plain = (partial(example_audit, canaries=400, trainings=n) for n in (4, 1))
    direction, attack = (
        partial(direction_audit, canaries=400),
        partial(membership_audit, trainings=2),
    )
    yield "epsilon", accounting
    yield "audit/plain", partial(audited, plain, PLAIN, ONE_SITE)
    yield "audit/private", partial(audited, private, PLAIN, [*ONE_SITE, *NOISE])
    yield "audit/direction", partial(audited, direction, PLAIN, DIRECTIONS)
    yield "audit/direction, noise / 10", with_a_tenth_of_the_noise
    yield "membership/private", partial(audited, attack, RECIPE, SITES)
    yield "membership/plain", partial(audited, attack, RECIPE, [*SITES, *NO_NOISE])
    yield "step/tiny", partial(step_ratio, TINY, 96, 5)
    yield "clients/0", partial(accuracy, PLAIN, [*CLIENTS, "seed=0"])
    for seed in SEEDS:
        for target in EPSILONS:
            yield f"accuracy/{target}/{seed}", _accuracy(target, seed)
    yield "step/b32", partial(step_ratio, B32, 16, 3)
    yield "memory/b32", memory
    yield "membership/quickstart", partial(audited, attack, PLAIN, SITES)
    for seed, level, data in product(CURVE_SEEDS, CURVE, DATA):
        name = f"{'accuracy' if data == 'digits' else data}/{level}/{seed}"
        yield name, _accuracy(level, seed, data)
    for seed in (1, 2):
        yield f"clients/{seed}", partial(accuracy, PLAIN, [*CLIENTS, f"seed={seed}"])


def _accuracy(target: int | str, seed: int, data: str = "digits") -> Cell:
    wanted = NO_NOISE if target == "none" else [f"privacy.target_epsilon={target}"]
    return partial(accuracy, RECIPE, [f"seed={seed}", *DATA[data], *wanted])


def figures_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The figures of the result file, of those cells that are done."""

    def mean(prefix: str) -> float | None:
        values = [cell["accuracy"] for name, cell in found.items() if name.startswith(prefix)]
        return statistics.fmean(values) if values else None

    def of(name: str, key: str) -> float | None:
        return found.get(name, {}).get(key)

    attacks = {
        "audit_auc_plain": ("audit/plain", "auc"),
        "audit_bound_plain": ("audit/plain", "epsilon_at_least"),
        "audit_auc_eps2_5": ("audit/private", "auc"),
        "audit_auc_eps2_5_at_most": ("audit/private", "auc_at_most"),
        "audit_bound_eps2_5": ("audit/private", "epsilon_at_least"),
        "audit_direction_epsilon": ("audit/direction", "epsilon_gaussian"),
        "audit_direction_epsilon_promised": ("audit/direction", "epsilon_promised"),
        "audit_tenth_of_noise_at_least": (
            "audit/direction, noise / 10",
            "epsilon_gaussian_at_least",
        ),
        "membership_auc_plain": ("membership/plain", "auc"),
        "membership_auc_plain_at_most": ("membership/plain", "auc_at_most"),
        "membership_auc_eps2": ("membership/private", "auc"),
        "membership_auc_eps2_at_most": ("membership/private", "auc_at_most"),
        "membership_auc_quickstart": ("membership/quickstart", "auc"),
    }
    figures = {
        "epsilon_error_max": of("epsilon", "from_opacus"),
        "dp_accuracy_eps8": mean("accuracy/8/"),
        "dp_accuracy_eps2": mean("accuracy/2/"),
        "dp_client_accuracy": mean("clients/"),
        "dp_step_ratio_tiny": of("step/tiny", "ratio"),
        "dp_step_ratio_b32": of("step/b32", "ratio"),
        "dp_memory_ratio_b32": of("memory/b32", "ratio"),
        **{name: of(*where) for name, where in attacks.items()},
    }
    return {name: value for name, value in figures.items() if value is not None}


def main(arguments: list[str] | None = None) -> int:
    """Measures the cells that are not done, prints the figures, and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", type=Path, default=Path("privacy.jsonl"))
    parser.add_argument("--only", default="", help="cells whose name begins so")
    parser.add_argument("--result", type=Path, metavar="DIR", help="write privacy.json there")
    parser.add_argument("--one-step", choices=["plain", "private"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one_step:
        _one_step(options.one_step)
        return 0
    done = options.cells.read_text().splitlines() if options.cells.exists() else []
    found: dict[str, dict[str, Any]] = dict(map(json.loads, done))
    for name, cell in cells():
        if name in found or not name.startswith(options.only):
            continue
        found[name] = cell()
        with options.cells.open("a") as file:
            file.write(json.dumps([name, found[name]]) + "\n")
        print(name, found[name], flush=True)
    figures = figures_of(found)
    print(json.dumps(figures, indent=1))
    if options.result:
        details = {
            "command": "python -m benchmarks.privacy --result benchmarks/results",
            "cells": dict(sorted(found.items())),
        }
        write_result("privacy", figures, details, options.result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
