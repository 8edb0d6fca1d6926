"""The optimizer of one client: groups by rate and decay, corrected gradients, clipped steps.

`engines/stacked_optimizer.py` is its twin for many clients at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fedclip.federated.local_steps import LocalSettings
from fedclip.federated.parameter_rules import decays
from fedclip.lora.layer_patterns import factor_of
from fedclip.records import State

Leaves = Mapping[str, torch.nn.Parameter]
"""What the optimizer steps, by name."""


def make_optimizer(parameters: Leaves, settings: LocalSettings) -> torch.optim.Optimizer:
    """An optimizer with a group for each factor on the learning rate and each weight decay."""
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.optimizer]
    grouped: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = settings.weight_decay if decays(parameter.shape) else 0.0
        grouped.setdefault((factor_of(settings.rate_pattern, name), decay), []).append(parameter)
    groups = [
        {"params": own, "factor": factor, "weight_decay": decay}
        for (factor, decay), own in grouped.items()
    ]
    return kind(groups, lr=settings.learning_rate)


def make_scaler(settings: LocalSettings, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler of fp16; one that does nothing in other precisions."""
    fp16 = settings.precision == "fp16"
    return torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=fp16)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of a step, in each group times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def correction(
    leaves: Leaves, mu: float, anchor: State | None, offsets: State
) -> Callable[[], None]:
    """What corrects each step's gradients: SCAFFOLD's offsets, and FedProx's proximal pull.

    The pull, of weight `mu`, is to the `anchor`, None for where the leaves are now.
    """
    anchors = {name: leaf.detach().clone() for name, leaf in leaves.items()} if mu else {}
    anchors |= {name: anchor[name].to(leaf) for name, leaf in leaves.items()} if anchor else {}

    def correct() -> None:
        for name, leaf in leaves.items():
            if leaf.grad is None:
                continue
            if name in offsets:
                leaf.grad.add_(offsets[name].to(leaf))
            if mu:
                leaf.grad.add_(leaf.detach() - anchors[name], alpha=mu)

    return correct


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    leaves: Leaves,
    max_grad_norm: float | None,
) -> bool:
    """Clip, step and clear the gradients; False where they overflowed and the step was skipped."""
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), max_grad_norm)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return scaler.get_scale() >= scale
