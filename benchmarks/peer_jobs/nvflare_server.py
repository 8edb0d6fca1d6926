"""What NVFlare's server loads by name: the model whose adapter is averaged, and a stopwatch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from peer_task import ClipClassifier, load_job, write_outcome


class AdapterModel(ClipClassifier):
    """The model as the server keeps it: its state is the adapter alone."""

    def __init__(self, folder: str) -> None:
        super().__init__(load_job(Path(folder)))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The LoRA tensors; NVFlare sends and averages these."""
        return self.adapter()

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Take LoRA tensors."""
        self.load_adapter(state_dict)


class RoundTimer(FLComponent):
    """Seconds from the start of each round until its average is there; writes the outcome."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self._seconds: list[float] = []
        self._started = 0.0
        self._adapter: dict[str, torch.Tensor] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Called by NVFlare for every event of the job."""
        if event_type == AppEventType.ROUND_STARTED:
            self._started = time.perf_counter()
        elif event_type == AppEventType.AFTER_AGGREGATION:
            result = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)
            self._adapter = result.params
            self._seconds.append(time.perf_counter() - self._started)
        elif event_type == EventType.END_RUN:
            adapter = {name: torch.as_tensor(value) for name, value in self._adapter.items()}
            write_outcome(Path(self.output), self._seconds, adapter, ("nvflare",))
