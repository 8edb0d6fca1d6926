"""What crosses borders: requests to clients, their updates, the record of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

State = Mapping[str, "torch.Tensor"]
"""Trainable tensors by name: what travels, and what an aggregation works on."""


@dataclass(frozen=True)
class TrainRequest:
    """What the server asks of a round's clients.

    `state` is the global state they start from; `progress` the share of the run that lies behind,
    in [0, 1), and `round_share` the share that one round takes: learning-rate schedules need both.
    `ranks` tells the LoRA rank of clients that train fewer rows than the state has: they start from
    the first `rank` rows of A and columns of B, at the scaling of that rank; the rest stays zero.
    """

    server_round: int
    client_ids: tuple[str, ...]
    state: State
    progress: float = 0.0
    round_share: float = 1.0
    ranks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientReport:
    """What a client says about its training, besides the tensors."""

    client_id: str
    num_examples: int
    loss: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Cohort:
    """Updates of one or more clients, stacked.

    `tensors` holds one tensor per name with a leading client axis, `[clients, ...]`, in the order
    of `reports`. Values are the clients' new tensors, not differences.
    """

    reports: tuple[ClientReport, ...]
    tensors: State
