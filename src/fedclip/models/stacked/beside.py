"""Work beside the rest of a pass: the two towers are small kernels that share a GPU well."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class Beside:
    """A second CUDA stream; on other devices all is done at once.

    What the work allocates must be used up on the stream that it ran on, but for its result and
    that one's gradient, which autograd itself orders.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[], T]) -> T:
        """Starts work that needs what was done so far; its result is there after `join`."""
        if self._stream is None:
            return work()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return work()

    def join(self) -> None:
        """From here on the current stream may use the result."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
