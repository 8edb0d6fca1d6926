"""Training steps of static shapes on tensors that stay where they are, as CUDA graphs need them.

A step never waits for the host, asks nothing of Python for each client, and always reads and
writes the same memory. Clients that have finished stay as rows of weight zero until a smaller one
of a few sizes holds those that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedclip.device import at_least_fp32
from fedclip.federated.engines.cuda_graphs import Graphs
from fedclip.federated.engines.protocols import Images, Stacked
from fedclip.federated.engines.stacked_optimizer import (
    StackedOptimizer,
    corrections,
)
from fedclip.federated.engines.work import MicroStep, Work, halves, micro_steps
from fedclip.federated.local_steps import LocalSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOMS = 2
"""Layouts that are kept: strategies that train A and B in turn have two."""

Show = Callable[[list["NDArray[np.int64]"], list[int], list[int], int, int], torch.Tensor]
"""Makes inputs of clients' rows of example indices, how many are no padding, their seeds, the step
and its part."""


class StaticSteps:
    """Carries out groups' work, in a room for each layout of their tensors."""

    def __init__(
        self,
        model: Stacked,
        settings: LocalSettings,
        labels: NDArray[np.int64],
        images: Images,
        *,
        rows: int,
        device: torch.device,
        show: Show,
    ) -> None:
        """No batch has more than `rows` examples. `show` makes inputs that `images` does not keep.

        Those are augmented images, and all that do not lie on the device.
        """
        self._model = model
        self._settings = settings
        self._labels = torch.from_numpy(labels.copy()).to(device)
        self._source = images.source if settings.augment == "none" else None
        self._show = show
        self._rows = rows
        self._device = device
        self._rooms: dict[Hashable, Room] = {}

    @property
    def graphs(self) -> list[Graphs]:
        """The CUDA graphs of each room."""
        return [room.graphs for room in self._rooms.values()]

    def train(self, work: Work) -> torch.Tensor:
        """Trains the group's parameters; returns each client's summed loss `[clients]`."""
        room = self._room(work)
        room.load(work)
        steps = list(micro_steps(work, halves(room.clients), halves(self._rows, by=4)))
        table = _Table.of(work, steps, room.clients, self._device, room.rates.dtype)
        row = client = 0
        for micro in steps:
            rows = slice(row, row + micro.size * micro.rows)
            clients = slice(client, client + micro.size)
            row, client = rows.stop, clients.stop
            indices = table.indices[rows]
            shown = self._source[indices] if self._source is not None else self._made(work, micro)
            # A CPU's masks come from its own generator, which needs the keys on the host.
            keys = micro.keys if self._device.type == "cpu" else table.keys[clients]
            room.show(shown, self._labels[indices], table.weights[rows], keys)
            if micro.last:
                room.set_rates(
                    table.rates[micro.step], table.idle[micro.step], table.bias[micro.step]
                )
            shape = (micro.size, micro.rows, micro.last)
            room.graphs.run(shape, partial(room.step, *shape))
            if micro.last:
                work.stepped(len(micro.batches))
        clients_here = len(work.plans)
        work.group.parameters.values.copy_(room.group.parameters.values[:clients_here])
        return room.losses[:clients_here]

    def _made(self, work: Work, micro: MicroStep) -> torch.Tensor:
        """Inputs that do not lie on the device."""
        idle = [0] * (micro.size - len(micro.batches))
        return self._show(
            list(micro.indices.reshape(micro.size, micro.rows)),
            [*map(len, micro.batches), *idle],
            [*work.seeds[: len(micro.batches)], *idle],
            micro.step,
            micro.part,
        )

    def _room(self, work: Work) -> Room:
        """The room of a group's layout, which is made where there is none, or none as large."""
        scaled = work.scales is not None
        layout = (work.group.layout, scaled, work.terms.layout, self._model.version)
        room = self._rooms.pop(layout, None)
        if room is None or room.clients < len(work.plans):
            while len(self._rooms) >= ROOMS:
                del self._rooms[next(iter(self._rooms))]
            room = Room(work, self._model, self._settings, rows=self._rows)
        self._rooms[layout] = room  # the last one used is the last one dropped
        return room


