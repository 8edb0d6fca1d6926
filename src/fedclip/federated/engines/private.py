"""Private gradients of many clients in one pass: every example is a client of one row.

The stacked model takes as many clients as there are rows, so the gradients of its tensors are those
of single examples. The readable twin is `privacy.dp_sgd.example_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedclip.device import at_least_fp32, float64_home
from fedclip.federated.engines.memory import ROW_BYTES
from fedclip.federated.engines.protocols import Stacked
from fedclip.federated.engines.work import Work
from fedclip.federated.privacy.dp_sgd import clip_factors
from fedclip.records import State
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray


PASS_BYTES = 10**9
"""About so much may the copies and gradients of one pass take; more rows take several."""


class Rows(NamedTuple):
    """The examples of a step, of all clients one after another: index, client, and draws' names."""

    indices: NDArray[np.int64]
    owner: NDArray[np.int64]
    names: list[str]
    seeds: list[int]

    @classmethod
    def of(cls, work: Work, step: int) -> Rows:
        """The rows of those clients that take this step."""
        batches = [micro_batches[0] for micro_batches in work.active(step)]
        owner = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        indices = np.concatenate(batches)
        names = [f"example {index}" for index in indices]
        return cls(indices, owner, names, [work.seeds[k] for k in owner])

    def split(self, size: int) -> Iterator[Rows]:
        """The same rows in parts of at most so many; none of no rows."""
        for first in range(0, len(self.indices), size):
            part = slice(first, first + size)
            yield Rows(self.indices[part], self.owner[part], self.names[part], self.seeds[part])


def add_private_gradients(
    model: Stacked,
    work: Work,
    step: int,
    labels: NDArray[np.int64],
    show: Callable[[Rows, int], torch.Tensor],
) -> torch.Tensor:
    """Put each client's private gradient of a step in its place; returns its summed loss.

    `show` gives the model's inputs of a step's rows.
    """
    assert work.private is not None
    parameters, active = work.group.parameters, len(work.active(step))
    grads, clip_norm = parameters.grads[:active], work.private[0].whole.clip_norm
    sums = torch.zeros(active, dtype=torch.float64, device=float64_home(grads.device))
    for rows in Rows.of(work, step).split(max(1, PASS_BYTES // (ROW_BYTES * grads.shape[1]))):
        owner = torch.from_numpy(rows.owner).to(grads.device)
        leaves, state = work.group.rows(owner)
        named = zip(rows.seeds, rows.names, strict=True)
        seeds = [seed_for(seed, "dropout", step, name) for seed, name in named]
        keys = torch.tensor(seeds, device=grads.device)  # as a tensor: all rows' masks at once
        scores = at_least_fp32(model.logits(state, show(rows, step), [1] * len(owner), keys))
        targets = torch.from_numpy(labels[rows.indices]).to(scores.device)
        losses = cross_entropy(scores, targets, reduction="none")
        sums.index_add_(0, owner.to(sums.device), losses.detach().to(sums))
        found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        _add_clipped(
            parameters.views(grads), dict(zip(leaves, found, strict=True)), owner, clip_norm
        )
    for client, own in enumerate(work.private[:active]):
        of_client = {name: t[client] for name, t in parameters.views(grads).items()}
        for name, tensor in own.private(of_client, step).items():
            of_client[name].copy_(tensor)
    return sums


@torch.no_grad()
def _add_clipped(sums: State, gradients: State, owner: torch.Tensor, clip_norm: float) -> None:
    """Add gradients `[rows, ...]`, clipped jointly, to their clients' sums `[clients, ...]`.

    As `clip_rows` does it, in one product a tensor.
    """
    flat = {name: gradient.flatten(1) for name, gradient in gradients.items()}
    norms = torch.stack(
        [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in flat.values()]
    ).norm(dim=0)
    finite = norms.isfinite()
    if not bool(finite.all()):
        flat = {name: torch.where(finite[:, None], g, 0.0) for name, g in flat.items()}
    factors = torch.where(finite, clip_factors(norms, clip_norm), 0.0)
    clients = len(next(iter(sums.values())))
    weights = factors.new_zeros(clients, len(owner))
    weights[owner, torch.arange(len(owner), device=owner.device)] = factors
    for name, g in flat.items():
        sums[name].add_((weights.to(g) @ g).view_as(sums[name]))
