"""Strategies that average tensors one by one, in coordinates that all clients share."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedclip.federated.strategies.base import (
    Setting,
    Strategy,
    Train,
    examples,
    kept_by,
    own_starts,
    refuse_ranks,
)
from fedclip.lora.names import factor_names
from fedclip.records import RunState, TrainRequest


class FedAvg(Strategy):
    """Mean of the clients' tensors, weighted by their training examples.

    McMahan et al. 2017 (arXiv:1602.05629, algorithm 1): w = sum_i p_i w_i, with p_i the share of
    examples. With `client.proximal_mu` it is FedProx (Li et al. 2020, arXiv:1812.06127).
    Bytes per client and round, up and down: 4 for each trained number.
    """

    def __init__(self, setting: Setting | None = None) -> None:
        """Refuses clients of different ranks."""
        super().__init__(setting)
        refuse_ranks(self.setting, "in a plain mean, rows that few clients hold would shrink")

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The weighted mean."""
        return replace(state, shared={**state.shared, **train(self.asked(request)).mean()})


class FedIT(FedAvg):
    """Mean of A and mean of B, which is not the mean of B A.

    Zhang et al. 2023 (arXiv:2305.05644): A = sum_i p_i A_i, B = sum_i p_i B_i, with p_i the share
    of examples. It misses the exact mean by the covariance of the factors.
    Bytes per client and round, up and down: 4 r (in + out) for each layer.
    """


class FFA(FedIT):
    """A stays as it was drawn, the same for all, and B is averaged: the exact mean.

    Sun et al. 2024 (arXiv:2403.12313): sum_i p_i B_i A = (sum_i p_i B_i) A.
    Bytes per client and round, up and down: 4 r out for each layer, half of FedIT's.
    """

    def asked(self, request: TrainRequest) -> TrainRequest:
        """Trains all but A."""
        return without(request, "a")


class RoLoRA(FedIT):
    """B is trained and averaged in odd rounds, A in even ones: exact means.

    Chen et al. 2025 (arXiv:2502.01755): sum_i p_i B_i A = (sum_i p_i B_i) A, and the other way
    round. The first round trains B, as A gets no gradient while B is zero.
    Bytes per client and round, up and down: 4 r out or 4 r in for each layer, in turns.
    """

    def asked(self, request: TrainRequest) -> TrainRequest:
        """Trains all but the factor whose turn it is not."""
        return without(request, "a" if request.server_round % 2 else "b")


class FedSA(FedIT):
    """A is averaged, B (and a linear head) stays with its client: personal models.

    Guo et al. 2024 (arXiv:2410.01463): A = sum_i p_i A_i. A newcomer starts with it and B = 0.
    Bytes per client and round, up and down: 4 r in for each layer.
    """

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The mean of A; every client keeps the rest."""
        shared_names = factor_names(state.shared, "a")
        updates = train(replace(request, starts=own_starts(state), sent=shared_names)).stacked()
        weights = examples(updates)
        shares = weights / weights.sum()
        means = {n: mean_of(updates.tensors[n], shares) for n in sorted(shared_names)}
        rest = [name for name in updates.tensors if name not in shared_names]
        private = kept_by(state, updates, rest)
        return replace(state, shared={**state.shared, **means}, private=private)


class QFedAvg(FedAvg):
    """Clients with a higher loss weigh more: q-FedAvg, for accuracies that differ less.

    Li et al. 2020 (arXiv:1905.10497, algorithm 2): with D_i = L (w - w_i) and the loss F_i before
    training, w' = w - sum_i F_i^q D_i / sum_i (q F_i^(q-1) |D_i|^2 + L F_i^q). L is
    1 / learning rate, as theirs: the mean rate of the round's steps, which a schedule lowers from
    round to round. q = 0 is the unweighted mean. Made for plain SGD, whose step is the gradient
    times the rate. Bytes as FedAvg, and two numbers: the loss, and the sum of the rates.
    """

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """One step of algorithm 2."""
        q = self.setting.options["q"]
        updates = train(replace(request, start_loss=True)).stacked()
        reports = updates.reports
        rate = sum(r.rate_sum for r in reports) / max(1, sum(r.steps for r in reports))
        if rate == 0:  # fp16 left all steps out: nobody has moved
            return state
        losses = torch.tensor([r.start_loss for r in updates.reports], dtype=torch.float64)
        losses = losses.clamp(min=1e-10)
        # Numerator and denominator by the largest F^q, which alone may be no number of float64.
        largest, losses = losses.max(), losses / losses.max()
        steps = {  # D_i, [clients, ...]
            name: (state.shared[name].double() - stacked.double()) / rate
            for name, stacked in updates.tensors.items()
        }
        squares = sum(step.flatten(1).square().sum(dim=1) for step in steps.values())
        curvature = q * losses ** (q - 1) * squares / largest + losses**q / rate
        weights = losses**q / curvature.sum()
        shared = {
            name: (state.shared[name].double() - torch.tensordot(weights, step, dims=1)).to(
                state.shared[name].dtype
            )
            for name, step in steps.items()
        }
        return replace(state, shared={**state.shared, **shared})


class LocalOnly(Strategy):
    """Every client trains alone, from where it ended: nothing is exchanged.

    The end of the scale at which collaboration is worth nothing. Bytes: none.
    """

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """Every client's personalised tensors."""
        updates = train(replace(request, starts=own_starts(state), sent=frozenset())).stacked()
        return replace(state, private=kept_by(state, updates), news={})


def without(request: TrainRequest, factor: str) -> TrainRequest:
    """The request with all A ("a") or all B ("b") as they are."""
    names = request.state.keys() if request.trained is None else request.trained
    return replace(request, trained=frozenset(names) - factor_names(request.state, factor))


def mean_of(stacked: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Weighted mean over the leading axis, summed in float64."""
    return torch.tensordot(shares, stacked.double(), dims=1).to(stacked.dtype)
