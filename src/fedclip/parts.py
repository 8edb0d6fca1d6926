"""The parts of a run, once they are built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedclip.config import Config
from fedclip.data.federation import FederatedData
from fedclip.engines.processes import Processes
from fedclip.evaluation.accuracy import Images
from fedclip.models.clip import CLIPLoRAWrapper
from fedclip.models.stacked import StackedClients

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `stacked` is the model as many clients share it (LoRA only)."""

    config: Config
    model: CLIPLoRAWrapper
    data: FederatedData
    device: torch.device
    precision: str
    images: Images
    stacked: StackedClients | None = None
    processes: Processes = field(default_factory=Processes)

    @property
    def clients(self) -> dict[str, int]:
        """Numbers of training examples by client id."""
        return {c.client_id: len(c.train) for c in self.data.clients}

    @property
    def clients_per_round(self) -> int:
        """How many clients take part in a round; a fraction is rounded, but never to none."""
        share, all_clients = self.config.federation.clients_per_round, len(self.data.clients)
        if share is None:
            return all_clients
        if isinstance(share, int):
            return min(share, all_clients)
        return max(1, round(share * all_clients))
