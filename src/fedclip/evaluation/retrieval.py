"""How well images find their captions, and captions their images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedclip.data.federated_data import FederatedData
from fedclip.device import at_least_fp32, autocast
from fedclip.evaluation.per_client import at_most, figures, measured
from fedclip.evaluation.predictions import Images
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

KS = (1, 5, 10)
_ROWS = 1024  # of a table of similarities at a time


class TwoTowers(Protocol):
    """What retrieval needs of a model."""

    @property
    def clip(self) -> Any:
        """The CLIP underneath, which knows the temperature."""
        ...

    def eval(self) -> object:
        """Switches dropout off."""
        ...

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image features `[batch, dim]` of length one."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Text features `[texts, dim]` of length one."""
        ...


@dataclass(frozen=True)
class Found:
    """What comes before the first match of each query, and each image's loss.

    `captions` holds for each image how many other captions are at least as near as its own, and
    `images` for each distinct caption how many other images are at least as near as its nearest.
    """

    captions: NDArray[np.int64]
    images: NDArray[np.int64]
    losses: NDArray[np.float64]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.captions)

    @property
    def accuracy(self) -> float | None:
        """Share of images whose nearest caption is their own: image-to-text recall@1."""
        return recall(self.captions, 1)

    @property
    def loss(self) -> float | None:
        """Mean cross-entropy of the images, with the distinct captions as classes."""
        return float(self.losses.mean()) if len(self.losses) else None

    def recalls(self) -> dict[str, dict[str, float | None]]:
        """Recall at 1, 5 and 10, both ways."""
        ways = {"image_to_text": self.captions, "text_to_image": self.images}
        return {
            way: {f"recall_at_{k}": recall(before, k) for k in KS} for way, before in ways.items()
        }

    @classmethod
    def together(cls, parts: Sequence[Found]) -> Found:
        """Queries of several sets, each among its own."""
        return cls(
            np.concatenate([part.captions for part in parts]),
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.losses for part in parts]),
        )


def recall(before: NDArray[np.int64], k: int) -> float | None:
    """Share of queries with a match among the first k; `before` counts what comes before it."""
    return float((before < k).mean()) if len(before) else None


def before_match(similarity: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """Candidates that are no match but at least as near as the nearest match, by query.

    Both are `[queries, candidates]`; each query has a match. Equal similarities count against it.
    """
    best = similarity.masked_fill(~match, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best) & ~match).sum(dim=1)


def find(images: torch.Tensor, texts: torch.Tensor, own: torch.Tensor, scale: float) -> Found:
    """Retrieval among images `[n, dim]` and distinct texts `[m, dim]`, features of length one.

    `own` `[n]` is the place of each image's caption among the texts; `scale` is the logits'.
    """
    places = torch.arange(len(texts), device=texts.device)
    captions, nearest, losses = [], [], []
    for rows in torch.arange(len(images), device=images.device).split(_ROWS):
        similarity = images[rows] @ texts.T  # [rows, m]
        captions.append(before_match(similarity, own[rows, None] == places))
        losses.append(cross_entropy(scale * similarity, own[rows], reduction="none"))
    for rows in places.split(_ROWS):
        nearest.append(before_match(texts[rows] @ images.T, rows[:, None] == own))
    return Found(
        torch.cat(captions).cpu().numpy(),
        torch.cat(nearest).cpu().numpy(),
        torch.cat(losses).double().cpu().numpy(),
    )


@dataclass(frozen=True)
class Embedded:
    """Features of the images and captions that any figure needs, by their number in the data."""

    images: torch.Tensor
    texts: torch.Tensor
    image_numbers: NDArray[np.int64]
    text_numbers: NDArray[np.int64]
    labels: NDArray[np.int64]
    scale: float

    @classmethod
    @torch.inference_mode()
    def of(
        cls,
        model: TwoTowers,
        images: Images,
        data: FederatedData,
        indices: NDArray[np.int64],
        *,
        device: torch.device,
        precision: str,
        batch_size: int,
    ) -> Embedded:
        """Features of the examples at `indices` and of their captions, each computed once."""
        model.eval()
        numbers = np.unique(indices)
        texts = np.unique(data.labels[numbers])
        images.prepare(numbers)
        with autocast(precision, device):
            seen = [
                model.encode_images(images.take(numbers[first : first + batch_size]))
                for first in range(0, len(numbers), batch_size)
            ]
            read = model.encode_texts([data.class_names[i] for i in texts])
        scale = float(model.clip.logit_scale.exp())
        return cls(
            at_least_fp32(torch.cat(seen)), at_least_fp32(read), numbers, texts, data.labels, scale
        )

    def found(self, indices: NDArray[np.int64]) -> Found:
        """Retrieval among these examples and their captions alone."""
        if not len(indices):
            nothing = np.empty(0, np.int64)
            return Found(nothing, nothing, np.empty(0))
        captions, own = np.unique(self.labels[indices], return_inverse=True)
        rows, columns = (
            torch.from_numpy(np.searchsorted(numbers, wanted)).to(self.images.device)
            for numbers, wanted in ((self.image_numbers, indices), (self.text_numbers, captions))
        )
        places = torch.from_numpy(own).to(self.images.device)
        with torch.inference_mode():
            return find(self.images[rows], self.texts[columns], places, self.scale)


def evaluate_pairs(
    model: TwoTowers,
    images: Images,
    data: FederatedData,
    *,
    max_examples: int | None,
    seed: int,
    **how: Any,
) -> dict[str, Any]:
    """Retrieval on the central test set, on validation, and on each client's test set.

    Each set is searched on its own. The keys are those of `evaluate_federation`, where accuracy is
    image-to-text recall@1, and `retrieval` with the recalls on the central test set.
    """
    test, by_client = measured(data, max_examples, seed)
    validation = at_most(data.validation, max_examples, seed_for(seed, "evaluation", "validation"))
    every = np.concatenate([test, validation, *by_client.values()])
    embedded = Embedded.of(model, images, data, every, **how)
    return _figures(
        embedded.found(test),
        embedded.found(validation),
        {client_id: embedded.found(indices) for client_id, indices in by_client.items()},
    )


def evaluate_personal_pairs(
    model: Callable[[str], TwoTowers],
    images: Images,
    data: FederatedData,
    *,
    max_examples: int | None,
    seed: int,
    **how: Any,
) -> dict[str, Any]:
    """The same for models of the clients' own, each on its own examples, taken together.

    `model` gives a client's model by its id.
    """
    tests = measured(data, max_examples, seed)[1]
    by_client: dict[str, Found] = {}
    validated: list[Found] = []
    for client in data.clients:
        test = tests[client.client_id]
        every = np.concatenate([test, client.validation])
        if not len(every):
            continue
        embedded = Embedded.of(model(client.client_id), images, data, every, **how)
        by_client[client.client_id] = embedded.found(test)
        validated.append(embedded.found(client.validation))
    return _figures(Found.together(list(by_client.values())), Found.together(validated), by_client)


def _figures(test: Found, validation: Found, by_client: dict[str, Found]) -> dict[str, Any]:
    metrics = {"accuracy": lambda found: found.accuracy, "loss": lambda found: found.loss}
    return figures(test, validation, by_client, metrics) | {"retrieval": test.recalls()}
