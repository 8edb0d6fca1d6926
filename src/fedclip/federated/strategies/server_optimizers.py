"""One step of a server's optimizer on a pseudo-gradient, its memory kept as plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fedclip.catalog import load
from fedclip.records import State

_MEMORY = "optimizer/"


class Yogi(torch.optim.Optimizer):
    """Yogi (Zaheer et al. 2018; FedYogi in Reddi et al. 2021, arXiv:2003.00295, algorithm 2).

    m = b1 m + (1 - b1) g; v = v - (1 - b2) g^2 sign(v - g^2); w -= lr m / (sqrt(v) + tau).
    v starts at tau^2.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Takes the parameters and tau as `eps`."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            (b1, b2), tau = group["betas"], group["eps"]
            for p in group["params"]:
                kept = self.state[p]
                if not kept:
                    kept["exp_avg"] = torch.zeros_like(p)
                    kept["exp_avg_sq"] = torch.full_like(p, tau**2)
                m, v, square = kept["exp_avg"], kept["exp_avg_sq"], p.grad.square()
                m.lerp_(p.grad, 1 - b1)
                v.sub_((1 - b2) * square * (v - square).sign())
                p.sub_(group["lr"] * m / (v.sqrt() + tau))


Parameters = list[torch.Tensor]
Options = Mapping[str, float]


def avgm(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """FedAvgM: SGD with momentum."""
    return torch.optim.SGD(parameters, lr=options["learning_rate"], momentum=options["beta1"])


def adam(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """FedAdam by PyTorch's Adam: v starts at zero, and m and v are corrected for their start.

    Reddi et al. 2021 (arXiv:2003.00295, algorithm 2) start v at tau^2 and correct nothing, as
    `yogi` here.
    """
    rate, betas = options["learning_rate"], (options["beta1"], options["beta2"])
    return torch.optim.Adam(parameters, lr=rate, betas=betas, eps=options["tau"])


def yogi(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """FedYogi, as published."""
    rate, betas = options["learning_rate"], (options["beta1"], options["beta2"])
    return Yogi(parameters, lr=rate, betas=betas, eps=options["tau"])


def adagrad(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """FedAdagrad, but for its step, which is along g and not along its mean m: no `beta1`."""
    rate, tau = options["learning_rate"], options["tau"]
    return torch.optim.Adagrad(parameters, lr=rate, eps=tau, initial_accumulator_value=tau**2)


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
