"""Local training: one client's loss and optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from fedclip.device import autocast, float64_home
from fedclip.errors import TrainingFailed
from fedclip.federated.augment import training_images
from fedclip.federated.local_optimizer import (
    Leaves,
    correction,
    make_optimizer,
    make_scaler,
    optimizer_step,
    set_rate,
)
from fedclip.federated.local_steps import LocalSettings, batches_of, plan_steps
from fedclip.federated.losses import Objective, classification
from fedclip.federated.parameter_rules import bound_temperature
from fedclip.federated.privacy.dp_sgd import ClientDpSgd, example_gradients
from fedclip.federated.update_checks import ADVICE, not_finite, number_fault
from fedclip.records import State, TrainRequest
from fedclip.seeding import ExampleKey, seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray


LossOf = Callable[["NDArray[np.int64]", int, int | str], torch.Tensor]
"""Summed loss of a micro-batch of example indices, in a step, as a part of it."""


class TrainableModel(Protocol):
    """What local training needs of a model."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, classes]` of pixels `[batch, 3, size, size]`."""
        ...

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The tensors to train, by name."""
        ...

    def set_dropout_key(self, key: int | None) -> None:
        """Fixes the dropout masks of the forward passes to come."""
        ...

    def scaled_for_rank(self, rank: int) -> AbstractContextManager[None]:
        """Inside, the adapter is scaled as one of that rank."""
        ...

    def set_shift(self, shift: State) -> None:
        """Adds a change `[out, in]` to frozen weights, by layer."""
        ...

    def train(self, mode: bool = True) -> object:
        """Switches dropout on or off."""
        ...


@dataclass(frozen=True)
class LocalResult:
    """Mean loss over all examples seen, optimizer steps taken, and the sum of their rates.

    `start_loss` is the mean loss before training, nan where it was not asked for.
    """

    loss: float
    steps: int
    rate_sum: float
    start_loss: float


_NOTHING_ELSE = TrainRequest(server_round=0, client_ids=("",), state={})


@dataclass(frozen=True)
class LocalTask:
    """A request to one client, and what of it is on the client's device.

    Names of `frames` stand for their cores R: `cores` are where they start, and after training
    where they ended. `private` is the client's DP-SGD, where examples are kept private.
    """

    request: TrainRequest = _NOTHING_ELSE
    frames: State = field(default_factory=dict)
    cores: dict[str, torch.Tensor] = field(default_factory=dict)
    private: ClientDpSgd | None = None


def local_train(
    model: TrainableModel,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    indices: NDArray[np.int64],
    settings: LocalSettings,
    *,
    seed: int,
    device: torch.device,
    progress: float = 0.0,
    round_share: float = 1.0,
    task: LocalTask | None = None,
    objective: Objective = classification,
) -> LocalResult:
    """Trains the model in place on one client's examples.

    `indices` picks them from `pixels` `[n, 3, size, size]` and `labels` `[n]`. `seed` fixes the
    order of examples and the dropout masks. The learning-rate schedule spans the whole run, of
    which the share `progress` lies behind, and this round takes `round_share`. A step averages
    the `objective` over `batch_size * accumulation_steps` examples, `batch_size` at a time. With
    `proximal_mu` it also pulls towards the state that training started from (FedProx, Li et al.
    2020, arXiv:1812.06127, equation 2).
    """
    task = task or LocalTask()
    data, before = (pixels, labels, indices), math.nan
    if task.request.start_loss:
        before = mean_loss(model, *data, settings, device, objective)
    model.train()
    live = model.trainable()
    leaves = _leaves(live, task)
    correct = _correction(leaves, settings, task)
    optimizer, scaler = make_optimizer(leaves, settings), make_scaler(settings, device)
    steps = _steps(indices, settings, task.private, seed)
    loss_sum = torch.zeros((), dtype=torch.float64, device=float64_home(device))
    rate_sum = 0.0
    loss_of = _loss_of(model, pixels, labels, settings, seed, device, objective)
    for step, micro_batches in enumerate(steps):
        rate = settings.rate(progress + round_share * step / len(steps))
        set_rate(optimizer, rate)
        if task.private is None:
            _backward(loss_of, step, micro_batches, scaler, loss_sum)
            _to_cores(live, leaves, task.frames)
        else:
            _private_gradients(loss_of, step, micro_batches[0], task, live, leaves, loss_sum)
        scaler.unscale_(optimizer)
        correct()
        if optimizer_step(optimizer, scaler, leaves, settings.max_grad_norm):
            rate_sum += rate
        bound_temperature(leaves)
        _from_cores(live, leaves, task.frames)

    model.set_dropout_key(None)
    for parameter in live.values():
        parameter.requires_grad_(True)
    task.cores.update({name: leaves[name].detach() for name in task.frames})
    loss = loss_sum.item() / max(1, sum(len(batch) for batches in steps for batch in batches))
    if (reason := number_fault("loss", loss) or not_finite(leaves)) is not None:
        raise TrainingFailed(f"{reason.words}; {ADVICE}")
    return LocalResult(loss, len(steps), rate_sum, before)


def _loss_of(
    model: TrainableModel,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    settings: LocalSettings,
    seed: int,
    device: torch.device,
    objective: Objective,
) -> LossOf:
    """The summed loss of a micro-batch; its step and part seed dropout and augmentation."""

    def loss_of(batch: NDArray[np.int64], step: int, part: int | str) -> torch.Tensor:
        key = seed_for(seed, "dropout", step, part)
        model.set_dropout_key(ExampleKey(key) if isinstance(part, str) else key)
        shown = training_images(pixels[batch], settings.augment, seed, step, part)
        inputs = torch.from_numpy(shown).to(device)
        targets = torch.from_numpy(labels[batch]).to(device)
        with autocast(settings.precision, device):
            return objective(model, inputs, targets)

    return loss_of


def _correction(leaves: Leaves, settings: LocalSettings, task: LocalTask) -> Callable[[], None]:
    asked = task.request
    mu = settings.proximal_mu if asked.proximal_mu is None else asked.proximal_mu
    return correction(leaves, mu, asked.anchor, asked.offsets.get(asked.client_ids[0], {}))


def _steps(
    indices: NDArray[np.int64], settings: LocalSettings, private: ClientDpSgd | None, seed: int
) -> list[list[NDArray[np.int64]]]:
    """Micro-batches of example indices by step; of DP-SGD one Poisson batch each."""
    if private is not None:
        return list(private.plan(indices, settings.local_epochs))
    return list(plan_steps(indices, settings, seed))


def _backward(
    loss_of: LossOf,
    step: int,
    micro_batches: Sequence[NDArray[np.int64]],
    scaler: torch.amp.GradScaler,
    loss_sum: torch.Tensor,
) -> None:
    """Accumulate the gradient of a step's mean loss over its micro-batches."""
    examples = sum(len(batch) for batch in micro_batches)
    for part, batch in enumerate(micro_batches):
        loss = loss_of(batch, step, part)
        scaler.scale(loss / examples).backward()
        loss_sum += loss.detach().to(loss_sum)


