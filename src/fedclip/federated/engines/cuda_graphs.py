"""CUDA graphs: what launches thousands of kernels is recorded once and launched as one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable

import torch

from fedclip.errors import FedclipWarning


class Graphs:
    """Runs functions that work in place on tensors that stay where they are.

    The first call of a key runs as it is, which is real work and warms up; the second one is
    captured, and all from then on are replays. Where capture fails, and on other devices than
    CUDA's, every call runs as it is. The graphs of one object share their memory, as they run one
    after another and leave nothing in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._captures = device.type == "cuda"
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self.seconds = 0.0  # that captures took

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs a function, always the same one for a key, or replays what it does."""
        if key in self._seen and self._captures and key not in self._graphs:
            self._capture(key, function)
        graph = self._graphs.get(key)
        if graph is None:
            self._seen.add(key)
            function()
        else:
            graph.replay()

    def _capture(self, key: Hashable, function: Callable[[], None]) -> None:
        started = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                function()
        except RuntimeError as error:
            self._captures = False
            warnings.warn(
                f"training steps are not captured as CUDA graphs and run one kernel at a time, as "
                f"with engine.graphs: off ({type(error).__name__}: {str(error).splitlines()[0]})",
                FedclipWarning,
                stacklevel=2,
            )
            return
        self._graphs[key] = graph
        self.seconds += time.perf_counter() - started
