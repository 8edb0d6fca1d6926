"""A strategy of one's own: a mean that a few clients cannot pull away.

    fedclip run configs/quickstart.yaml federation.strategy=examples/custom_strategy.py:TrimmedMean

docs/how-to-your-own-strategy.md explains it line by line.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedclip.federated.strategies import Strategy
from fedclip.federated.strategies.base import Train
from fedclip.lora.names import factor_names
from fedclip.records import RunState, TrainRequest

CUT = 0.2
"""Share of the clients to leave out at each end."""


class TrimmedMean(Strategy):
    """For each number of B, the mean of the clients without the highest and the lowest fifth.

    Yin et al. 2018 (arXiv:1803.01498, definition 2). All have the same A, which is not trained: so
    to trim B is to trim what the clients learned, B A, seen in the coordinates that A gives. Every
    client counts the same, as a large one could otherwise not be left out.
    Bytes per client and round, up and down: 4 r out for each layer.
    """

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """Has B trained, and takes its trimmed mean."""
        trained = frozenset(request.state) - factor_names(request.state, "a")
        updates = train(replace(request, trained=trained)).stacked()
        means = {name: trimmed_mean(tensor, CUT) for name, tensor in updates.tensors.items()}
        return replace(state, shared={**state.shared, **means})


def trimmed_mean(stacked: torch.Tensor, cut: float) -> torch.Tensor:
    """Mean over the first axis without the share `cut` (below 1/2) of values at each end."""
    count = int(cut * len(stacked))
    ordered = stacked.sort(dim=0).values
    return ordered[count : len(stacked) - count].mean(dim=0)
