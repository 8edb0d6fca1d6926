"""The server's choice of each layer's rank: by kept energy or by importance, within a budget.

A layer's update is s B A; its energy is |s B A|^2, the sum of its squared singular values, and a
rank k keeps the k largest of them. Give the values of the round's exact mean (`algebra.stack`,
`low_rank.svd`): it has a higher rank than a client's adapter, so that a layer can also grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

Values = torch.Tensor | Sequence[float]


def allocate(
    energies: Mapping[str, Values],
    *,
    energy: float,
    budget: float,
    minimum: int,
    maximum: int | Mapping[str, int],
    previous: Mapping[str, int] | None = None,
    hysteresis: float = 0.0,
) -> dict[str, int]:
    """Rank of each layer: the least that keeps the share `energy`, all together within `budget`.

    `energies` are a layer's squared singular values, the largest first. A layer wants the least k
    whose first k values make up at least the share `energy` in (0, 1] of their sum, clamped to
    `minimum` and `maximum`; a layer of zero energy wants `minimum`. With a `maximum` by layer, one
    that may have less than `minimum` gets what it may have.

    `hysteresis` h in [0, 1) keeps ranks from flickering: the rank in `previous` stays while it lies
    between the ranks wanted at the shares energy (1 - h) and min(1, energy (1 + h)). A layer that
    is not in `previous` has nothing to stay at.

    If what is wanted exceeds `budget`, a sum of ranks, every layer gets `minimum`, and the rest
    goes to the largest values over all layers, to no layer more than it wants: of all such ranks
    these keep the most energy, if a value whose rank the layer had in `previous` counts 1 + h
    times. Equal values go to the lower rank first, then by the order of `energies`.

    Raises ValueError for values that are not finite, negative or not descending, for settings out
    of range, and where `minimum` alone exceeds `budget`.
    """
    highest = minimum if isinstance(maximum, Mapping) else maximum
    if not (0 < energy <= 1 and 0 <= hysteresis < 1 and 1 <= minimum <= highest):
        raise ValueError(
            "energy must be in (0, 1], hysteresis in [0, 1), and 1 <= minimum <= maximum; got "
            f"energy {energy}, hysteresis {hysteresis}, minimum {minimum}, maximum {maximum}"
        )
    values = {layer: _checked(layer, found) for layer, found in energies.items()}
    most = {layer: maximum[layer] if isinstance(maximum, Mapping) else maximum for layer in values}
    given = least_ranks(minimum, most)
    left = budget - sum(given.values())
    if left < 0:
        raise ValueError(
            f"a minimum of {minimum} costs {sum(given.values())}, but the budget is {budget}"
        )
    ranks, before = {}, previous or {}
    for layer, own in values.items():
        low, middle, high = (
            min(max(_least_rank(own, share), minimum), most[layer])
            for share in (energy * (1 - hysteresis), energy, min(1.0, energy * (1 + hysteresis)))
        )
        stays = low <= before.get(layer, 0) <= high
        ranks[layer] = before[layer] if stays else middle
    if sum(ranks.values()) <= budget:
        return ranks
    return given | _largest(values, ranks, given, before, 1 + hysteresis, math.floor(left))


def _largest(
    values: Mapping[str, Values],
    ranks: Mapping[str, int],
    given: Mapping[str, int],
    before: Mapping[str, int],
    bonus: float,
    count: int,
) -> dict[str, int]:
    """Ranks of the layers with the `count` largest values above what is `given`.

    A value whose rank the layer had `before` counts `bonus` times.
    """

    def gain(layer: str, rank: int) -> float:
        held = rank <= before.get(layer, 0)
        return float(values[layer][rank - 1] * (bonus if held else 1))

    steps = [(layer, k) for layer, top in ranks.items() for k in range(given[layer] + 1, top + 1)]
    steps.sort(key=lambda step: (-gain(*step), step[1]))
    return dict(steps[:count])


def least_ranks(minimum: int, maximum: Mapping[str, int]) -> dict[str, int]:
    """The rank that each layer has at least: `minimum`, or the most that it may have, if less."""
    return {layer: min(minimum, most) for layer, most in maximum.items()}


def cubic_budget(
    progress: float, *, start: float, end: float, warmup: float, cooldown: float
) -> float:
    """Budget at `progress` in [0, 1] of a run: `start`, then falling as a cube, then `end`.

    AdaLoRA's schedule (Zhang et al. 2023, arXiv:2303.10512, section 3.3): `start` in the share
    `warmup`, `end` in the last share `cooldown`, and between, with x from 0 to 1,
    end + (start - end) (1 - x)^3. Raises ValueError if a share is out of [0, 1] or they exceed 1.
    """
    if not (0 <= progress <= 1 and warmup >= 0 and cooldown >= 0 and warmup + cooldown <= 1):
        raise ValueError(
            "progress, warmup, cooldown and warmup + cooldown must be in [0, 1], "
            f"got {progress}, {warmup} and {cooldown}"
        )
    if progress >= 1 - cooldown:
        return end
    if progress <= warmup:
        return start
    x = (progress - warmup) / (1 - cooldown - warmup)
    return end + (start - end) * (1 - x) ** 3


def is_due(server_round: int, rounds: int, *, every: int, warmup: float, cooldown: float) -> bool:
    """Whether ranks may change after this round, counted from 1.

    After every `every`-th round past the warm-up, and after the first round that reaches the
    cool-down, where `cubic_budget` is at its end; never in the rounds that follow.
    """
    # Rounded, as 10 * (1 - 0.9) must not be a little more than 1.
    last = math.ceil(round(rounds * (1 - cooldown), 9))
    if server_round == last:
        return True
    return round(rounds * warmup, 9) < server_round < last and server_round % every == 0


class Importance(NamedTuple):
    """Smoothed sensitivity and its uncertainty, for each triplet of a layer, `[k]` in float64."""

    mean: torch.Tensor
    uncertainty: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """mean * uncertainty, the largest first: `energies` for `allocate` with energy=1.

        Only how many of a layer's scores are chosen matters: a rank k keeps the k largest singular
        values, whichever of them had the scores.
        """
        return (self.mean * self.uncertainty).sort(descending=True).values


def importance(
    before: Values,
    after: Values,
    previous: Importance | None = None,
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Importance:
    """Importance of a layer's triplets after a round, from the singular values around it.

    After AdaLoRA (Zhang et al. 2023, arXiv:2303.10512, section 3.2). There the sensitivity of a
    weight w is |w dL/dw|, smoothed over steps by `beta1`; its uncertainty is the distance from the
    smoothed value, smoothed by `beta2`; the score is their product. What differs: a server has no
    gradients, so a round's change stands for one, I_j = |sigma_j (sigma_j - old sigma_j)|; only
    singular values count, not the entries of their vectors; and triplets are told apart by their
    place in the order, not followed as they turn. In the first round of an adapter, which is zero
    before it, I_j is the energy sigma_j^2. A direction that is large but settled scores low.

    `before` and `after` are singular values, not squared, the largest first; what is missing in
    the shorter of all is zero. Raises ValueError as `allocate` does, or for a beta out of [0, 1).
    """
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1 and beta2 must be in [0, 1), got {beta1} and {beta2}")
    old = [_checked("before", before), _checked("after", after)]
    smoothed = [x.tolist() for x in previous] if previous else [[], []]
    size = max(map(len, [*old, *smoothed]))
    was, now, mean, uncertainty = (
        torch.tensor(x + [0.0] * (size - len(x)), dtype=torch.float64) for x in [*old, *smoothed]
    )
    sensitivity = (now * (now - was)).abs()
    mean = beta1 * mean + (1 - beta1) * sensitivity
    uncertainty = beta2 * uncertainty + (1 - beta2) * (sensitivity - mean).abs()
    return Importance(mean, uncertainty)


def _checked(name: str, values: Values) -> list[float]:
    """The values as floats; ValueError unless they are finite, not negative and descending."""
    found = torch.as_tensor(values, dtype=torch.float64).tolist()
    descending = all(x >= y for x, y in pairwise(found))
    if not (descending and all(math.isfinite(x) and x >= 0 for x in found)):
        raise ValueError(f"{name}: values must be finite, >= 0 and descending, got {found}")
    return found


def _least_rank(values: list[float], share: float) -> int:
    """The least k whose first k values are at least the share of their sum; 0 for no energy."""
    sums = list(accumulate(values, initial=0.0))
    return next(k for k, kept in enumerate(sums) if kept >= share * sums[-1])
