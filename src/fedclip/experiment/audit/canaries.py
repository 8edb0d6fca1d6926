"""Canaries: training with planted examples, and a guess which of them were trained on."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedclip.config import Config
from fedclip.config.loading import dump_config
from fedclip.data.federated_data import FederatedData
from fedclip.errors import UsageError
from fedclip.evaluation.predictions import How, classify
from fedclip.experiment.audit.figures import Audit, Scores, judged
from fedclip.experiment.build import build, load_data, with_absolute_paths
from fedclip.experiment.context import RunContext
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.privacy_checks import check_privacy
from fedclip.experiment.run import carry_out
from fedclip.experiment.strategy import choose_strategy
from fedclip.models.stacked.prefix_cache import PixelInputs
from fedclip.reports.listener import Listener
from fedclip.seeding import seed_for

FEWEST = 20
"""Canaries that an audit needs."""


def example_audit(
    config: Config, canaries: int, trainings: int = 1, *, listener: Listener | None = None
) -> Audit:
    """Train a configuration on planted examples; what of them that betrays.

    Training images with a wrong label are canaries, each of them in with probability 1/2. Several
    trainings plant by coins of their own, and their guesses count together. The runs' folders are
    temporary: what they train is fit for nothing else.
    """
    refuse_what_is_not_shared(config)
    if config.privacy.unit == "client":
        raise UsageError(
            "privacy.unit: client: examples as canaries say nothing of whole clients; take "
            "--direction, whose canaries are clients"
        )
    if canaries < FEWEST:
        raise UsageError(f"--canaries must be at least {FEWEST}, got {canaries}")
    config = with_absolute_paths(config)
    evaluation = config.evaluation.model_copy(update={"every": config.federation.rounds})
    config = config.model_copy(update={"evaluation": evaluation})
    parts, accuracies = [], []
    with listener or Listener() as heard:
        data = load_data(config, heard)
        for training in range(trainings):
            planted = plant(data, canaries, seed_for(config.seed, "audit", training))
            scores, summary = _trained(config, planted, heard)
            parts.append(Scores(scores, planted.inside, np.zeros(canaries, np.int64)))
            accuracies.append(summary["accuracy"])
    promise = summary.get("privacy")
    found = judged(Scores.together(parts), promise and (promise["epsilon"], promise["delta"]))
    found.figures["accuracy"] = float(np.mean(accuracies))
    return found


class Planted(NamedTuple):
    """Data with canaries, the canaries' rows, and which of them are in."""

    data: FederatedData
    rows: NDArray[np.int64]
    inside: NDArray[np.bool_]


def _trained(
    config: Config, planted: Planted, listener: Listener
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """By how much training lowers each canary's loss, and the run's summary."""
    started = time.perf_counter()
    context = build(config, listener, data=planted.data)
    check_privacy(context, choose_strategy)
    before = losses(context, planted.rows)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", dump_config(context.config))
        run = carry_out(context, choose_strategy(context), folder, listener, started)
    return before - losses(context, planted.rows), run.summary


def plant(data: FederatedData, canaries: int, seed: int) -> Planted:
    """Data with wrong labels for some training examples, of whom half are left out."""
    rng = np.random.default_rng(seed)
    pool = np.concatenate([client.train for client in data.clients])
    if canaries > len(pool) // 2:
        raise UsageError(
            f"--canaries: {canaries} are more than half of the {len(pool)} training examples; "
            "plant fewer, or use more data"
        )
    planted = rng.choice(pool, size=canaries, replace=False)
    inside = rng.random(canaries) < 0.5
    labels, classes = data.labels.copy(), len(data.class_names)
    labels[planted] = (labels[planted] + rng.integers(1, classes, canaries)) % classes
    out = planted[~inside]
    clients = tuple(replace(c, train=np.setdiff1d(c.train, out)) for c in data.clients)
    return Planted(replace(data, labels=labels, clients=clients), planted, inside)


def refuse_what_is_not_shared(config: Config) -> None:
    """Refuse configurations that do not train one classifier, for one adapter that all share."""
    for key, given in {
        "tasks": bool(config.tasks),
        "attack.name": config.attack.name != "none",
        "task: contrastive": config.task == "contrastive",
        "federation.sharing.mode": config.federation.sharing.mode != "shared",
        "evaluation.other_data": bool(config.evaluation.other_data),
        "data.train_classes": config.data.train_classes is not None,
    }.items():
        if given:
            raise UsageError(
                f"{key}: an audit plants examples of one classification task, for one adapter "
                "that all share; leave this out"
            )


def losses(context: RunContext, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The model's loss on each row."""
    images = PixelInputs(context.data.pixels, context.device)
    found = classify(context.model, images, context.data.labels, rows, How(context.device))
    return found.losses
