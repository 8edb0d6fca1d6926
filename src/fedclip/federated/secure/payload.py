"""What a masked vector holds: the weighted changes of an update, then loss and weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedclip.federated.secure.fixed_point import FixedPoint
from fedclip.federated.secure.session import Broken
from fedclip.federated.secure.updates import EXTRA
from fedclip.records import SecureSum, State

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_LOSS = 256.0
"""A client's loss above this counts as this."""


@dataclass(frozen=True)
class Terms:
    """How all clients of a sum write their vectors; it is the same for all, or masks do not cancel.

    A client weighs by its examples, as a share of `unit`, and as one with `unit` where it has more.
    `largest_change` is the most by which a client may change a number.
    """

    clients: int
    unit: int
    largest_change: float

    @property
    def changes(self) -> FixedPoint:
        """The form of the weighted changes."""
        return FixedPoint(self.clients, self.largest_change)

    @property
    def losses(self) -> FixedPoint:
        """The form of the weighted losses."""
        return FixedPoint(self.clients, LARGEST_LOSS)

    @property
    def weights(self) -> FixedPoint:
        """The form of the weights, which are at most 1."""
        return FixedPoint(self.clients, 1.0)

    def weight_word(self, examples: int) -> NDArray[np.uint32]:
        """A client's weight, at least one step of it."""
        return np.maximum(self.weights.encode(np.array([min(examples / self.unit, 1.0)])), 1)

    def length(self, start: State, names: Sequence[str]) -> int:
        """Words of a vector."""
        return sum(start[name].numel() for name in names) + EXTRA


def vector_of(
    update: State, start: State, names: Sequence[str], examples: int, loss: float, terms: Terms
) -> NDArray[np.uint32]:
    """A client's vector before it is masked; raises DoesNotFit for a change that is too large.

    A loss that the client does not tell (nan) is 0.
    """
    weight = terms.weight_word(examples)
    share = float(terms.weights.decode(weight)[0])
    changes = [(update[n].double() - start[n].double()).flatten().numpy() for n in names]
    told = np.array([0.0 if isnan(loss) else share * min(loss, LARGEST_LOSS)])
    parts = [*(terms.changes.encode(share * change) for change in changes)]
    return np.concatenate([*parts, terms.losses.encode(told), weight])


def mean_of(
    total: NDArray[np.uint32],
    start: State,
    names: Sequence[str],
    examples: Sequence[int],
    terms: Terms,
) -> SecureSum:
    """The mean of the clients whose vectors are in a sum, who have so many examples each.

    Raises Broken where their weights do not add up: then masks are left in it, or somebody lied.
    """
    expected = sum(int(terms.weight_word(count)[0]) for count in examples)
    if int(total[-1]) != expected % 2**32:
        raise Broken(
            "the weights in the sum do not add up, so it is no sum of what was asked for: a client "
            "has masked otherwise than agreed"
        )
    weight = float(terms.weights.decode(total[-1:])[0])
    loss = float(terms.losses.decode(total[-2:-1])[0]) / weight
    means, at = dict[str, torch.Tensor](), 0
    for name in names:
        like = start[name]
        words = total[at : at + like.numel()]
        change = torch.from_numpy(terms.changes.decode(words) / weight).view(like.shape)
        means[name] = (like.double() + change.to(like.device)).to(like.dtype)
        at += like.numel()
    return SecureSum(means, loss)