def _private_gradients(
    loss_of: LossOf,
    step: int,
    batch: NDArray[np.int64],
    task: LocalTask,
    live: Leaves,
    leaves: Leaves,
    loss_sum: torch.Tensor,
) -> None:
    """Set a step's gradient by DP-SGD: clipped by example, summed, with noise."""
    assert task.private is not None
    # Draws go by the example: one more of them must change nothing about the others.
    alone = (loss_of(i[None], step, f"example {i}") for i in batch)
    gradients = example_gradients(alone, live, leaves, task.frames, task.private, step)
    for name, own in gradients.by_name.items():
        leaves[name].grad = own
    loss_sum += gradients.loss


def _to_cores(live: Leaves, leaves: Leaves, frames: State) -> None:
    """Turn gradients of B = frame @ R into those of the cores R: dR = frame^T dB."""
    for name, frame in frames.items():
        gradient = live[name].grad  # [out, r]
        leaves[name].grad = None if gradient is None else frame.T @ gradient  # [r, r]


@torch.no_grad()
def _from_cores(live: Leaves, leaves: Leaves, frames: State) -> None:
    """Set B = frame @ R in the model after a step on the cores R."""
    for name, frame in frames.items():
        live[name].grad = None
        live[name].copy_(frame @ leaves[name])


def _leaves(live: dict[str, torch.nn.Parameter], task: LocalTask) -> dict[str, torch.nn.Parameter]:
    """What the optimizer steps, by name: the trained tensors, or the cores in their place."""
    leaves = {}
    for name, parameter in live.items():
        wanted = task.request.trained is None or name in task.request.trained
        parameter.requires_grad_(wanted)
        if wanted:
            core = task.cores.get(name) if name in task.frames else None
            leaves[name] = parameter if core is None else torch.nn.Parameter(core.clone())
    return leaves


@torch.no_grad()
def mean_loss(
    model: TrainableModel,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    indices: NDArray[np.int64],
    settings: LocalSettings,
    device: torch.device,
    objective: Objective = classification,
) -> float:
    """Mean loss over a client's examples as they are, without dropout."""
    model.train(False)
    total = 0.0
    for batch in batches_of(indices, settings):
        inputs = torch.from_numpy(pixels[batch]).to(device)
        targets = torch.from_numpy(labels[batch]).to(device)
        with autocast(settings.precision, device):
            total += objective(model, inputs, targets).item()
    return total / len(indices)
