"""How well images find their captions, and captions their images.

An image of several captions is searched once and is a single candidate: any caption of it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from fedclip.data.federated_data import FederatedData
from fedclip.device import at_least_fp32, autocast
from fedclip.evaluation.per_client import figures, measured, validated
from fedclip.evaluation.predictions import How, Images

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

    `captions` holds for each distinct image how many captions of others are at least as near as the
    nearest of its own, and `images` for each distinct caption how many other images are at least as
    near as the nearest that has it.
    """

    captions: NDArray[np.int64]
    images: NDArray[np.int64]
    losses: NDArray[np.float64]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.captions)

    @property
    def accuracy(self) -> float | None:
        """Share of images whose nearest caption is one of theirs: image-to-text recall@1."""
        return recall(self.captions, 1)

    @property
    def loss(self) -> float | None:
        """Mean over the images of -log of the total probability of their captions.

        The distinct captions are the classes; with one caption each it is the cross-entropy.
        """
        return float(self.losses.mean()) if len(self.losses) else None

    def recalls(self) -> dict[str, dict[str, float | None]]:
        """Recall at 1, 5 and 10, both ways."""
        ways = {"image_to_text": self.captions, "text_to_image": self.images}
        return {
            way: {f"recall_at_{k}": recall(before, k) for k in KS} for way, before in ways.items()
        }

    @classmethod
    def together(cls, parts: Sequence[Found]) -> Found:
        """Queries of several sets, each searched within its set."""
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


def find(
    images: torch.Tensor,
    texts: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> Found:
    """Retrieval among distinct images `[n, dim]` and distinct texts `[m, dim]`, all of length one.

    `pairs` says which belong together: places among the images and among the texts, both `[pairs]`.
    Each image and each text is in one pair at least. `scale` is the logits'.
    """
    image, text = pairs
    captions, nearest, losses = [], [], []
    for rows in torch.arange(len(images), device=images.device).split(_ROWS):
        similarity, match = images[rows] @ texts.T, _match(rows, image, text, len(texts))
        captions.append(before_match(similarity, match))
        logits = scale * similarity
        own = logits.masked_fill(~match, -torch.inf).logsumexp(dim=1)
        losses.append(logits.logsumexp(dim=1) - own)
    for rows in torch.arange(len(texts), device=texts.device).split(_ROWS):
        match = _match(rows, text, image, len(images))
        nearest.append(before_match(texts[rows] @ images.T, match))
    return Found(
        torch.cat(captions).cpu().numpy(),
        torch.cat(nearest).cpu().numpy(),
        torch.cat(losses).double().cpu().numpy(),
    )


def _match(
    rows: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor, candidates: int
) -> torch.Tensor:
    """Which candidates match the queries `rows`, a run of numbers: a mask `[rows, candidates]`."""
    first = int(rows[0])
    here = (query >= first) & (query < first + len(rows))
    match = torch.zeros(len(rows), candidates, dtype=torch.bool, device=rows.device)
    match[query[here] - first, candidate[here]] = True
    return match


@dataclass(frozen=True)
class Embedded:
    """Features of the images and captions that any figure needs, each computed once.

    `pictures` and `labels` are the numbers of each example's picture and caption; `image_numbers`
    and `text_numbers` say of which ones there are features, ascending.
    """

    images: torch.Tensor
    texts: torch.Tensor
    image_numbers: NDArray[np.int64]
    text_numbers: NDArray[np.int64]
    pictures: NDArray[np.int64]
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
        how: How,
    ) -> Embedded:
        """Features of the examples at `indices` and of their captions."""
        model.eval()
        pictures = np.arange(len(data.labels)) if data.pictures is None else data.pictures
        rows = np.unique(indices)
        texts = np.unique(data.labels[rows])
        numbers, first_row = np.unique(pictures[rows], return_index=True)
        shown = rows[first_row]  # one image of each picture
        images.prepare(shown)
        with autocast(how.precision, how.device):
            seen = [
                model.encode_images(images.take(shown[first : first + how.batch_size]))
                for first in range(0, len(shown), how.batch_size)
            ]
            read = model.encode_texts([data.class_names[i] for i in texts])
        return cls(
            at_least_fp32(torch.cat(seen)),
            at_least_fp32(read),
            numbers,
            texts,
            pictures,
            data.labels,
            scale=float(model.clip.logit_scale.exp()),
        )

    def found(self, indices: NDArray[np.int64]) -> Found:
        """Retrieval among these examples and their captions alone."""
        if not len(indices):
            nothing = np.empty(0, np.int64)
            return Found(nothing, nothing, np.empty(0))
        pictures, image = np.unique(self.pictures[indices], return_inverse=True)
        captions, text = np.unique(self.labels[indices], return_inverse=True)

        def here(numbers: NDArray[np.int64]) -> torch.Tensor:
            return torch.from_numpy(numbers).to(self.images.device)

        rows = here(np.searchsorted(self.image_numbers, pictures))
        columns = here(np.searchsorted(self.text_numbers, captions))
        with torch.inference_mode():
            return find(
                self.images[rows], self.texts[columns], (here(image), here(text)), self.scale
            )


def evaluate_pairs(
    model: TwoTowers,
    images: Images,
    data: FederatedData,
    how: How,
    *,
    max_examples: int | None,
    seed: int,
) -> dict[str, Any]:
    """Retrieval on the central test set, on validation, and on each client's test set.

    Each set is searched on its own. The keys are those of `evaluate_federation`, where accuracy is
    image-to-text recall@1 and `test_examples` counts distinct images, and `retrieval` with the
    recalls on the central test set.
    """
    test, by_client = measured(data, max_examples, seed)
    validation = validated(data, max_examples, seed)
    every = np.concatenate([test, validation, *by_client.values()])
    embedded = Embedded.of(model, images, data, every, how)
    return _figures(
        embedded.found(test),
        embedded.found(validation),
        {client_id: embedded.found(indices) for client_id, indices in by_client.items()},
    )


def evaluate_personal_pairs(
    model: Callable[[str], TwoTowers],
    images: Images,
    data: FederatedData,
    how: How,
    *,
    max_examples: int | None,
    seed: int,
) -> dict[str, Any]:
    """The same for personalised models, each on its client's local test set, pooled.

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
        embedded = Embedded.of(model(client.client_id), images, data, every, how)
        by_client[client.client_id] = embedded.found(test)
        validated.append(embedded.found(client.validation))
    return _figures(Found.together(list(by_client.values())), Found.together(validated), by_client)


def _figures(test: Found, validation: Found, by_client: dict[str, Found]) -> dict[str, Any]:
    metrics = {"accuracy": lambda found: found.accuracy, "loss": lambda found: found.loss}
    return figures(test, validation, by_client, metrics) | {"retrieval": test.recalls()}
