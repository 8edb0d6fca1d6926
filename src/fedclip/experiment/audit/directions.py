"""Canaries that are directions: what the mechanism itself lets through of gradients or updates.

A canary's gradient (its update, with `privacy.unit: client`) is as long as the clip norm allows,
along a direction of its own; the directions are orthonormal. Its score is what all noisy sums show
along it, less what the others brought, as who attacks may know all others. No training example is
as easy to find, so noise that is too small is seen at once: the scores are normal, and the distance
d' between those in and out sets epsilon.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from fedclip.config import Config
from fedclip.errors import UsageError
from fedclip.experiment.audit.canaries import FEWEST, refuse_what_is_not_shared
from fedclip.experiment.audit.figures import Audit, Scores, judged
from fedclip.experiment.audit.rounds import train_watched
from fedclip.experiment.build import build, load_data, with_absolute_paths
from fedclip.experiment.openness import Openness
from fedclip.experiment.privacy import MEAN, RunPrivacy
from fedclip.federated.privacy.accounting import Epsilon, Spent, epsilon
from fedclip.federated.privacy.client_level import PrivateMean
from fedclip.federated.privacy.dp_sgd import ClientDpSgd, DpSgd, clip_rows
from fedclip.federated.updates import Guarded, Updates, Weigh, by_examples
from fedclip.records import ClientReport, Cohort, State, TrainRequest
from fedclip.reports.listener import Listener
from fedclip.seeding import seed_for

TOO_LONG = 10.0
"""Canaries are so many times longer than the clip norm, so that clipping is audited as well."""
MOST_BYTES = 4e9
"""What the directions may take."""


def direction_audit(
    config: Config, canaries: int, trainings: int = 1, *, listener: Listener | None = None
) -> Audit:
    """Train a private configuration with planted directions; see the module."""
    refuse_what_is_not_shared(config)
    if config.privacy.unit is None:
        raise UsageError(
            "--direction audits the noise of a private run, and the configuration has no "
            "privacy.unit; leave --direction out, or say what is to be hidden"
        )
    if canaries < FEWEST:
        raise UsageError(f"--canaries must be at least {FEWEST}, got {canaries}")
    config, parts = with_absolute_paths(config), []
    with listener or Listener() as heard, tempfile.TemporaryDirectory() as place:
        data = load_data(config, heard)
        for training in range(trainings):
            planted = Directions(canaries, seed_for(config.seed, "directions", training))
            context = build(config, heard, data=data)
            privacy = train_watched(
                context, Path(place) / str(training), heard, planted=planted.into
            )
            parts.append(Scores(planted.scores, planted.inside, np.zeros(canaries, dtype=np.int64)))
    promise = (planted.epsilon_of(privacy), cast(float, config.privacy.delta))
    return judged(Scores.together(parts), promise)


@dataclass
class Directions:
    """The canaries of one training: who is in, their directions, and what was seen along them."""

    count: int
    seed: int
    client: str = MEAN
    scores: NDArray[np.float64] = field(init=False)
    inside: NDArray[np.bool_] = field(init=False)
    _rng: np.random.Generator = field(init=False)
    _bases: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self.scores = np.zeros(self.count)
        self.inside = self._rng.random(self.count) < 0.5

    def into(self, privacy: Openness) -> Openness:
        """The run's privacy, whose mechanism takes in the canaries as well.

        Of clients that hide examples it is the one that spends most by expectation.
        """
        assert isinstance(privacy, RunPrivacy)
        if privacy.dp_sgd is None:
            return _GuardedByCanaries(**vars(privacy), canaries=self)
        own = privacy.ledger.books.mechanisms
        steps = privacy.steps or {}
        self.client = max(
            own,
            key=lambda c: own[c].sampling_rate * steps[c] ** 0.5 / own[c].noise_multiplier,
        )
        return replace(
            privacy,
            dp_sgd=_PlantedDpSgd(**vars(privacy.dp_sgd), canaries=self),
        )

    def epsilon_of(self, privacy: Openness) -> float:
        """What the ledger says that the canaries' mechanism has spent."""
        assert isinstance(privacy, RunPrivacy)
        ledger = privacy.ledger
        own = ledger.books.mechanisms[self.client]
        steps = ledger.steps(self.client)
        spent = Spent(own.sampling_rate, own.noise_multiplier, steps)
        found: Epsilon = epsilon(spent, ledger.books.delta)
        return found.least

    def taking_part(self, rate: float) -> NDArray[np.bool_]:
        """Poisson-sample the canaries that are in."""
        return self.inside & (self._rng.random(self.count) < rate)

    def rows(self, who: NDArray[np.bool_], like: State, norm: float) -> State:
        """Gradients `[canaries, ...]` by name, each too long by far."""
        flat = self._basis(like)[:, torch.from_numpy(np.flatnonzero(who))].T * (TOO_LONG * norm)
        parts = flat.split([like[n].numel() for n in sorted(like)], dim=1)
        return {n: p.view(-1, *like[n].shape) for n, p in zip(sorted(like), parts, strict=True)}

    def see(self, noisy: State) -> None:
        """Add to each score what a noisy sum shows along its direction."""
        flat = torch.cat([noisy[n].flatten() for n in sorted(noisy)]).float().cpu()
        self.scores += (self._basis(noisy).T @ flat).double().numpy()

    def _basis(self, like: State) -> torch.Tensor:
        """Orthonormal directions `[numbers, canaries]` of tensors of these names."""
        key = tuple(sorted(like))
        if key not in self._bases:
            numbers = sum(t.numel() for t in like.values())
            _check_room(self.count, numbers)
            names = seed_for(self.seed, *key)
            drawn = torch.randn(numbers, self.count, generator=torch.Generator().manual_seed(names))
            self._bases[key] = torch.linalg.qr(drawn).Q
        return self._bases[key]


