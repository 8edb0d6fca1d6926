"""One step of a server's optimizer on a pseudo-gradient, its memory kept as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from fedclip.config.lookup import load
from fedclip.records import State

_MEMORY = "optimizer/"


Parameters = list[torch.Tensor]
Options = Mapping[str, float]
Accumulator = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Takes v, the square of the gradient and b2, and gives the next v."""


class Adaptive(torch.optim.Optimizer):
    """FedAdagrad, FedAdam and FedYogi (Reddi et al. 2021, arXiv:2003.00295, algorithm 2).

    m = b1 m + (1 - b1) g; v by the `accumulator`; w -= lr m / (sqrt(v) + tau). m starts at zero, v
    at tau^2, and neither is corrected for its start.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], options: Options, accumulator: Accumulator
    ) -> None:
        """Takes the parameters, `learning_rate`, `beta1`, `beta2` and `tau`, and the rule of v."""
        super().__init__(params, dict(options))
        self._accumulator = accumulator

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p]
                if not kept:
                    kept["exp_avg"] = torch.zeros_like(p)
                    kept["exp_avg_sq"] = torch.full_like(p, group["tau"] ** 2)
                m, v = kept["exp_avg"], kept["exp_avg_sq"]
                m.lerp_(p.grad, 1 - group["beta1"])
                v.copy_(self._accumulator(v, p.grad.square(), group["beta2"]))
                p.sub_(group["learning_rate"] * m / (v.sqrt() + group["tau"]))


def avgm(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """FedAvgM: SGD with momentum."""
    return torch.optim.SGD(parameters, lr=options["learning_rate"], momentum=options["beta1"])


def adagrad(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """FedAdagrad: v + g^2."""
    return Adaptive(parameters, options, lambda v, square, beta: v + square)


def adam(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """FedAdam: b2 v + (1 - b2) g^2."""
    return Adaptive(parameters, options, lambda v, square, beta: v.lerp(square, 1 - beta))


def yogi(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """FedYogi: v - (1 - b2) g^2 sign(v - g^2)."""
    return Adaptive(
        parameters, options, lambda v, square, beta: v - (1 - beta) * square * (v - square).sign()
    )


def server_step(
    name: str,
    values: State,
    gradients: State,
    memory: State,
    options: Mapping[str, float],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """New values by name, and what the optimizer remembers for the next step, as tensors."""
    names = list(values)
    parameters = [values[n].detach().clone().requires_grad_() for n in names]
    optimizer = load("server_optimizers", name)(parameters, options)
    for tensor_name, parameter in zip(names, parameters, strict=True):
        parameter.grad = gradients[tensor_name].clone()
        prefix = f"{_MEMORY}{tensor_name}/"
        kept = {k.removeprefix(prefix): t for k, t in memory.items() if k.startswith(prefix)}
        if kept:
            optimizer.state[parameter] = {k: t.clone() for k, t in kept.items()}
    optimizer.step()
    after = {
        f"{_MEMORY}{n}/{key}": torch.as_tensor(value).clone()
        for n, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }
    return {n: p.detach() for n, p in zip(names, parameters, strict=True)}, after
