"""Membership inference by an honest-but-curious coordinator, from each client's updates.

It keeps to the protocol, and compares the state that it sent with what a client sent back: of the
images that the client trained on, the loss falls more. Half of every client's training images, by
coins, are left out, so that those in and those out come from the same distribution.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedclip.config import Config
from fedclip.data.federated_data import FederatedData
from fedclip.errors import UsageError
from fedclip.experiment.audit.canaries import losses, refuse_what_is_not_shared
from fedclip.experiment.audit.figures import Audit, Scores, judged
from fedclip.experiment.audit.rounds import train_watched
from fedclip.experiment.build import build, load_data, with_absolute_paths
from fedclip.experiment.context import RunContext
from fedclip.federated.rounds import Engine
from fedclip.records import ClientUpdate, Cohort, RunState, State, TrainRequest
from fedclip.reports.listener import Listener
from fedclip.seeding import seed_for

Rows = NDArray[np.int64]


def membership_audit(
    config: Config, trainings: int = 1, *, listener: Listener | None = None
) -> Audit:
    """Train a configuration without half of the images, and guess which half; see the module."""
    _refuse(config)
    config, parts = with_absolute_paths(config), []
    with listener or Listener() as heard, tempfile.TemporaryDirectory() as place:
        data = load_data(config, heard)
        for training in range(trainings):
            seed = seed_for(config.seed, "membership", training)
            divided, candidates, inside = divide(data, seed)
            context = build(config, heard, data=divided)
            watch = Coordinator(context, candidates)
            privacy = train_watched(
                context, Path(place) / str(training), heard, watched=watch.around
            )
            parts.append(watch.found(inside))
    promise = privacy.promise().get("privacy")
    return judged(Scores.together(parts), promise and (promise["epsilon"], promise["delta"]))


def divide(
    data: FederatedData, seed: int
) -> tuple[FederatedData, dict[str, Rows], dict[str, NDArray[np.bool_]]]:
    """Data without about half of each client's training images; all of them, and which are in."""
    rng = np.random.default_rng(seed)
    inside = {c.client_id: rng.random(len(c.train)) < 0.5 for c in data.clients}
    for client_id, own in inside.items():
        if own.all() or not own.any():
            raise UsageError(
                f"client {client_id} has {len(own)} training images, too few to leave out half of "
                "them; give clients more images, by fewer clients or data.partition.min_size"
            )
    clients = tuple(replace(c, train=c.train[inside[c.client_id]]) for c in data.clients)
    return (
        replace(data, clients=clients),
        {c.client_id: c.train for c in data.clients},
        inside,
    )


@dataclass
class Coordinator:
    """What the coordinator learns of each client's images, summed over its updates."""

    context: RunContext
    candidates: Mapping[str, Rows]
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def around(self, engine: Engine) -> Engine:
        """The engine, whose updates pass by the coordinator."""
        return _Watched(engine, self)

    def see(self, request: TrainRequest, update: ClientUpdate) -> None:
        """Compare the losses on a client's candidates under its start and under its update."""
        sent, client = request.names_sent, update.report.client_id
        if not sent or client not in self.candidates:
            return
        rows, start = self.candidates[client], request.start(client)
        answer = {**start, **{n: t for n, t in update.tensors.items() if n in sent}}
        fallen = self._losses(request, start, rows) - self._losses(request, answer, rows)
        self.scores[client] = self.scores.get(client, 0.0) + fallen

    def found(self, inside: Mapping[str, NDArray[np.bool_]]) -> Scores:
        """The scores of those clients that were asked, each a stratum of its own."""
        asked = list(self.scores)
        strata = np.repeat(np.arange(len(asked)), [len(inside[client]) for client in asked])
        return Scores(
            np.concatenate([self.scores[client] for client in asked]),
            np.concatenate([inside[client] for client in asked]),
            strata,
        )

    def _losses(self, request: TrainRequest, state: State, rows: Rows) -> NDArray[np.float64]:
        whole = {n: request.frames[n] @ t if n in request.frames else t for n, t in state.items()}
        self.context.put(RunState(whole, shift=request.shift))
        return losses(self.context, rows)


@dataclass(frozen=True)
class _Watched:
    engine: Engine
    coordinator: Coordinator

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        if request.ranks:
            raise UsageError("federation.client_ranks: the audit takes clients of one rank")
        cohorts = list(self.engine.train(request))  # looking moves the model that trains
        for update in (update for cohort in cohorts for update in cohort.updates()):
            self.coordinator.see(request, update)
        yield from cohorts


def _refuse(config: Config) -> None:
    refuse_what_is_not_shared(config)
    for key, given, why in (
        (
            "privacy.unit: client",
            config.privacy.unit == "client",
            "the coordinator adds the noise and sees every update as it is; audit it as it would "
            "be without the section privacy",
        ),
        (
            "secure.aggregation: masked",
            config.secure.masked,
            "the coordinator sees no client's update, but their sum",
        ),
        (
            "federation.strategy: centralised",
            config.federation.strategy == "centralised",
            "there is no coordinator; use another strategy, with federation.num_clients: 1",
        ),
    ):
        if given:
            raise UsageError(f"{key}: {why}")
