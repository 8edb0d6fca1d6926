"""DP-SGD at a client: which examples a step takes, clipping of each, and the noise of a step.

Abadi et al. 2016 (arXiv:1607.00133, algorithm 1). Every example of the n is in a step's batch with
the probability q = batch_size / n, by itself, and a local epoch has round(n / batch_size) steps. A
step's gradient is (sum_i clip(g_i, C) + N(0, (z C)^2)) / batch_size, also where nobody is in its
batch; then comes the optimizer, as without privacy. Dropout and augmentation are drawn by example,
so that one example more changes nothing about the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fedclip.federated.privacy.secret import Draws
from fedclip.records import State, TrainRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray


_ROUNDING = 1 + 1e-6
"""So that rounding never leaves a clipped norm above the bound."""


def steps_of(examples: int, batch_size: int) -> int:
    """Optimizer steps of a local epoch."""
    return round(examples / batch_size)


@dataclass(frozen=True)
class DpSgd:
    """The clients' DP-SGD: the norm C, each client's noise multiplier z, and the secret's draws."""

    clip_norm: float
    multipliers: Mapping[str, float]
    draws: Draws
    batch_size: int

    def of(self, client_id: str, request: TrainRequest) -> ClientDpSgd:
        """One client's part in a request, which has a digest to name its draws by."""
        assert request.digest is not None
        names = (request.purpose, request.server_round, request.digest, client_id)
        return ClientDpSgd(self, self.multipliers[client_id], names)


@dataclass(frozen=True)
class ClientDpSgd:
    """What one client draws in one request."""

    whole: DpSgd
    multiplier: float
    names: tuple[str | int, ...]

    def plan(self, indices: NDArray[np.int64], epochs: int) -> list[list[NDArray[np.int64]]]:
        """Each step's batch of example indices, as its only micro-batch; some may be empty."""
        rate = self.whole.batch_size / len(indices)
        steps = epochs * steps_of(len(indices), self.whole.batch_size)
        draws = (
            self.whole.draws.uniforms(len(indices), *self.names, "batch", step)
            for step in range(steps)
        )
        return [[indices[own < rate]] for own in draws]

    def noise(self, step: int, count: int) -> torch.Tensor:
        """The noise on a step's sum of clipped gradients, `[count]` in float64: one draw."""
        drawn = self.whole.draws.normals(count, *self.names, "noise", step)
        return torch.from_numpy(drawn * (self.multiplier * self.whole.clip_norm))

    def private(self, sums: State, step: int) -> dict[str, torch.Tensor]:
        """The step's gradient by name, of the sums of clipped gradients."""
        names, size = sorted(sums), self.whole.batch_size  # sorted: one order for all engines
        sizes = [sums[name].numel() for name in names]
        parts = dict(zip(names, self.noise(step, sum(sizes)).split(sizes), strict=True))
        return {n: (t + parts[n].view(t.shape).to(t)) / size for n, t in sums.items()}


class Gradients(NamedTuple):
    """A step's gradient by name, and the sum of its examples' losses."""

    by_name: dict[str, torch.Tensor]
    loss: float


@torch.no_grad()
def clip_rows(flat: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Gradients of examples `[rows, numbers]`, each scaled to a norm of at most `clip_norm`.

    One that is not finite becomes zero: no example may change the sum by more than the norm.
    """
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=torch.float64)
    factors = clip_factors(norms, clip_norm).to(flat.dtype)
    return torch.where(norms.isfinite(), flat * factors, 0.0)


def clip_factors(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """What brings gradients of these norms to one of at most `clip_norm`."""
    return (clip_norm / (norms * _ROUNDING).clamp(min=1e-30)).clamp(max=1.0)


def example_gradients(
    losses: Iterable[torch.Tensor],
    live: Mapping[str, torch.nn.Parameter],
    leaves: Mapping[str, torch.nn.Parameter],
    frames: State,
    private: ClientDpSgd,
    step: int,
) -> Gradients:
    """A step's private gradient by the leaves, and the sum of the losses: one example at a time.

    It is the readable reference. `live` are the model's tensors; for a name in `frames` the leaf
    is the core R of B = F R.
    """
    sums = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    total = 0.0
    for loss in losses:
        found: Any = torch.autograd.grad(loss, [live[name] for name in leaves], allow_unused=True)
        gradients = [
            torch.zeros_like(leaf) if g is None else frames[n].T @ g if n in frames else g
            for (n, leaf), g in zip(leaves.items(), found, strict=True)
        ]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        row = clip_rows(flat[None], private.whole.clip_norm)[0]
        parts = row.split([gradient.numel() for gradient in gradients])
        for tensor, part in zip(sums.values(), parts, strict=True):
            tensor += part.view_as(tensor)
        total += loss.item()
    return Gradients(private.private(sums, step), total)
