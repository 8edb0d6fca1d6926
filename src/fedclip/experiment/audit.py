"""Audit by attack: train once with planted examples, and guess which of them were trained on."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclip.config import Config
from fedclip.config.loading import dump_config
from fedclip.data.federated_data import FederatedData
from fedclip.errors import UsageError
from fedclip.evaluation.predictions import How, classify
from fedclip.experiment.build import build, load_data, with_absolute_paths
from fedclip.experiment.context import RunContext
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.privacy_checks import check_privacy
from fedclip.experiment.run import carry_out
from fedclip.experiment.strategy import choose_strategy
from fedclip.federated.privacy.audit import CONFIDENCE, auc, lower_bound, right_guesses
from fedclip.models.stacked.prefix_cache import PixelInputs
from fedclip.reports.listener import Listener
from fedclip.seeding import seed_for

FEWEST, GUESSED = 20, 8
"""Canaries that an audit needs, and the share, as one over, that is guessed in and out each."""
UNUSUAL_DELTA = 1e-5
"""Delta of the bound for a run that promises none."""


def audit(config: Config, canaries: int, *, listener: Listener | None = None) -> dict[str, Any]:
    """Train a configuration once on planted examples; figures of what that betrays.

    Training images with a wrong label are canaries, each of them in with probability 1/2. The run's
    folder is temporary: what it trains is fit for nothing else.
    """
    _refuse(config, canaries)
    config = with_absolute_paths(config)
    evaluation = config.evaluation.model_copy(update={"every": config.federation.rounds})
    config = config.model_copy(update={"evaluation": evaluation})
    with listener or Listener() as heard, tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        data, planted, inside = plant(load_data(config, heard), canaries, config.seed)
        context = build(config, heard, data=data)
        check_privacy(context, choose_strategy)
        before = _losses(context, planted)
        folder = RunFolder.create(Path(place) / "run", dump_config(context.config))
        run = carry_out(context, choose_strategy(context), folder, heard, started)
        scores = before - _losses(context, planted)
    return _figures(scores, inside, run.summary)


def plant(
    data: FederatedData, canaries: int, seed: int
) -> tuple[FederatedData, NDArray[np.int64], NDArray[np.bool_]]:
    """Data with wrong labels for some training examples, of whom half are left out.

    Returns the data, the canaries' rows, and which of them are in.
    """
    rng = np.random.default_rng(seed_for(seed, "audit"))
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
    return replace(data, labels=labels, clients=clients), planted, inside


def _refuse(config: Config, canaries: int) -> None:
    if canaries < FEWEST:
        raise UsageError(f"--canaries must be at least {FEWEST}, got {canaries}")
    for key, given in {
        "privacy.unit: client": config.privacy.unit == "client",
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


def _losses(context: RunContext, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The model's loss on each row."""
    images = PixelInputs(context.data.pixels, context.device)
    found = classify(context.model, images, context.data.labels, rows, How(context.device))
    return found.losses


def _figures(
    scores: NDArray[np.float64], inside: NDArray[np.bool_], summary: dict[str, Any]
) -> dict[str, Any]:
    promise = summary.get("privacy")
    each = len(scores) // GUESSED
    right = right_guesses(scores, inside, each)
    delta = UNUSUAL_DELTA if promise is None else promise["delta"]
    return {
        "canaries": len(scores),
        "inside": int(inside.sum()),
        "auc": auc(scores, inside),
        "guesses": 2 * each,
        "right": right,
        "confidence": CONFIDENCE,
        "epsilon_at_least": lower_bound(right, 2 * each, len(scores), delta),
        "epsilon_promised": None if promise is None else promise["epsilon"],
        "delta": delta,
        "accuracy": summary["accuracy"],
    }
