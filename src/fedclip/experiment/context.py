"""The context of a run: its model, its tasks with their data, and where it is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedclip.catalog import strategy_row
from fedclip.config import Config
from fedclip.data.federated_data import FederatedData
from fedclip.data.picture_sizes import shrunk
from fedclip.data.splits import SPLIT_RULE
from fedclip.evaluation.predictions import Predictions
from fedclip.federated.engines.protocols import Images
from fedclip.federated.engines.sharded import Processes
from fedclip.federated.hostile import claimed, hostile_clients
from fedclip.models.clip import CLIPLoRAWrapper
from fedclip.models.stacked.clients import StackedClients
from fedclip.records import RunState, State

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

ONLY = ""
"""Name of the task of a run whose configuration names none."""


class LastTest(NamedTuple):
    """Predictions, without logits, and the rows of the data that they are of."""

    found: Predictions
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """One data set that a run learns, and its images as the model takes them."""

    data: FederatedData
    images: Images
    last_test: list[LastTest] = field(default_factory=list)
    """The last evaluation on the test set; empty before it."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """All that a run works with, once it is built.

    `tasks` are the data sets by name: those of the configuration's `tasks`, or the one of `data`.
    `stacked` is the model as many clients share it, where its kind can be stacked. `sites` are the
    clients where they are on other machines, with their numbers of training examples; their
    personalised models are there too. `poisoned` is the one task as clients train on it, where
    hostile ones have falsified their data.
    """

    config: Config
    model: CLIPLoRAWrapper
    device: torch.device
    precision: str
    tasks: Mapping[str, Task]
    stacked: StackedClients | None = None
    processes: Processes = field(default_factory=Processes)
    sites: dict[str, int] | None = None
    poisoned: Task | None = None

    @property
    def several(self) -> bool:
        """Whether the configuration names tasks, be it a single one."""
        return ONLY not in self.tasks

    def by_task(self) -> dict[str, RunContext]:
        """A context for each task, in which it is the only one."""
        return {name: self.alone(name) for name in self.tasks}

    def alone(self, name: str) -> RunContext:
        """The context of one task, as if it were the only one."""
        if not self.several:
            return self
        return replace(self, config=for_task(self.config, name), tasks={ONLY: self.tasks[name]})

    @property
    def data(self) -> FederatedData:
        """The data of a run on one data set."""
        return self.tasks[ONLY].data

    @property
    def images(self) -> Images:
        """The images of a run on one data set."""
        return self.tasks[ONLY].images

    @property
    def training(self) -> dict[str, NDArray[np.int64]]:
        """Each client's training examples, as indices into its task's data.

        Centralised training has one client with all.
        """
        clients = [client for task in self.tasks.values() for client in task.data.clients]
        own = {client.client_id: client.train for client in clients}
        if self.several or not strategy_row(self.config.federation.strategy).pools:
            return own
        return {"all": np.concatenate(list(own.values()))}

    @property
    def clients(self) -> dict[str, int]:
        """Numbers of training examples by client id, as the clients tell them."""
        if self.sites is not None:
            return self.sites
        found = {client_id: len(indices) for client_id, indices in self.training.items()}
        attack = self.config.attack
        if attack.name != "inflation":
            return found
        return claimed(found, self.hostile, attack.chosen_strength or 1)

    @property
    def hostile(self) -> frozenset[str]:
        """The clients of a simulation that attack."""
        return hostile_clients(self.config.attack, self.training, self.config.seed)

    def as_trained(self) -> RunContext:
        """The context as clients see it: with the data that hostile ones have falsified."""
        if self.poisoned is None:
            return self
        return replace(self, tasks={ONLY: self.poisoned}, poisoned=None)

    @property
    def task_of(self) -> dict[str, str]:
        """Every client's task."""
        return {c.client_id: name for name, task in self.tasks.items() for c in task.data.clients}

    @property
    def clients_per_round(self) -> int:
        """How many clients take part in a round; a fraction is rounded, but never to none."""
        share, all_clients = self.config.federation.clients_per_round, len(self.clients)
        if share is None:
            return all_clients
        if isinstance(share, int):
            return min(share, all_clients)
        return max(1, round(share * all_clients))

    @property
    def bad_images(self) -> int:
        """Images that could not be read."""
        return sum(len(task.data.bad_images) for task in self.tasks.values())

    @property
    def shrunk(self) -> float | None:
        """How many times smaller the images become for the model, those of the worst task.

        See `data.picture_sizes`.
        """
        size = self.model.image_size
        known = [shrunk(task.data.median_size, size) for task in self.tasks.values()]
        return max((factor for factor in known if factor is not None), default=None)

    @property
    def has_validation(self) -> bool:
        """Whether every task has validation examples."""
        return all(len(task.data.validation) for task in self.tasks.values())

    @property
    def has_client_tests(self) -> bool:
        """Whether in every task any client holds a local test set."""
        return all(any(len(c.test) for c in task.data.clients) for task in self.tasks.values())

    def partition_record(self) -> dict[str, Any]:
        """What `partition.json` holds."""
        return partition_record({name: task.data for name, task in self.tasks.items()})

    def put(self, state: RunState) -> None:
        """Puts a state's tensors in the model."""
        self.model.set_parameters(state.shared)
        self.shift(state.shift)

    def shift(self, shift: State) -> None:
        """Changes frozen weights, by layer; see `RunState`."""
        (self.model if self.stacked is None else self.stacked).set_shift(shift)

    def turn_to(self, task: str | None) -> None:
        """Has the model name the classes of a task; with None, or another name, those of all."""
        if self.several:
            self.model.set_task(task if task in self.tasks else None)


def partition_record(data: Mapping[str, FederatedData]) -> dict[str, Any]:
    """What `partition.json` holds of the data of each task."""
    if ONLY in data:
        return data[ONLY].partition_record()
    tasks = {name: own.partition_record() for name, own in data.items()}
    return {"split": SPLIT_RULE, "tasks": tasks}


def for_task(config: Config, name: str) -> Config:
    """The configuration of one task of a run, as if it were the only one."""
    if name == ONLY:
        return config
    data, federation = config.tasks[name], config.federation
    clients = data.num_clients or federation.num_clients
    alone = federation.sharing.model_copy(update={"mode": "shared", "shared_rank": None})
    federation = federation.model_copy(update={"num_clients": clients, "sharing": alone})
    return config.model_copy(update={"data": data, "federation": federation, "tasks": {}})
