"""Many clients' trained tensors in one flat buffer, and AdamW and SGD on it: one call for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import torch

from fedclip.federated.parameter_rules import decays
from fedclip.lora.layer_patterns import factor_of
from fedclip.records import State

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class StackedParameters:
    """Copies of a state for several clients, `[clients, numbers]`, seen as tensors by name.

    Everything elementwise (optimizer, clipping, checks) is then one operation for all tensors.
    """

    def __init__(self, states: Sequence[State], names: Sequence[str]) -> None:
        """Takes each client's start; only the tensors in `names` are held."""
        self._places: dict[str, tuple[int, int, torch.Size]] = {}
        start = 0
        for name in names:
            shape = states[0][name].shape
            self._places[name] = (start, start + shape.numel(), shape)
            start += shape.numel()
        self.values = states[0][names[0]].new_empty(0)  # the format and place of what follows
        self.values = self.flat_rows(states)
        self.grads = torch.zeros_like(self.values)

    def room_for(self, clients: int) -> StackedParameters:
        """The same layout for so many clients, who all have the first one's values."""
        other = copy(self)
        other.values = self.values[:1].repeat(clients, 1)
        other.grads = torch.zeros_like(other.values)
        return other

    @property
    def layout(self) -> tuple[tuple[str, torch.Size], ...]:
        """Names and shapes of the tensors, in the order of their numbers."""
        return tuple((name, shape) for name, (_, _, shape) in self._places.items())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of their numbers."""
        return tuple(self._places)

    def leaves(self, clients: int) -> dict[str, torch.Tensor]:
        """The first clients' tensors `[clients, ...]`, to differentiate by."""
        views = self.views(self.values[:clients])
        return {name: view.detach().requires_grad_() for name, view in views.items()}

    def add_gradient(self, loss: torch.Tensor, leaves: Mapping[str, torch.Tensor]) -> None:
        """Adds the gradient of a loss by the leaves to `grads`."""
        found = torch.autograd.grad(loss, list(leaves.values()))
        flat = torch.cat([g.flatten(1) for g in found], dim=1)
        self.grads[: len(flat)].add_(flat)

    def anchors(self, state: State | None) -> torch.Tensor:
        """The anchor of a proximal term, `[clients, numbers]`: one state, or one per client."""
        if state is None:
            return self.values.clone()
        return self.flat_rows([state]).expand_as(self.values)

    def flat_rows(self, states: Sequence[State]) -> torch.Tensor:
        """One state per client, laid out as `values`."""
        first, *others = states
        alike = all(s[name] is first[name] for s in others for name in self._places)
        different = [first] if alike else states
        rows = [torch.cat([s[name].flatten() for name in self._places]) for s in different]
        return torch.stack(rows).to(self.values).expand(len(states), -1).contiguous()

    def spread(self, values: Mapping[str, float]) -> torch.Tensor:
        """A value for each tensor as one for each of its numbers: `[numbers]`."""
        parts = [
            self.values.new_full((end - start,), values[name])
            for name, (start, end, _) in self._places.items()
        ]
        return torch.cat(parts)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A buffer `[clients, numbers]` as tensors by name."""
        return {
            name: flat[:, start:end].view(len(flat), *shape)
            for name, (start, end, shape) in self._places.items()
        }


class StackedOptimizer:
    """Steps flat parameters; elementwise, so clients never touch each other.

    `adamw` is Loshchilov & Hutter 2019 (arXiv:1711.05101, algorithm 2) as in `torch.optim.AdamW`,
    `sgd` plain gradient descent with the weight decay in the gradient.
    """

    def __init__(
        self,
        kind: str,
        parameters: StackedParameters,
        *,
        weight_decay: float,
        rate_pattern: Mapping[str, float] | None = None,
    ) -> None:
        """Takes the parameters, which are changed in place.

        `rate_pattern` has factors on the rates of the tensors that patterns fit.
        """
        self._kind = kind
        self._parameters = parameters
        self._decay = self._by_number({n: weight_decay * decays(s) for n, s in parameters.layout})
        self._first = torch.zeros_like(parameters.values if kind == "adamw" else torch.empty(0))
        self._second = torch.zeros_like(self._first)
        pattern = rate_pattern or {}
        self._factors = self._by_number({n: factor_of(pattern, n) for n in parameters.names})
        self._steps = 0

    def _by_number(self, values: Mapping[str, float]) -> float | torch.Tensor:
        """One value for all tensors, or one for each of their numbers, `[numbers]`."""
        first, *others = values.values()
        return self._parameters.spread(values) if any(v != first for v in others) else first

    @torch.no_grad()
    def step(self, rates: torch.Tensor) -> None:
        """One step of the first `len(rates)` clients, at rates `[active]`; others stay as they are.

        The active clients are always those that have taken every step so far.
        """
        self._steps += 1
        self.apply(rates.to(self._parameters.values), *corrections(self._steps))

    def restart(self) -> None:
        """Forgets all steps."""
        self._first.zero_()
        self._second.zero_()
        self._steps = 0

    @torch.no_grad()
    def apply(
        self, rates: torch.Tensor, first_share: float | torch.Tensor, root: float | torch.Tensor
    ) -> None:
        """The same with the step's `corrections` given; on a GPU without waiting for the host."""
        active = len(rates)
        values, grads = self._parameters.values[:active], self._parameters.grads[:active]
        rate = rates[:, None] * self._factors
        if self._kind == "sgd":
            if isinstance(self._decay, torch.Tensor):
                decayed = grads + values * self._decay
            else:
                decayed = grads.add(values, alpha=self._decay)
            values.sub_(decayed.mul_(rate))
            return
        first, second = self._first[:active], self._second[:active]
        values.mul_(1 - rate * self._decay)
        first.lerp_(grads, 1 - BETA1)
        second.mul_(BETA2).addcmul_(grads, grads, value=1 - BETA2)
        spread = second.sqrt().div_(root).add_(EPSILON)
        values.sub_(torch.div(first, spread, out=spread).mul_(rate / first_share))


def corrections(step: int) -> tuple[float, float]:
    """What AdamW's step of this number divides the first moment, and the second's root, by."""
    return 1 - BETA1**step, (1 - BETA2**step) ** 0.5


@torch.no_grad()
def clip_by_client(grads: torch.Tensor, max_norm: float) -> None:
    """Scales each client's gradient `[clients, numbers]` to a norm of at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` does for one client, its 1e-6 included.
    """
    norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    grads.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0))
