"""Several processes on one run: who trains which clients, and how their sums become one.

torchrun starts the processes and tells each of them its number. They exchange tensors of numbers
only: a round ends with one all-reduce, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Self, final

import torch
import torch.distributed as dist

from fedclip.device import torchrun_number
from fedclip.errors import ProcessLost, UsageError
from fedclip.federated.rounds import Engine
from fedclip.records import Cohort, RunState, TrainRequest

# The first process evaluates while the others wait; that one has died is torchrun's to notice.
_PATIENCE = timedelta(days=1)


@final
class Processes:
    """The processes of a run as one of them sees them: its number `rank`, and their `count`."""

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        """`device` is where tensors lie while they travel, by default the CPU."""
        self.rank = rank
        self.count = count
        self._device = device or torch.device("cpu")
        self._joined = False

    @classmethod
    def join(cls, device: torch.device) -> Self:
        """Meets the others as the environment says; without WORLD_SIZE there are none."""
        count, rank = torchrun_number("WORLD_SIZE", 1), torchrun_number("RANK", 0)
        if count == 1:
            return cls()
        missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set; start several "
                "processes by torchrun, or unset WORLD_SIZE"
            )
        on_gpu = device.type == "cuda"
        processes = cls(rank, count, device if on_gpu else None)
        if on_gpu:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                timeout=_PATIENCE,
                device_id=device if on_gpu else None,
            )
            processes._joined = True
        return processes

    def leave(self) -> None:
        """Takes leave of the others, who do so too."""
        if self._joined:
            dist.destroy_process_group()
            self._joined = False

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves; after an error it does not, for the others would be waited for."""
        if error is None:
            self.leave()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that evaluates, writes and speaks."""
        return self.rank == 0

    @property
    def combine(self) -> Callable[[list[torch.Tensor]], None] | None:
        """What sums a round's tensors over the processes; None where there is one."""
        return self.sum_ if self.count > 1 else None

    def share(self, client_ids: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
        """This process's clients, in the order given.

        The largest goes first, always to the process that has the fewest examples so far; of
        equals, the earlier client to the earlier process. So all processes agree unasked.
        """
        loads = [0] * self.count
        own = set()
        for client_id in sorted(client_ids, key=lambda c: -sizes[c]):
            least = loads.index(min(loads))
            loads[least] += sizes[client_id]
            if least == self.rank:
                own.add(client_id)
        return tuple(c for c in client_ids if c in own)

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Replaces float64 tensors by their sums over the processes, in one all-reduce."""
        self._exchange(tensors, dist.all_reduce)

    def take_first_(self, tensors: list[torch.Tensor]) -> None:
        """Replaces float64 tensors by those of the first process."""
        self._exchange(tensors, lambda flat: dist.broadcast(flat, src=0))

    def first_numbers(self, numbers: Sequence[int]) -> list[int]:
        """The first process's whole numbers."""
        values = torch.tensor(numbers, dtype=torch.float64)
        self.take_first_([values])
        return [int(value) for value in values.tolist()]

    def first_start(self, finished_rounds: int, state: RunState) -> tuple[int, RunState]:
        """The first process's place in the run and its state, which float64 carries exactly.

        The others need not know what it holds: its description comes first, as JSON.
        """
        if self.count == 1:
            return finished_rounds, state
        flat = state.flat()
        about = [[n, list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in flat.items()]
        text = json.dumps([finished_rounds, about]).encode()
        (length,) = self.first_numbers([len(text)])
        characters = torch.zeros(length, dtype=torch.float64)
        if self.is_first:
            characters += torch.tensor(list(text), dtype=torch.float64)
        self.take_first_([characters])
        finished_rounds, about = json.loads(bytes(map(int, characters.tolist())))
        values = {}
        for name, shape, _ in about:
            values[name] = torch.zeros(shape, dtype=torch.float64)
            if self.is_first:
                values[name] += flat[name].to("cpu", torch.float64)
        self.take_first_(list(values.values()))
        return finished_rounds, RunState.from_flat(
            {name: values[name].to(getattr(torch, dtype)) for name, _, dtype in about}
        )

    def _exchange(
        self, tensors: list[torch.Tensor], operation: Callable[[torch.Tensor], object]
    ) -> None:
        """Carries out one collective operation on all tensors, laid end to end."""
        if self.count == 1:
            return
        assert all(tensor.dtype == torch.float64 for tensor in tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(self._device)
        try:
            operation(flat)
            flat = flat.cpu()
        except RuntimeError as error:
            raise ProcessLost(
                f"process {self.rank} has lost the others, of which one has probably failed"
            ) from error
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


class ShardedEngine:
    """Trains this process's share of a round's clients on an engine; the others train theirs."""

    def __init__(self, engine: Engine, processes: Processes, clients: Mapping[str, int]) -> None:
        """`clients` maps client ids to numbers of training examples."""
        self._engine = engine
        self._processes = processes
        self._clients = clients

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yield the updates of this process's clients, of which there may be none."""
        own = self._processes.share(request.client_ids, self._clients)
        if own:
            yield from self._engine.train(replace(request, client_ids=own))
