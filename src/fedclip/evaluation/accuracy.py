"""How many examples a model classifies correctly, centrally and for each client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedclip.device import at_least_fp32, autocast

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Classifier(Protocol):
    """What evaluation needs of a model."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, classes]` of what `Images` gives."""
        ...

    def eval(self) -> object:
        """Switches dropout off."""
        ...


class Images(Protocol):
    """Where a model's inputs come from, by example index."""

    def prepare(self, indices: NDArray[np.int64]) -> None:
        """Gets ready for taking these."""
        ...

    def take(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Inputs `[len(indices), ...]`, on the model's device."""
        ...


@dataclass(frozen=True)
class Scores:
    """Per example: was it classified correctly, and its cross-entropy loss.

    Indexed by the example's number in the data set, so that the central test set and the clients'
    shares of it are read from one pass.
    """

    correct: dict[int, bool]
    losses: dict[int, float]

    def accuracy(self, indices: NDArray[np.int64]) -> float | None:
        """Share of these examples that are correct; None when there are none."""
        return _mean([self.correct[int(i)] for i in indices])

    def loss(self, indices: NDArray[np.int64]) -> float | None:
        """Mean loss over these examples; None when there are none."""
        return _mean([self.losses[int(i)] for i in indices])


@torch.inference_mode()
def score(
    model: Classifier,
    images: Images,
    labels: NDArray[np.int64],
    indices: NDArray[np.int64],
    *,
    device: torch.device,
    precision: str = "fp32",
    batch_size: int = 256,
) -> Scores:
    """Scores of the given examples, each computed once however often it is listed.

    `batch_size` images pass at a time; without gradients they take far less memory than training.
    """
    correct: dict[int, bool] = {}
    losses: dict[int, float] = {}
    unique = np.unique(indices)
    for batch, logits in each_batch(model, images, unique, device, precision, batch_size):
        targets = torch.from_numpy(labels[batch]).to(device)
        hits = (logits.argmax(dim=-1) == targets).tolist()
        nats = cross_entropy(at_least_fp32(logits), targets, reduction="none").tolist()
        for index, hit, nat in zip(batch.tolist(), hits, nats, strict=True):
            correct[index] = hit
            losses[index] = nat
    return Scores(correct, losses)


@torch.inference_mode()
def each_batch(
    model: Classifier,
    images: Images,
    indices: NDArray[np.int64],
    device: torch.device,
    precision: str,
    batch_size: int,
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Yields examples, a batch at a time, with their logits `[batch, classes]`, without dropout."""
    model.eval()
    images.prepare(indices)
    for first in range(0, len(indices), batch_size):
        batch = indices[first : first + batch_size]
        with autocast(precision, device):
            logits = model(images.take(batch))
        yield batch, logits


def spread(accuracies: Mapping[str, float | None]) -> dict[str, float] | None:
    """Mean, min and max of the clients' accuracies, leaving out clients without test examples."""
    known = [a for a in accuracies.values() if a is not None]
    if not known:
        return None
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}


def _mean(values: list[bool] | list[float]) -> float | None:
    return float(np.mean(values)) if values else None