def _check_room(canaries: int, numbers: int) -> None:
    most = min(numbers, int(MOST_BYTES / (4 * numbers)))
    if canaries > most:
        raise UsageError(
            f"--canaries: of {numbers:,} trained numbers an audit takes at most {most:,} "
            f"directions, got {canaries:,}"
        )


@dataclass(frozen=True)
class _PlantedDpSgd(DpSgd):
    canaries: Directions

    def of(self, client_id: str, request: TrainRequest) -> ClientDpSgd:
        own = super().of(client_id, request)
        if client_id != self.canaries.client:
            return own
        rate = self.batch_size / request.examples[client_id]
        return _PlantedClient(own.whole, own.multiplier, own.names, self.canaries, rate)


@dataclass(frozen=True)
class _PlantedClient(ClientDpSgd):
    canaries: Directions
    rate: float

    def private(self, sums: State, step: int) -> dict[str, torch.Tensor]:
        who, norm = self.canaries.taking_part(self.rate), self.whole.clip_norm
        rows = self.canaries.rows(who, sums, norm)
        flat = clip_rows(torch.cat([rows[n].flatten(1) for n in sums], dim=1), norm).sum(dim=0)
        parts = flat.split([t.numel() for t in sums.values()])
        with_canaries = {
            n: t + p.view_as(t).to(t) for (n, t), p in zip(sums.items(), parts, strict=True)
        }
        found = super().private(with_canaries, step)
        self.canaries.see({n: t * self.whole.batch_size - sums[n] for n, t in found.items()})
        return found


@dataclass(frozen=True, kw_only=True)
class _GuardedByCanaries(RunPrivacy):
    canaries: Directions

    def guard(self, updates: Updates) -> Updates:
        mean = super().guard(updates)
        assert isinstance(mean, PrivateMean)
        seen = _SeenMean(mean, self.canaries)
        updates.apply(seen.plant)
        return seen


class _SeenMean(Guarded):
    """A private mean with canaries among its clients, of which it shows each along its own way."""

    def __init__(self, inner: PrivateMean, canaries: Directions) -> None:
        super().__init__(inner)
        self._private, self._mechanism, self._canaries = inner, inner.mechanism, canaries
        self._names = sorted(self.request.names_sent)
        self._others = {n: torch.zeros_like(self.request.state[n]).double() for n in self._names}
        self._planted = False

    def plant(self, cohort: Cohort) -> Cohort:
        """Add the canaries to the first cohort."""
        flat = self._private.differences(cohort, self._names)
        for name, clipped in self._private.clipped(flat, self._names).items():
            self._others[name] += clipped
        if self._planted:
            return cohort
        self._planted = True
        who = self._canaries.taking_part(self._mechanism.sampling_rate)
        like = {n: self.request.state[n] for n in self._names}
        rows = self._canaries.rows(who, like, self._mechanism.clip_norm)
        reports = tuple(ClientReport(f"canary {k}", 1, 1.0, 1, 0.0) for k in np.flatnonzero(who))
        tensors = {
            n: torch.cat([t, (like[n] + rows[n]).to(t)]) if n in rows else t
            for n, t in cohort.tensors.items()
        }
        return Cohort((*cohort.reports, *reports), tensors)

    def mean(self, weigh: Weigh = by_examples) -> dict[str, torch.Tensor]:
        """The mean, which is looked at."""
        found, start, expected = (
            self.inner.mean(weigh),
            self.request.state,
            self._mechanism.expected,
        )
        sums = {n: (t.double() - start[n].double()) * expected for n, t in found.items()}
        self._canaries.see({n: t - self._others[n] for n, t in sums.items()})
        return found
