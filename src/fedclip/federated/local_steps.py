"""A client's optimizer steps in a round: settings, batches and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class LocalSettings:
    """How every client trains; the optimizer starts afresh each round.

    `rate_pattern` has factors on the learning rate, by patterns of `fedclip.lora.layer_patterns`.
    An epoch's last batch joins the one before it where it has fewer than `smallest_batch` examples.
    """

    local_epochs: int = 1
    batch_size: int = 32
    accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    schedule: str = "constant"
    proximal_mu: float = 0.0
    precision: str = "fp32"
    augment: str = "none"
    rate_pattern: Mapping[str, float] = field(default_factory=dict)
    smallest_batch: int = 1

    def rate(self, progress: float) -> float:
        """The learning rate when a share of the run, in [0, 1), lies behind."""
        return self.learning_rate * schedule_factor(self.schedule, progress)


@dataclass(frozen=True)
class RoundPlan:
    """The steps of a client in a round, as `plan_steps` and the schedule have them."""

    settings: LocalSettings
    progress: float
    round_share: float

    def most_steps(self, num_examples: int) -> int:
        """Optimizer steps of a client with so many examples."""
        batches = -(-num_examples // self.settings.batch_size)
        return self.settings.local_epochs * -(-batches // self.settings.accumulation_steps)

    def rate(self, share: float) -> float:
        """The learning rate when a share of the round's steps is done."""
        return self.settings.rate(self.progress + self.round_share * share)


def schedule_factor(schedule: str, progress: float) -> float:
    """Share of the learning rate that is left at `progress` in [0, 1] of the run."""
    return SCHEDULES[schedule](progress)


def plan_steps(
    indices: NDArray[np.int64], settings: LocalSettings, seed: int
) -> Iterator[list[NDArray[np.int64]]]:
    """Yields each optimizer step's micro-batches of example indices, reshuffled every epoch."""
    for epoch in range(settings.local_epochs):
        rng = np.random.default_rng(seed_for(seed, "order", epoch))
        batches = batches_of(rng.permutation(indices), settings)
        for first in range(0, len(batches), settings.accumulation_steps):
            yield batches[first : first + settings.accumulation_steps]


def batches_of(indices: NDArray[np.int64], settings: LocalSettings) -> list[NDArray[np.int64]]:
    """Example indices in their order, cut into batches."""
    starts = list(range(0, len(indices), settings.batch_size))
    if len(starts) > 1 and len(indices) - starts[-1] < settings.smallest_batch:
        starts.pop()
    ends = [*starts[1:], len(indices)]
    return [indices[start:end] for start, end in zip(starts, ends, strict=False)]
