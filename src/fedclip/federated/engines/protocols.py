"""What the batched engine needs of a model and of its inputs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

from fedclip.records import State

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class Stacked(Protocol):
    """What the engine needs of a model that takes many clients at once."""

    @property
    def trained(self) -> Sequence[str]:
        """Names of the tensors that get gradients."""
        ...

    def set_shift(self, shift: State) -> None:
        """Adds a change `[out, in]` to frozen weights, by layer."""
        ...

    @property
    def version(self) -> Hashable:
        """As long as it is the same, a captured pass still holds."""
        ...

    def scales(self, ranks: Sequence[int]) -> torch.Tensor:
        """What clients of these ranks multiply their updates with, `[clients, ...]`."""
        ...

    def logits(
        self,
        state: State,
        inputs: torch.Tensor,
        counts: Sequence[int],
        keys: Sequence[int] | torch.Tensor,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `[rows, classes]` of the clients' rows, laid end to end."""
        ...


class Images(Protocol):
    """Where a model's inputs come from, by example index."""

    @property
    def source(self) -> torch.Tensor | None:
        """The inputs of all examples `[n, ...]`, if they lie on the model's device."""
        ...

    def prepare(self, indices: NDArray[np.int64]) -> None:
        """Gets ready for taking these."""
        ...

    def take(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Inputs `[len(indices), ...]`, on the model's device."""
        ...
