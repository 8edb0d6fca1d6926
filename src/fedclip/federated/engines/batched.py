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
from fedclip.federated.augment import training_images
from fedclip.federated.engines.private import Rows, add_private_gradients
from fedclip.federated.engines.protocols import Images, Stacked
from fedclip.federated.engines.stacked_optimizer import StackedOptimizer
from fedclip.federated.engines.static import StaticSteps
from fedclip.federated.engines.work import Work
from fedclip.federated.local_steps import LocalSettings, batches_of
from fedclip.federated.privacy.dp_sgd import DpSgd
from fedclip.records import Cohort, State, TrainRequest
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        static: bool = False,
        private: DpSgd | None = None,
    ) -> None:
        """Takes the images `[n, 3, size, size]`, labels `[n]` and each client's example indices.

        `images` gives the model's inputs where training does not change the pixels. With `padded`
        all clients of a pass have equally many rows, which GPUs prefer; with `static` the passes
        also have one of a few shapes, and on CUDA become graphs. With `private` every client trains
        by DP-SGD, whose batches vary too much for either.
        """
        self._model = model
        self._pixels = pixels
        self._labels = labels
        self._clients = clients
        self._settings = settings
        self._images = images
        self._seed = seed
        self._device = device
        self._private = private
        self.padded = padded and private is None
        self._stop = Event()
        self._static = self._static_steps() if static and private is None else None
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
                    raise out_of_memory(f"client {ids[0]}, round {request.server_round}") from None
                if self._static is not None:
                    self._static = self._static_steps()  # its room was for the larger group
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
        work = Work.of(
            ids,
            request,
            self._clients,
            self._settings,
            self._model,
            seed=self._seed,
            device=self._device,
            private=self._private,
        )
        before = self._start_losses(ids, work) if request.start_loss else [math.nan] * len(ids)
        losses = self._steps(work) if self._static is None else self._static.train(work)
        tensors = work.group.result()
        seconds = time.perf_counter() - started
        examples = [len(self._clients[client_id]) for client_id in ids]
        return Cohort(work.reports(ids, examples, losses.tolist(), before, seconds), tensors)

    def _steps(self, work: Work) -> torch.Tensor:
        """Trains the group's parameters; returns each client's summed loss `[clients]`."""
        settings, parameters = self._settings, work.group.parameters
        optimizer = StackedOptimizer(
            settings.optimizer,
            parameters,
            weight_decay=settings.weight_decay,
            rate_pattern=settings.rate_pattern,
        )
        home = float64_home(self._device)
        losses = torch.zeros(len(work.plans), dtype=torch.float64, device=home)
        for step, rates in enumerate(work.rates):
            if self._stop.is_set():
                raise CancelledError
            active = len(rates)
            if work.private is None:
                self._add_gradients(work, step, losses[:active])
            else:
                losses[:active] += add_private_gradients(
                    self._model, work, step, self._labels, self._shown
                )
            grads = parameters.grads[:active]
            work.terms.settle(grads, parameters.values[:active], settings.max_grad_norm)
            optimizer.step(rates)
            grads.zero_()
            work.stepped(active)
        return losses

    def _add_gradients(self, work: Work, step: int, losses: torch.Tensor) -> None:
        """Adds a step's gradients to the group's, and to each client's loss `[active]`."""
        group, steps = work.group, work.active(step)
        leaves = group.parameters.leaves(len(steps))
        state = group.state(leaves)
        for part in range(max(map(len, steps))):
            loss, sums = self._loss(state, steps, work, step, part)
            group.parameters.add_gradient(loss, leaves)
            losses += sums
            state = group.state(leaves) if group.frames else state

    @torch.no_grad()
    def _start_losses(self, ids: tuple[str, ...], work: Work) -> list[float]:
        """Each client's mean loss before training, without dropout."""
        found, group = [], work.group
        for index, client_id in enumerate(ids):
            state = group.state(group.parameters.leaves(len(ids)), one=index)
            scales = None if work.scales is None else work.scales[index : index + 1]
            indices, size, total = self._clients[client_id], self._settings.batch_size, 0.0
            for first in range(0, len(indices), size):
                batch = indices[first : first + size]
                targets = torch.from_numpy(self._labels[batch]).to(self._device)
                inputs = self._images.take(batch)
                scores = self._model.logits(state, inputs, [len(batch)], [], scales)
                total += cross_entropy(at_least_fp32(scores), targets, reduction="sum").item()
            found.append(total / len(indices))
        return found

    def _loss(
        self,
        state: State,
        steps: list[list[NDArray[np.int64]]],
        work: Work,
        step: int,
        part: int,
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
        seeds = work.seeds[: len(steps)]
        inputs = self._inputs(rows, counts, seeds, step, part)
        targets = torch.from_numpy(self._labels[indices]).to(self._device)
        keys = [seed_for(seed, "dropout", step, part) for seed in seeds]
        scales = None if work.scales is None else work.scales[: len(steps)]
        scores = at_least_fp32(self._model.logits(state, inputs, counts, keys, scales))
        losses = cross_entropy(scores, targets, reduction="none")  # [rows]
        # Not a product: an infinite loss of padding times zero would spoil its client.
        losses = losses.where(torch.from_numpy(real).to(losses.device), 0.0)
        home = float64_home(self._device)
        sums = torch.zeros(len(rows), dtype=torch.float64, device=home)
        sums.index_add_(0, owner.to(home), losses.detach().to(sums))
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
        rows: Sequence[NDArray[np.int64]],
        counts: Sequence[int],
        seeds: Sequence[int],
        step: int,
        part: int | str,
    ) -> torch.Tensor:
        """What the model is shown of each client's examples; those behind its count are padding."""
        if self._settings.augment == "none":
            return self._images.take(np.concatenate(rows))
        shown = []
        for row, count, seed in zip(rows, counts, seeds, strict=True):
            if count:
                own = self._pixels[row[:count]]
                shown.append(training_images(own, self._settings.augment, seed, step, part))
            shown.append(self._pixels[row[count:]])
        return torch.from_numpy(np.concatenate(shown)).to(self._device)

    def _shown(self, rows: Rows, step: int) -> torch.Tensor:
        """What the model is shown of examples that are drawn for one by one."""
        if self._settings.augment == "none":
            return self._images.take(rows.indices)
        each = zip(rows.indices, rows.seeds, rows.names, strict=True)
        return torch.cat([self._inputs([i[None]], [1], [s], step, name) for i, s, name in each])

    def _static_steps(self) -> StaticSteps:
        """Steps of static shapes for batches of any of the clients."""
        batches = (batches_of(own, self._settings) for own in self._clients.values() if len(own))
        return StaticSteps(
            self._model,
            self._settings,
            self._labels,
            self._images,
            rows=max((len(batch) for own in batches for batch in own), default=1),
            device=self._device,
            show=self._inputs,
        )
