"""The batched engine: many clients in one pass over the shared weights.

It does what the sequential engine does, client by client, on stacked tensors: every client keeps
its own data order, dropout, loss, clipping, optimizer state, learning rate, rank and number of
steps.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from copy import copy
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedclip.device import at_least_fp32, float64_home
from fedclip.errors import FedclipWarning, out_of_memory
from fedclip.federated.client import LocalSettings, plan_steps, schedule_factor, training_images
from fedclip.federated.engines.protocols import Images, Stacked
from fedclip.federated.engines.stack import Group
from fedclip.federated.engines.stacked_optimizer import StackedOptimizer, clip_by_client
from fedclip.records import ClientReport, Cohort, State, TrainRequest
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

Plan = list[list["NDArray[np.int64]"]]


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
        images: Images,
        group_size: int,
        seed: int,
        device: torch.device,
        padded: bool = False,
    ) -> None:
        """Takes the images `[n, 3, size, size]`, labels `[n]` and each client's example indices.

        `images` gives the model's inputs where training does not change the pixels. With `padded`
        all clients of a pass have equally many rows, which GPUs prefer.
        """
        self._model = model
        self._pixels = pixels
        self._labels = labels
        self._clients = clients
        self._settings = settings
        self._images = images
        self._seed = seed
        self._device = device
        self.padded = padded
        self._stop = Event()
        self.group_size = group_size

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields a cohort per group, in the order of `request.client_ids`, largest first.

        A group that does not fit into a GPU's memory is tried again with half as many clients.
        """
        self.prepare(request)
        ids = request.client_ids
        while ids:
            try:
                cohort = self._train_group(ids[: self.group_size], request)
            except torch.OutOfMemoryError:
                if self.group_size == 1:
                    who = f"client {ids[0]}, round {request.server_round}"
                    raise out_of_memory(who) from None
                self.group_size = (min(self.group_size, len(ids)) + 1) // 2
                warnings.warn(
                    f"round {request.server_round}: a group did not fit into the GPU's memory; "
                    f"from here on engine.group_size is {self.group_size}",
                    FedclipWarning,
                    stacklevel=2,
                )
                continue
            ids = ids[len(cohort.reports) :]
            yield cohort

    def prepare(self, request: TrainRequest) -> None:
        """Does what concerns all of a round's clients: the frozen weights, and the kept inputs."""
        if request.shift:
            self._model.set_shift(request.shift)
        if self._settings.augment == "none":
            for client_id in request.client_ids:
                self._images.prepare(self._clients[client_id])

    @property
    def batch_size(self) -> int:
        """Images of a client in one pass."""
        return self._settings.batch_size

    def examples(self, client_id: str) -> int:
        """How many training examples a client has."""
        return len(self._clients[client_id])

    def part(self, group_size: int, stop: Event) -> BatchedEngine:
        """The same engine for groups of another size, which ends at the step at which it must stop.

        It then raises CancelledError.
        """
        other = copy(self)
        other.group_size, other._stop = group_size, stop
        return other

    def _train_group(self, ids: tuple[str, ...], request: TrainRequest) -> Cohort:
        started = time.perf_counter()
        settings = self._settings
        seeds = [seed_for(self._seed, request.purpose, request.server_round, c) for c in ids]
        plans = [
            list(plan_steps(self._clients[c], settings, seed))
            for c, seed in zip(ids, seeds, strict=True)
        ]
        group = Group.of(ids, request, self._model.trained, self._device)
        parameters, ranks = group.parameters, group.ranks
        mu = settings.proximal_mu if request.proximal_mu is None else request.proximal_mu
        anchors = parameters.anchors(request.anchor) if mu else None
        offsets = (
            parameters.flat_rows([request.offsets[c] for c in ids]) if request.offsets else None
        )
        optimizer = StackedOptimizer(
            settings.optimizer,
            parameters,
            weight_decay=settings.weight_decay,
            rate_pattern=settings.rate_pattern,
        )
        home = float64_home(self._device)
        losses = torch.zeros(len(ids), dtype=torch.float64, device=home)
        rate_sums = torch.zeros(len(ids), dtype=torch.float64)
        before = self._start_losses(ids, group) if request.start_loss else [math.nan] * len(ids)
        for step in range(len(plans[0])):
            if self._stop.is_set():
                raise CancelledError
            active = sum(len(plan) > step for plan in plans)  # the first ones: they are largest
            leaves = parameters.leaves(active)
            state = group.state(leaves)
            steps = [plan[step] for plan in plans[:active]]
            own = None if ranks is None else ranks[:active]
            for part in range(max(map(len, steps))):
                loss, sums = self._loss(state, steps, seeds[:active], step, part, own)
                parameters.add_gradient(loss, leaves)
                losses[:active] += sums
                state = group.state(leaves) if group.frames else state
            grads = parameters.grads[:active]
            if offsets is not None:
                grads.add_(offsets[:active])
            if anchors is not None:
                grads.add_(parameters.values[:active] - anchors[:active], alpha=mu)
            if settings.max_grad_norm is not None:
                clip_by_client(grads, settings.max_grad_norm)
            rates = self._rates(request, step, [len(plan) for plan in plans[:active]])
            rate_sums[:active] += rates
            optimizer.step(rates)
            grads.zero_()
        tensors = group.result()
        seconds = time.perf_counter() - started
        extras = list(zip(rate_sums.tolist(), before, strict=True))
        return Cohort(self._reports(ids, losses.tolist(), plans, seconds, extras), tensors)

    @torch.no_grad()
    def _start_losses(self, ids: tuple[str, ...], group: Group) -> list[float]:
        """Each client's mean loss before training, without dropout."""
        found = []
        for index, client_id in enumerate(ids):
            state = group.state(group.parameters.leaves(len(ids)), one=index)
            rank = None if group.ranks is None else group.ranks[index : index + 1]
            indices, size, total = self._clients[client_id], self._settings.batch_size, 0.0
            for first in range(0, len(indices), size):
                batch = indices[first : first + size]
                targets = torch.from_numpy(self._labels[batch]).to(self._device)
                inputs = self._images.take(batch)
                scores = self._model.logits(state, inputs, [len(batch)], [], rank)
                total += cross_entropy(at_least_fp32(scores), targets, reduction="sum").item()
            found.append(total / len(indices))
        return found

    def _loss(
        self,
        state: State,
        steps: list[list[NDArray[np.int64]]],
        seeds: list[int],
        step: int,
        part: int,
        ranks: Sequence[int] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One micro-step's loss to differentiate, and each client's summed loss `[active]`."""
        batches = [b[part] if part < len(b) else b[0][:0] for b in steps]
        counts = [len(batch) for batch in batches]
        rows = self._rows(batches, steps)
        real = np.concatenate(
            [np.arange(len(row)) < n for row, n in zip(rows, counts, strict=True)]
        )
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(r) for r in rows]))
        totals = torch.tensor([sum(map(len, own)) for own in steps], dtype=torch.float64)
        weights = torch.from_numpy(real) / totals[owner]  # of a row in its client's mean loss
        indices = np.concatenate(rows)
        inputs = self._inputs(rows, counts, seeds, step, part)
        targets = torch.from_numpy(self._labels[indices]).to(self._device)
        keys = [seed_for(seed, "dropout", step, part) for seed in seeds]
        scores = at_least_fp32(self._model.logits(state, inputs, counts, keys, ranks))
        losses = cross_entropy(scores, targets, reduction="none")  # [rows]
        # Not a product: an infinite loss of padding times zero would spoil its client.
        losses = losses.where(torch.from_numpy(real).to(losses.device), 0.0)
        home = float64_home(self._device)
        sums = torch.zeros(len(rows), dtype=torch.float64, device=home)
        sums.index_add_(0, owner.to(home), losses.detach().to(home, torch.float64))
        return (losses * weights.to(losses)).sum(), sums

    def _rows(
        self, batches: list[NDArray[np.int64]], steps: list[list[NDArray[np.int64]]]
    ) -> list[NDArray[np.int64]]:
        """Each client's example indices; padded, where wanted, by the first one of its step."""
        if not self.padded:
            return batches
        longest = max(map(len, batches))
        return [
            np.concatenate([batch, np.repeat(own[0][:1], longest - len(batch))])
            for batch, own in zip(batches, steps, strict=True)
        ]

    def _inputs(
        self,
        rows: list[NDArray[np.int64]],
        counts: list[int],
        seeds: list[int],
        step: int,
        part: int,
    ) -> torch.Tensor:
        if self._settings.augment == "none":
            return self._images.take(np.concatenate(rows))
        shown = []
        for row, count, seed in zip(rows, counts, seeds, strict=True):
            if count:
                own = self._pixels[row[:count]]
                shown.append(training_images(own, self._settings, seed, step, part))
            shown.append(self._pixels[row[count:]])
        return torch.from_numpy(np.concatenate(shown)).to(self._device)

    def _rates(self, request: TrainRequest, step: int, steps: list[int]) -> torch.Tensor:
        shares = [request.progress + request.round_share * step / total for total in steps]
        rates = [
            self._settings.learning_rate * schedule_factor(self._settings.schedule, share)
            for share in shares
        ]
        return torch.tensor(rates, dtype=torch.float64)

    def _reports(
        self,
        ids: tuple[str, ...],
        losses: list[float],
        plans: list[Plan],
        seconds: float,
        extras: list[tuple[float, float]],
    ) -> tuple[ClientReport, ...]:
        reports = []
        all_steps = sum(map(len, plans))
        for client_id, total, plan, extra in zip(ids, losses, plans, extras, strict=True):
            examples = len(self._clients[client_id])
            loss = total / (self._settings.local_epochs * examples)
            # The group's time, shared out by the steps that each client took.
            share = len(plan) / all_steps
            own = seconds * share
            reports.append(ClientReport(client_id, examples, loss, len(plan), own, *extra))
        return tuple(reports)
