"""The batched engine: many clients in one pass over the shared weights.

It does what the sequential engine does, client by client, on stacked tensors: every client keeps
its own data order, dropout, loss, clipping, optimizer state, learning rate and number of steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedclip.compute import at_least_fp32, autocast
from fedclip.errors import TrainingFailed, out_of_memory
from fedclip.federated.client import LocalSettings, plan_steps, schedule_factor, training_images
from fedclip.federated.stacked_optimizer import StackedOptimizer, clip_by_client
from fedclip.records import ClientReport, Cohort, State, TrainRequest
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray


class Stacked(Protocol):
    """What the engine needs of a model that takes many clients at once."""

    def installed(self) -> AbstractContextManager[None]:
        """Inside, the model is ready for stacked passes."""
        ...

    def logits(
        self, state: State, pixels: torch.Tensor, counts: list[int], keys: list[int]
    ) -> torch.Tensor:
        """Logits `[clients, batch, classes]`."""
        ...


class BatchedEngine:
    """Trains groups of clients together; a client that has finished leaves the stack."""

    def __init__(
        self,
        model: Stacked,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        clients: Mapping[str, NDArray[np.int64]],
        settings: LocalSettings,
        *,
        group_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Takes the images `[n, 3, size, size]`, labels `[n]` and each client's example indices."""
        self._model = model
        self._pixels = pixels
        self._labels = labels
        self._clients = clients
        self._settings = settings
        self._group_size = group_size
        self._seed = seed
        self._device = device

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields a cohort per group, in the order of `request.client_ids`, largest first.

        A group that does not fit into a GPU's memory is tried again with half as many clients.
        """
        ids = request.client_ids
        while ids:
            try:
                with self._model.installed():
                    cohort = self._train_group(ids[: self._group_size], request)
            except torch.OutOfMemoryError:
                if self._group_size == 1:
                    who = f"client {ids[0]}, round {request.server_round}"
                    raise out_of_memory(who) from None
                self._group_size = (min(self._group_size, len(ids)) + 1) // 2
                continue
            ids = ids[len(cohort.reports) :]
            yield cohort

    def _train_group(self, ids: tuple[str, ...], request: TrainRequest) -> Cohort:
        started = time.perf_counter()
        settings = self._settings
        seeds = [seed_for(self._seed, "client", request.server_round, c) for c in ids]
        plans = [
            list(plan_steps(self._clients[c], settings, seed))
            for c, seed in zip(ids, seeds, strict=True)
        ]
        start = {name: tensor.to(self._device) for name, tensor in request.state.items()}
        factors = {
            name: tensor.expand(len(ids), *tensor.shape).clone().requires_grad_()
            for name, tensor in start.items()
        }
        optimizer = StackedOptimizer(
            settings.optimizer, factors, weight_decay=settings.weight_decay
        )
        losses = torch.zeros(len(ids), dtype=torch.float64)
        for step in range(len(plans[0])):
            active = sum(len(plan) > step for plan in plans)  # the first ones: they are largest
            losses[:active] += self._gradients(
                factors, [plan[step] for plan in plans[:active]], seeds[:active], step
            )
            if settings.proximal_mu:
                for name, factor in factors.items():
                    if factor.grad is not None:
                        away = factor.detach()[:active] - start[name]
                        factor.grad[:active].add_(away, alpha=settings.proximal_mu)
            if settings.max_grad_norm is not None:
                clip_by_client(factors, active, settings.max_grad_norm)
            optimizer.step(self._rates(request, step, [len(plan) for plan in plans[:active]]))
            optimizer.zero_grad()
        return self._cohort(ids, request, factors, losses, plans, time.perf_counter() - started)

    def _gradients(
        self,
        factors: Mapping[str, torch.Tensor],
        steps: list[list[NDArray[np.int64]]],
        seeds: list[int],
        step: int,
    ) -> torch.Tensor:
        """Adds up the step's gradients; returns each client's summed loss `[active]`."""
        sums = torch.zeros(len(steps), dtype=torch.float64)
        state = {name: factor[: len(steps)] for name, factor in factors.items()}
        totals = torch.tensor([sum(len(b) for b in batches) for batches in steps])
        for part in range(max(len(batches) for batches in steps)):
            batches = [b[part] if part < len(b) else b[0][:0] for b in steps]
            counts = [len(batch) for batch in batches]
            index = np.zeros((len(batches), max(counts)), dtype=np.int64)  # padding: image 0
            real = torch.zeros(index.shape, dtype=torch.bool)
            for client, batch in enumerate(batches):
                index[client, : len(batch)] = batch
                real[client, : len(batch)] = True
            shown = self._pixels[index]
            for client, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
                if len(batch):
                    own = self._pixels[batch]
                    own = training_images(own, self._settings, seed, step, part)
                    shown[client, : len(batch)] = own
            keys = [seed_for(seed, "dropout", step, part) for seed in seeds]
            inputs = torch.from_numpy(shown).to(self._device)
            targets = torch.from_numpy(self._labels[index]).to(self._device)
            with autocast(self._settings.precision, self._device):
                logits = self._model.logits(state, inputs, counts, keys)
            scores = at_least_fp32(logits).flatten(0, 1)
            losses = cross_entropy(scores, targets.flatten(), reduction="none")
            # Not a product: an infinite loss of padding times zero would spoil its client.
            losses = losses.view(index.shape).where(real.to(losses.device), 0.0)  # [clients, batch]
            (losses.sum(dim=1) / totals.to(losses)).sum().backward()
            sums += losses.detach().sum(dim=1).cpu()
        return sums

    def _rates(self, request: TrainRequest, step: int, steps: list[int]) -> torch.Tensor:
        shares = [request.progress + request.round_share * step / total for total in steps]
        rates = [
            self._settings.learning_rate * schedule_factor(self._settings.schedule, share)
            for share in shares
        ]
        return torch.tensor(rates, dtype=torch.float64)

    def _cohort(
        self,
        ids: tuple[str, ...],
        request: TrainRequest,
        factors: Mapping[str, torch.Tensor],
        losses: torch.Tensor,
        plans: list[list[list[NDArray[np.int64]]]],
        seconds: float,
    ) -> Cohort:
        reports = []
        for row, client_id in enumerate(ids):
            examples = len(self._clients[client_id])
            loss = losses[row].item() / (self._settings.local_epochs * examples)
            if not (math.isfinite(loss) and all(f[row].isfinite().all() for f in factors.values())):
                raise TrainingFailed(
                    f"client {client_id}, round {request.server_round}: the loss became {loss}; a "
                    "lower client.learning_rate or precision: fp32 may help"
                )
            # The group's time, shared out by the steps that each client took.
            share = len(plans[row]) / sum(len(plan) for plan in plans)
            report = ClientReport(client_id, examples, loss, len(plans[row]), seconds * share)
            reports.append(report)
        tensors = {name: factor.detach().cpu() for name, factor in factors.items()}
        return Cohort(tuple(reports), tensors)
