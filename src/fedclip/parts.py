"""The parts of a run, once they are built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fedclip.config import Config
from fedclip.data.federation import FederatedData
from fedclip.engines.processes import Processes
from fedclip.evaluation.accuracy import Images
from fedclip.models.clip import CLIPLoRAWrapper
from fedclip.models.stacked import StackedClients
from fedclip.records import RunState

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `stacked` is the model as many clients share it (LoRA only).

    `sites` are the clients where they are on other machines, with their numbers of training
    examples; their models of their own are there too.
    """

    config: Config
    model: CLIPLoRAWrapper
    data: FederatedData
    device: torch.device
    precision: str
    images: Images
    stacked: StackedClients | None = None
    processes: Processes = field(default_factory=Processes)
    sites: dict[str, int] | None = None

    @property
    def training(self) -> dict[str, NDArray[np.int64]]:
        """Each client's training examples; centralised training has one client with all."""
        own = {c.client_id: c.train for c in self.data.clients}
        if self.config.federation.strategy != "centralised":
            return own
        return {"all": np.concatenate(list(own.values()))}

    @property
    def clients(self) -> dict[str, int]:
        """Numbers of training examples by client id."""
        if self.sites is not None:
            return self.sites
        return {client_id: len(indices) for client_id, indices in self.training.items()}

    def put(self, state: RunState) -> None:
        """Puts a state's tensors in the model."""
        self.model.set_parameters(state.shared)
        if self.stacked is not None:
            self.stacked.set_shift(state.shift)
        else:
            self.model.set_shift(state.shift)

    @property
    def clients_per_round(self) -> int:
        """How many clients take part in a round; a fraction is rounded, but never to none."""
        share, all_clients = self.config.federation.clients_per_round, len(self.clients)
        if share is None:
            return all_clients
        if isinstance(share, int):
            return min(share, all_clients)
        return max(1, round(share * all_clients))
