"""AdamW and SGD on stacked clients: one call for all, each with a learning rate of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class StackedOptimizer:
    """Steps parameters `[clients, ...]`; elementwise, so clients never touch each other.

    `adamw` is Loshchilov & Hutter 2019 (arXiv:1711.05101, algorithm 2) in the order of operations
    of `torch.optim.AdamW`, `sgd` plain gradient descent with the weight decay in the gradient.
    """

    def __init__(
        self, kind: str, parameters: Mapping[str, torch.Tensor], *, weight_decay: float
    ) -> None:
        """Takes the leading-client-axis parameters, which are changed in place."""
        self._kind = kind
        self._parameters = list(parameters.values())
        self._weight_decay = weight_decay
        self._first = [torch.zeros_like(p) for p in self._parameters] if kind == "adamw" else []
        self._second = [torch.zeros_like(p) for p in self._parameters] if kind == "adamw" else []
        self._steps = 0

    @torch.no_grad()
    def step(self, rates: torch.Tensor) -> None:
        """One step of the first `len(rates)` clients, at rates `[active]`; others stay as they are.

        The active clients are always those that have taken every step so far.
        """
        self._steps += 1
        active = len(rates)
        for i, whole in enumerate(self._parameters):
            if whole.grad is None:
                continue
            parameter, gradient = whole[:active], whole.grad[:active]
            rate = rates.view(-1, *[1] * (whole.dim() - 1)).to(whole)
            if self._kind == "sgd":
                parameter.sub_(rate * gradient.add(parameter, alpha=self._weight_decay))
                continue
            first, second = self._first[i][:active], self._second[i][:active]
            parameter.mul_(1 - rate * self._weight_decay)
            first.lerp_(gradient, 1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            spread = second.sqrt().div_((1 - BETA2**self._steps) ** 0.5).add_(EPSILON)
            parameter.sub_(rate / (1 - BETA1**self._steps) * (first / spread))

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self._parameters:
            parameter.grad = None


@torch.no_grad()
def clip_by_client(parameters: Mapping[str, torch.Tensor], clients: int, max_norm: float) -> None:
    """Scales each client's gradient to a norm of at most `max_norm`, taken over all its tensors.

    As `torch.nn.utils.clip_grad_norm_` does for one client, its 1e-6 included.
    """
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    squares = [g[:clients].flatten(1).square().sum(dim=1) for g in gradients]
    norms = torch.stack(squares).sum(dim=0).sqrt()  # [clients]
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient[:clients].mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
