"""The tensors of the clients that the batched engine trains together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import copy

import torch

from fedclip.federated.engines.stacked_optimizer import StackedParameters
from fedclip.lora.names import at_rank, largest_rank
from fedclip.records import State, TrainRequest


class Group:
    """What each client of a group trains, and what stays as it is, stacked.

    `parameters` hold the trained tensors, for names in `frames` their cores R, where the model sees
    frame @ R. `ranks` are those of clients of different ranks, None where all have the model's.
    """

    def __init__(
        self,
        starts: Sequence[State],
        *,
        trained: Sequence[str],
        returned: Sequence[str],
        frames: State,
        ranks: list[int] | None = None,
    ) -> None:
        """Takes each client's start, and which tensors are trained and which returned."""
        self.parameters = StackedParameters(starts, trained)
        self.frames = frames
        self.ranks = ranks
        self._returned = returned
        self._fixed = {n: _stacked([s[n] for s in starts]) for n in starts[0] if n not in trained}

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        request: TrainRequest,
        trainable: Sequence[str],
        device: torch.device,
    ) -> Group:
        """The clients' start as a request has it, on the device."""
        wanted = request.state.keys() if request.trained is None else request.trained
        shared = {name: tensor.to(device) for name, tensor in request.state.items()}
        starts = []
        for client_id in ids:
            own = request.starts.get(client_id, {})
            start = {**shared, **{name: tensor.to(device) for name, tensor in own.items()}}
            rank = request.ranks.get(client_id)
            starts.append(start if rank is None else at_rank(start, rank))
        ranks = None
        if request.ranks:
            largest = largest_rank(shared)
            ranks = [request.ranks.get(client_id, largest) for client_id in ids]
        return cls(
            starts,
            trained=[name for name in trainable if name in wanted],
            returned=[name for name in request.state if name in wanted],
            frames={name: frame.to(device) for name, frame in request.frames.items()},
            ranks=ranks,
        )

    def state(
        self, leaves: Mapping[str, torch.Tensor], one: int | None = None
    ) -> dict[str, torch.Tensor]:
        """What the model takes: tensors `[clients, ...]` of the clients that the leaves are of.

        With `one`, those of that client alone.
        """
        clients = len(next(iter(leaves.values())))
        fixed = {name: tensor[:clients] for name, tensor in self._fixed.items()}
        state = fixed | dict(leaves)
        if one is not None:
            state = {name: tensor[one : one + 1] for name, tensor in state.items()}
        return state | {n: f @ state[n] for n, f in self.frames.items()}

    def rows(self, owner: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Trained tensors `[rows, ...]` to differentiate by, and what the model takes of them.

        `owner` `[rows]` is each row's client.
        """
        values = self.parameters.views(self.parameters.values)
        leaves = {name: tensor[owner].requires_grad_() for name, tensor in values.items()}
        state = {name: tensor[owner] for name, tensor in self._fixed.items()} | leaves
        return leaves, state | {n: f @ state[n] for n, f in self.frames.items()}

    @property
    def layout(self) -> Hashable:
        """What groups have in common that may follow each other in the same room."""
        fixed = tuple((name, tensor.shape[1:]) for name, tensor in self._fixed.items())
        frames = tuple((name, frame.shape) for name, frame in self.frames.items())
        return self.parameters.layout, fixed, frames

    def room_for(self, clients: int) -> Group:
        """Tensors for so many clients, which `load` fills, and which stay where they are."""
        room = copy(self)
        room.parameters = self.parameters.room_for(clients)
        room._fixed = {
            n: t[:1].repeat(clients, *[1] * (t.dim() - 1)) for n, t in self._fixed.items()
        }
        room.frames = {name: frame.clone() for name, frame in self.frames.items()}
        return room

    def load(self, group: Group) -> None:
        """Takes over the tensors of a group of as many or fewer clients, of the same layout."""
        clients = len(group.parameters.values)
        self.parameters.values[:clients].copy_(group.parameters.values)
        self.parameters.grads.zero_()
        for name, tensor in group._fixed.items():
            self._fixed[name][:clients].copy_(tensor)
        for name, frame in group.frames.items():
            self.frames[name].copy_(frame)

    def result(self) -> dict[str, torch.Tensor]:
        """The returned tensors `[clients, ...]` as they are now, on the CPU."""
        ended = self.parameters.views(self.parameters.values.cpu())
        return {n: ended[n] if n in ended else self._fixed[n].cpu() for n in self._returned}


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors in one, without copies where all are the same one."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0].expand(len(tensors), *tensors[0].shape)
    return torch.stack(list(tensors))
