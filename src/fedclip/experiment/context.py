"""The parts of a run, once they are built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fedclip.catalog import strategy_row
from fedclip.config import Config
from fedclip.data.federated_data import FederatedData
from fedclip.data.picture_sizes import shrunk
from fedclip.data.splits import SPLIT_RULE
from fedclip.federated.engines.protocols import Images
from fedclip.federated.engines.sharded import Processes
from fedclip.models.clip import CLIPLoRAWrapper
from fedclip.models.stacked.clients import StackedClients
from fedclip.records import RunState, State

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Shared(ABC):
    """What the parts of a run have in common, whether it has one task or several.

    `stacked` is the model as many clients share it, where its kind can be stacked.
    `sites` are the clients where they are on other machines, with their numbers of training
    examples; their models of their own are there too.
    """

    config: Config
    model: CLIPLoRAWrapper
    device: torch.device
    precision: str
    stacked: StackedClients | None = None
    processes: Processes = field(default_factory=Processes)
    sites: dict[str, int] | None = None

    @property
    @abstractmethod
    def training(self) -> dict[str, NDArray[np.int64]]:
        """Each client's training examples, as indices into its data."""

    @property
    def clients(self) -> dict[str, int]:
        """Numbers of training examples by client id."""
        if self.sites is not None:
            return self.sites
        return {client_id: len(indices) for client_id, indices in self.training.items()}

    def put(self, state: RunState) -> None:
        """Puts a state's tensors in the model."""
        self.model.set_parameters(state.shared)
        self.shift(state.shift)

    def shift(self, shift: State) -> None:
        """Changes frozen weights, by layer; see `RunState`."""
        (self.model if self.stacked is None else self.stacked).set_shift(shift)

    @property
    def clients_per_round(self) -> int:
        """How many clients take part in a round; a fraction is rounded, but never to none."""
        share, all_clients = self.config.federation.clients_per_round, len(self.clients)
        if share is None:
            return all_clients
        if isinstance(share, int):
            return min(share, all_clients)
        return max(1, round(share * all_clients))


@dataclass(frozen=True, kw_only=True)
class Parts(Shared):
    """What a run on one data set is made of, or a task of a run that has several."""

    data: FederatedData
    images: Images

    @property
    def training(self) -> dict[str, NDArray[np.int64]]:
        """Each client's training examples; centralised training has one client with all."""
        own = {c.client_id: c.train for c in self.data.clients}
        if not strategy_row(self.config.federation.strategy).pools:
            return own
        return {"all": np.concatenate(list(own.values()))}

    @property
    def bad_images(self) -> int:
        """Images that could not be read."""
        return len(self.data.bad_images)

    @property
    def shrunk(self) -> float | None:
        """How many times smaller the images become for the model; see `data.picture_sizes`."""
        return shrunk(self.data.median_size, self.model.image_size)

    @property
    def has_validation(self) -> bool:
        """Whether there are validation examples."""
        return len(self.data.validation) > 0

    @property
    def has_client_tests(self) -> bool:
        """Whether any client has test examples of its own."""
        return any(len(client.test) for client in self.data.clients)

    def partition_record(self) -> dict[str, Any]:
        """What `partition.json` holds."""
        return self.data.partition_record()


@dataclass(frozen=True)
class TaskRecord:
    """The data of several tasks, as `partition.json` has them."""

    tasks: Mapping[str, FederatedData]

    def partition_record(self) -> dict[str, Any]:
        """The record of each task."""
        tasks = {name: data.partition_record() for name, data in self.tasks.items()}
        return {"split": SPLIT_RULE, "tasks": tasks}


@dataclass(frozen=True, kw_only=True)
class TaskParts(Shared):
    """What a run of several tasks is made of: the parts of each, on one model."""

    tasks: Mapping[str, Parts]

    @property
    def training(self) -> dict[str, NDArray[np.int64]]:
        """Each client's training examples, as indices into its task's data."""
        return {c: rows for task in self.tasks.values() for c, rows in task.training.items()}

    @property
    def task_of(self) -> dict[str, str]:
        """Every client's task."""
        return {c: name for name, task in self.tasks.items() for c in task.training}

    @property
    def bad_images(self) -> int:
        """Images that could not be read."""
        return sum(task.bad_images for task in self.tasks.values())

    @property
    def shrunk(self) -> float | None:
        """How many times smaller the images become, those of the task with the largest ones."""
        known = [task.shrunk for task in self.tasks.values()]
        return max((factor for factor in known if factor is not None), default=None)

    @property
    def has_validation(self) -> bool:
        """Whether every task has validation examples."""
        return all(task.has_validation for task in self.tasks.values())

    @property
    def has_client_tests(self) -> bool:
        """Whether in every task any client has test examples of its own."""
        return all(task.has_client_tests for task in self.tasks.values())

    def partition_record(self) -> dict[str, Any]:
        """What `partition.json` holds: the record of each task."""
        return TaskRecord({name: task.data for name, task in self.tasks.items()}).partition_record()
