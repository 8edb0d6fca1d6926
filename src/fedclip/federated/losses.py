"""What local training minimises: the loss of a batch, as a sum over its examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from fedclip.device import at_least_fp32

# Of a model, inputs [batch, ...] and labels [batch] on the model's device.
Objective = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


class TwoTowers(Protocol):
    """What learning from captions needs of a model."""

    @property
    def clip(self) -> Any:
        """The CLIP underneath, which knows the temperature."""
        ...

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image features `[batch, dim]` of length one."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Text features `[texts, dim]` of length one."""
        ...


def classification(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the model's logits, summed over the batch."""
    return cross_entropy(at_least_fp32(model(pixels)), labels, reduction="sum")


class Contrastive:
    """CLIP's loss on image-caption pairs, whose labels are numbers of captions.

    Where a picture has several captions, labels are numbers of pairs instead.
    """

    def __init__(self, captions: Sequence[str], pairs: torch.Tensor | None = None) -> None:
        """Takes the captions in the order of their numbers.

        `pairs` `[pairs, 2]` are the caption and the picture of each pair, by number, where labels
        are the pairs' numbers.
        """
        self._captions = captions
        self._pairs = pairs

    def __call__(
        self, model: TwoTowers, pixels: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss of a batch, summed; the temperature is the model's and stays frozen."""
        pictures = None
        if self._pairs is not None:
            labels, pictures = self._pairs[labels.cpu()].to(labels.device).unbind(dim=1)
        distinct, number = labels.unique(return_inverse=True)
        images = model.encode_images(pixels)
        texts = model.encode_texts([self._captions[i] for i in distinct.tolist()])[number]
        with torch.autocast(images.device.type, enabled=False):
            logits = model.clip.logit_scale.detach().exp() * images @ texts.T  # [images, texts]
        return len(labels) * contrastive_loss(logits, labels, pictures)


def contrastive_loss(
    logits: torch.Tensor, captions: torch.Tensor, pictures: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean InfoNCE of a batch of pairs, over both directions.

    `logits` are scaled similarities `[batch, batch]` of images (rows) and captions (columns), and
    `captions` `[batch]` the number of each pair's caption. Pairs with the same caption are no
    negatives of each other: the target is shared equally among them. Nor is any caption in the
    batch that belongs to the same picture, where `pictures` `[batch]` are given. Source: Radford et
    al. 2021, arXiv:2103.00020, figure 3, where all pictures and captions differ.
    """
    same = (captions[:, None] == captions[None, :]).to(logits)
    if pictures is None:
        targets = same / same.sum(dim=1, keepdim=True)  # symmetric, so it serves both directions
        return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    twins = (pictures[:, None] == pictures[None, :]).to(logits)
    match = (twins @ same > 0).to(logits)  # [images, texts]: some pair has both
    own_texts = match / match.sum(dim=1, keepdim=True)
    own_images = match.T / match.T.sum(dim=1, keepdim=True)
    return (cross_entropy(logits, own_texts) + cross_entropy(logits.T, own_images)) / 2
