"""Local training: one client's loss and optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from fedclip.device import autocast, float64_home
from fedclip.errors import TrainingFailed
from fedclip.federated.augment import training_images
from fedclip.federated.losses import Objective, classification
from fedclip.federated.parameter_rules import bound_temperature, decays
from fedclip.federated.privacy.dp_sgd import ClientDpSgd, example_gradients
from fedclip.federated.update_checks import ADVICE, not_finite, number_fault
from fedclip.lora.layer_patterns import factor_of
from fedclip.records import State
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        """Replaces frozen weights by their own plus a change `[out, in]`, by layer."""
        ...

    def train(self, mode: bool = True) -> object:
        """Switches dropout on or off."""
        ...


@dataclass(frozen=True)
class LocalSettings:
    """How every client trains; the optimizer starts afresh each round.

    `rate_pattern` has factors on the learning rate, by patterns of `fedclip.lora.layer_patterns`.
    An epoch's last batch joins the one before it where it has fewer than `smallest_batch` examples.
    """

    local_epochs: int = 1
    batch_size: int = 32
    accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    schedule: str = "constant"
    proximal_mu: float = 0.0
    precision: str = "fp32"
    augment: str = "none"
    rate_pattern: Mapping[str, float] = field(default_factory=dict)
    smallest_batch: int = 1

    def rate(self, progress: float) -> float:
        """The learning rate when a share of the run, in [0, 1), lies behind."""
        return self.learning_rate * schedule_factor(self.schedule, progress)


@dataclass(frozen=True)
class LocalResult:
    """Mean loss over all examples seen, optimizer steps taken, and the sum of their rates.

    `start_loss` is the mean loss before training, nan where it was not asked for.
    """

    loss: float
    steps: int
    rate_sum: float
    start_loss: float


@dataclass(frozen=True)
class LocalTask:
    """What one round asks of one client besides the settings; see `TrainRequest`.

    `trained`, `offsets`, `anchor` and `frames` are by tensor name. Names of `frames` stand for
    their cores R: `cores` are where they start, and after training where they ended. `private` is
    the client's DP-SGD, where examples are kept private.
    """

    trained: frozenset[str] | None = None
    offsets: State = field(default_factory=dict)
    anchor: State | None = None
    proximal_mu: float | None = None
    frames: State = field(default_factory=dict)
    cores: dict[str, torch.Tensor] = field(default_factory=dict)
    start_loss: bool = False
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
    order of examples and the dropout masks. `progress` is the share of the run that lies behind
    and `round_share` what this round takes of it; the learning-rate schedule spans the whole run.
    A step averages the loss over `batch_size * accumulation_steps` examples, passed through the
    model `batch_size` at a time. With `proximal_mu` the step also pulls towards the state that
    training started from (FedProx, Li et al. 2020, arXiv:1812.06127, equation 2). `objective` is
    the loss of what passes through the model at a time.
    """
    task = task or LocalTask()
    before = math.nan
    if task.start_loss:
        before = mean_loss(model, pixels, labels, indices, settings, device, objective)
    model.train()
    live = model.trainable()
    parameters = _leaves(live, task)
    values = list(parameters.values())
    mu = settings.proximal_mu if task.proximal_mu is None else task.proximal_mu
    anchors = {n: p.detach().clone() for n, p in parameters.items()} if mu else {}
    anchors |= {n: task.anchor[n].to(p) for n, p in parameters.items()} if task.anchor else {}
    optimizer = _optimizer(parameters, settings)
    scaler = torch.amp.GradScaler(
        device.type, init_scale=2.0**10, enabled=settings.precision == "fp16"
    )
    private = task.private
    plan = plan_steps(indices, settings, seed)
    steps = list(plan if private is None else private.plan(indices, settings.local_epochs))
    loss_sum = torch.zeros((), dtype=torch.float64, device=float64_home(device))
    rate_sum = 0.0

    def loss_of(batch: NDArray[np.int64], step: int, part: int | str) -> torch.Tensor:
        model.set_dropout_key(seed_for(seed, "dropout", step, part))
        shown = training_images(pixels[batch], settings.augment, seed, step, part)
        inputs = torch.from_numpy(shown).to(device)
        targets = torch.from_numpy(labels[batch]).to(device)
        with autocast(settings.precision, device):
            return objective(model, inputs, targets)

    for step, micro_batches in enumerate(steps):
        rate = settings.rate(progress + round_share * step / len(steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        step_examples = sum(len(batch) for batch in micro_batches)
        if private is None:
            for part, batch in enumerate(micro_batches):
                loss = loss_of(batch, step, part)
                scaler.scale(loss / step_examples).backward()
                loss_sum += loss.detach().to(loss_sum)
            for name, frame in task.frames.items():  # B = frame R, so dR = frame^T dB
                gradient = live[name].grad
                parameters[name].grad = None if gradient is None else frame.T @ gradient
        else:
            # Draws go by the example: one more of them must change nothing about the others.
            alone = (loss_of(i[None], step, f"example {i}") for i in micro_batches[0])
            gradients = example_gradients(alone, live, parameters, task.frames, private, step)
            for name, own in gradients.by_name.items():
                parameters[name].grad = own
            loss_sum += gradients.loss
        scaler.unscale_(optimizer)
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            if name in task.offsets:
                parameter.grad.add_(task.offsets[name].to(parameter))
            if mu:
                parameter.grad.add_(parameter.detach() - anchors[name], alpha=mu)
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(values, settings.max_grad_norm)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # or gradients overflowed, and the step was left out
            rate_sum += rate
        optimizer.zero_grad(set_to_none=True)
        bound_temperature(parameters)
        with torch.no_grad():
            for name, frame in task.frames.items():
                live[name].grad = None
                live[name].copy_(frame @ parameters[name])

    model.set_dropout_key(None)
    for parameter in live.values():
        parameter.requires_grad_(True)
    task.cores.update({name: parameters[name].detach() for name in task.frames})
    seen = sum(len(batch) for batches in steps for batch in batches)
    loss_mean = loss_sum.item() / max(1, seen)
    if (reason := number_fault("loss", loss_mean) or not_finite(parameters)) is not None:
        raise TrainingFailed(f"{reason.words}; {ADVICE}")
    return LocalResult(loss_mean, len(steps), rate_sum, before)


def _leaves(live: dict[str, torch.nn.Parameter], task: LocalTask) -> dict[str, torch.nn.Parameter]:
    """What the optimizer steps, by name: the trained tensors, or the cores in their place."""
    leaves = {}
    for name, parameter in live.items():
        wanted = task.trained is None or name in task.trained
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


def schedule_factor(schedule: str, progress: float) -> float:
    """Share of the learning rate that is left at `progress` in [0, 1] of the run."""
    return SCHEDULES[schedule](progress)


def _optimizer(
    parameters: Mapping[str, torch.nn.Parameter], settings: LocalSettings
) -> torch.optim.Optimizer:
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


def plan_steps(
    indices: NDArray[np.int64], settings: LocalSettings, seed: int
) -> Iterator[list[NDArray[np.int64]]]:
    """Yields each optimizer step's micro-batches of example indices, reshuffled every epoch."""
    for epoch in range(settings.local_epochs):
        rng = np.random.default_rng(seed_for(seed, "order", epoch))
        batches = batches_of(rng.permutation(indices), settings)
        for first in range(0, len(batches), settings.accumulation_steps):
            yield batches[first : first + settings.accumulation_steps]


def batches_of(indices: NDArray[np.int64], settings: LocalSettings) -> list[NDArray[np.int64]]:
    """Example indices in their order, cut into batches."""
    starts = list(range(0, len(indices), settings.batch_size))
    if len(starts) > 1 and len(indices) - starts[-1] < settings.smallest_batch:
        starts.pop()
    ends = [*starts[1:], len(indices)]
    return [indices[start:end] for start, end in zip(starts, ends, strict=False)]


SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
