"""The predictions of a classifier on examples, which every metric is computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
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
class How:
    """Where a model is evaluated, in what precision, and how many images pass at a time.

    Without gradients these take far less memory than in training.
    """

    device: torch.device
    precision: str = "fp32"
    batch_size: int = 256


@dataclass(frozen=True)
class Predictions:
    """What a model predicted for `n` examples: the one record that metrics read.

    `labels` and `predicted` classes are int64 `[n]`, `confidence` float64 `[n]` is the probability
    of the predicted class, `losses` float64 `[n]` the cross-entropy in nats, and `logits` float32
    `[n, classes]`.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    losses: NDArray[np.float64]
    logits: NDArray[np.float32]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which examples were classified correctly, `[n]`."""
        return self.labels == self.predicted

    def of(self, rows: NDArray[np.int64]) -> Predictions:
        """The predictions for some of the examples, by their place among these."""
        return Predictions(*(getattr(self, field.name)[rows] for field in fields(self)))

    def split(self, sizes: Sequence[int]) -> list[Predictions]:
        """Consecutive parts of these sizes, which add up to all."""
        rows = np.arange(len(self))
        return [self.of(part) for part in np.split(rows, np.cumsum(sizes)[:-1])]

    @classmethod
    def concatenate(cls, parts: Sequence[Predictions]) -> Predictions:
        """Concatenated predictions of several models, each on different examples."""
        some = [part for part in parts if len(part)] or [none()]
        return cls(*(np.concatenate([getattr(p, f.name) for p in some]) for f in fields(cls)))


def none() -> Predictions:
    """Predictions for no examples."""
    whole, real = np.empty(0, np.int64), np.empty(0, np.float64)
    return Predictions(whole, whole, real, real, np.empty((0, 0), np.float32))


@torch.inference_mode()
def classify(
    model: Classifier,
    images: Images,
    labels: NDArray[np.int64],
    indices: NDArray[np.int64],
    how: How,
) -> Predictions:
    """A model's predictions for the given examples, in their order; repeated ones computed once.

    `labels` are those of the whole data set.
    """
    unique, places = np.unique(indices, return_inverse=True)
    parts = [
        _of_batch(labels[batch], logits)
        for batch, logits in _each_batch(model, images, unique, how)
    ]
    return Predictions.concatenate(parts).of(places)


def _of_batch(labels: NDArray[np.int64], logits: torch.Tensor) -> Predictions:
    logits = at_least_fp32(logits)
    losses = cross_entropy(logits, torch.from_numpy(labels).to(logits.device), reduction="none")
    return Predictions(
        labels,
        logits.argmax(dim=-1).cpu().numpy(),
        logits.double().softmax(dim=-1).amax(dim=-1).cpu().numpy(),
        losses.double().cpu().numpy(),
        logits.float().cpu().numpy(),
    )


def _each_batch(
    model: Classifier,
    images: Images,
    indices: NDArray[np.int64],
    how: How,
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Yields examples, a batch at a time, with their logits `[batch, classes]`, without dropout."""
    model.eval()
    images.prepare(indices)
    for first in range(0, len(indices), how.batch_size):
        batch = indices[first : first + how.batch_size]
        with autocast(how.precision, how.device):
            logits = model(images.take(batch))
        yield batch, logits
