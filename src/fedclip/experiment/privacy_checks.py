"""What a private run is refused for, or warned of, before anything is written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

from fedclip.config import Config
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.context import RunContext
from fedclip.experiment.privacy import noise_of
from fedclip.federated.privacy.accounting import require_accountant
from fedclip.federated.privacy.adaptive_clip import noise_of_sum
from fedclip.federated.privacy.charging import Refused, refuse
from fedclip.federated.privacy.client_level import ClientMechanism, PrivateMean
from fedclip.federated.privacy.secret import Draws
from fedclip.federated.strategies import Strategy
from fedclip.federated.updates import Updates
from fedclip.records import ClientReport, Cohort, RunState, TrainRequest

FEW_CLIENTS = 100
LOUD = 3.0
"""Ratio of a round's noise to the clip norm above which the mean is mostly noise."""


def check_privacy(context: RunContext, choose: Callable[[RunContext], Strategy]) -> None:
    """Refuse what cannot be promised, before anything is written.

    A strategy that `choose` makes is asked for a round without training, to learn what it reads.
    """
    config = context.config
    if config.privacy.unit is None:
        return
    require_fit(context)
    numbers = _dry_round(context, choose(context))
    if config.privacy.unit == "client":
        _warn_of_noise(context, numbers)


def require_at_sites(config: Config) -> None:
    """Raise UsageError for what sites on other machines cannot promise."""
    privacy = config.privacy
    if privacy.unit is None:
        return
    reasons = {
        "privacy.unit: client": (
            privacy.unit == "client",
            "is for runs on one machine; over several machines each site hides its own examples: "
            "privacy.unit: example",
        ),
        "privacy.reproducible": (
            privacy.reproducible,
            "does not go with sites, which draw their noise from secrets of their own; leave it "
            "out",
        ),
        "privacy.tell": (
            privacy.tell,
            "does not go with sites, which tell nothing beside the guarantee; leave it out",
        ),
    }
    for key, (given, why) in reasons.items():
        if given:
            raise UsageError(f"{key} {why}")


def require_fit(context: RunContext) -> None:
    """Raise UsageError where the clients of a built run are not such as its privacy needs."""
    require_accountant()
    if texts := list(_misfits(context)):
        raise UsageError("; ".join(texts))


def _misfits(context: RunContext) -> Iterator[str]:
    """What only a built run shows."""
    privacy, clients, size = context.config.privacy, context.clients, context.config.data.batch_size
    assert privacy.delta is not None
    if context.processes.count > 1:
        yield "privacy: a private run is one process; leave torchrun out"
    if context.sites is not None:
        return  # each site sees to it by itself
    if privacy.unit == "client":
        if privacy.delta >= 1 / len(clients):
            yield (
                f"privacy.delta must be less than one over the number of clients, 1/{len(clients)} "
                f"({1 / len(clients):.3g}), got {privacy.delta:g}"
            )
        return
    if context.precision == "fp16":
        yield "precision: fp16 does not go with privacy.unit: example; use fp32 or bf16"
    small = sorted(c for c, n in clients.items() if n < size)
    if small:
        yield (
            f"data.batch_size: {size} is more than the {clients[small[0]]} training examples of "
            f"client {small[0]} (and of {len(small)} clients in all), who would be asked for "
            "all of them in every step; lower it, or leave such clients out"
        )
    most = max(clients, key=lambda c: clients[c])
    if privacy.delta >= 1 / clients[most]:
        yield (
            f"privacy.delta must be less than one over a client's training examples, 1/"
            f"{clients[most]} ({1 / clients[most]:.3g}) for client {most}, got {privacy.delta:g}"
        )
    names = set(context.model.trainable())
    if context.stacked is not None and (idle := names - set(context.stacked.trained)):
        yield (
            f"model.lora.target_modules: with a linear head {sorted(idle)[0]} gets no gradient, "
            "and noise would be all that it learns; leave text_encoder out"
        )


def _dry_round(context: RunContext, strategy: Strategy) -> int:
    """Raise what a strategy is refused for, by a round in which nobody trains.

    Returns how many numbers a client sends.
    """
    state = context.model.get_parameters()
    ids = tuple(sorted(context.clients))[:2]
    hides_clients = context.config.privacy.unit == "client"
    numbers = [0]

    def train(request: TrainRequest) -> Updates:
        numbers.append(sum(request.state[name].numel() for name in request.names_sent))
        if not hides_clients:
            refuse(request)
        cohorts = (
            Cohort(
                (ClientReport(c, 1, 1.0, 1, 0.0, 1.0, 1.0),),
                {n: t[None] for n, t in request.start(c).items() if n in request.names_sent},
            )
            for c in request.client_ids
        )
        updates = Updates(request, cohorts)
        return PrivateMean(updates, mechanism, lambda request: None) if hides_clients else updates

    mechanism = ClientMechanism(1.0, 1.0, len(ids), len(ids), Draws(b"dry"))
    request = TrainRequest(1, ids, state, shift={})
    try:
        strategy.round(RunState(state), request, train)
    except Refused:
        raise
    except Exception:
        pass  # what only such updates run into; the first round tells of what real ones do
    return max(numbers)


def _warn_of_noise(context: RunContext, numbers: int) -> None:
    """Say where so few clients, or so many numbers, leave little but noise; refuse none at all."""
    privacy, expected = context.config.privacy, context.clients_per_round
    assert privacy.delta is not None
    rate, rounds = expected / len(context.clients), context.config.federation.rounds
    noise = noise_of(privacy, rate, rounds)
    if privacy.clip_quantile is not None:
        noise = noise_of_sum(noise, expected)
    ratio = noise * math.sqrt(numbers) / expected
    if ratio > LOUD:
        warnings.warn(
            f"privacy.unit: client: a round's noise on {numbers:,} numbers is {ratio:.1f} times "
            "privacy.clip_norm, so little but noise is learned; train fewer layers "
            "(model.lora.last_layers, federation.strategy: ffa), or ask more clients a round",
            FedclipWarning,
            stacklevel=4,
        )
    if len(context.clients) < FEW_CLIENTS:
        warnings.warn(
            f"privacy.unit: client with {len(context.clients)} clients: noise that hides one among "
            "so few drowns what they have in common; privacy.unit: example is made for that",
            FedclipWarning,
            stacklevel=4,
        )