class Room:
    """All that a step reads and writes, at addresses that stay, for as many clients as `work`."""

    def __init__(self, work: Work, model: Stacked, settings: LocalSettings, *, rows: int) -> None:
        """Takes the first group's work; `rows` is the size of the largest batch."""
        self.clients = len(work.plans)
        self.group = work.group.room_for(self.clients)
        self._model = model
        self._settings = settings
        parameters = self.group.parameters
        self._optimizer = StackedOptimizer(
            settings.optimizer,
            parameters,
            weight_decay=settings.weight_decay,
            rate_pattern=settings.rate_pattern,
        )
        values = parameters.values
        self.losses = values.new_zeros(self.clients, dtype=torch.float64)
        self._terms = work.terms.room_for(values)
        self._scales = None if work.scales is None else work.scales.to(values)
        self._inputs: torch.Tensor | None = None
        self._targets = values.new_zeros(self.clients * rows, dtype=torch.int64)
        self._weights = values.new_zeros(self.clients * rows)
        self._keys = values.new_zeros(self.clients, dtype=torch.int64)
        self._host_keys: list[int] | None = None
        self.rates = values.new_zeros(self.clients)
        self._idle = values.new_zeros(self.clients, dtype=torch.bool)
        self._bias = values.new_zeros(2)
        self.graphs = Graphs(values.device)

    def load(self, work: Work) -> None:
        """Takes over what a group starts from; the optimizer starts anew."""
        self.group.load(work.group)
        self._terms.load(work.terms)
        self._optimizer.restart()
        self.losses.zero_()
        if self._scales is not None and work.scales is not None:
            self._scales[: len(work.plans)].copy_(work.scales)

    def show(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        keys: torch.Tensor | list[int],
    ) -> None:
        """What the next step sees of the data."""
        rows = len(inputs)
        if self._inputs is None:
            self._inputs = inputs.new_empty(len(self._targets), *inputs.shape[1:])
        self._inputs[:rows].copy_(inputs)
        self._targets[:rows].copy_(targets)
        self._weights[:rows].copy_(weights)
        if isinstance(keys, torch.Tensor):
            self._keys[: len(keys)].copy_(keys)
        else:
            self._host_keys = keys

    def set_rates(self, rates: torch.Tensor, idle: torch.Tensor, bias: torch.Tensor) -> None:
        """The clients' learning rates, who has finished, and AdamW's corrections."""
        self.rates.copy_(rates)
        self._idle.copy_(idle)
        self._bias.copy_(bias)

    def step(self, size: int, rows: int, last: bool) -> None:
        """Forward and backward of the first `size` clients, and if `last` the optimizer's step.

        It works on these tensors alone; no value in it is known to the host.
        """
        self._accumulate(size, rows)
        if last:
            self._update(size)

    def _accumulate(self, size: int, rows: int) -> None:
        count, parameters = size * rows, self.group.parameters
        leaves = parameters.leaves(size)
        state, scales = self.group.state(leaves), self._scales
        assert self._inputs is not None
        scores = self._model.logits(
            state,
            self._inputs[:count],
            [rows] * size,
            self._keys[:size] if self._host_keys is None else self._host_keys,
            None if scales is None else scales[:size],
        )
        losses = cross_entropy(at_least_fp32(scores), self._targets[:count], reduction="none")
        weights = self._weights[:count]
        # Not a product: an infinite loss of padding times zero would spoil its client.
        losses = losses.masked_fill(weights == 0, 0.0)
        sums = losses.detach().to(torch.float64).view(size, rows).sum(dim=1)
        self.losses[:size] += sums
        parameters.add_gradient((losses * weights).sum(), leaves)

    @torch.no_grad()
    def _update(self, size: int) -> None:
        parameters = self.group.parameters
        grads, values = parameters.grads[:size], parameters.values[:size]
        grads.masked_fill_(self._idle[:size, None], 0.0)
        self._terms.settle(grads, values, self._settings.max_grad_norm)
        self._optimizer.apply(self.rates[:size], *self._bias)
        grads.zero_()


class _Table(NamedTuple):
    """A group's micro-steps and steps laid end to end, on the device."""

    indices: torch.Tensor
    weights: torch.Tensor
    keys: torch.Tensor
    rates: torch.Tensor  # [steps, clients], as the next two
    idle: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(
        cls,
        work: Work,
        steps: list[MicroStep],
        clients: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> _Table:
        """All of it in a few transfers, before the first step."""
        rates = torch.zeros(len(work.rates), clients, dtype=torch.float64)
        idle = torch.ones(len(work.rates), clients, dtype=torch.bool)
        for step, own in enumerate(work.rates):
            rates[step, : len(own)] = own
            idle[step, : len(own)] = False
        bias = torch.tensor(
            [corrections(step + 1) for step in range(len(work.rates))], dtype=torch.float64
        )
        return cls(
            torch.from_numpy(np.concatenate([micro.indices for micro in steps])).to(device),
            torch.from_numpy(np.concatenate([micro.weights for micro in steps])).to(device, dtype),
            torch.tensor([key for micro in steps for key in micro.keys], device=device),
            rates.to(device, dtype),
            idle.to(device),
            bias.to(device, dtype),
        )
