"""Hyperparameter search of one arm: one knob after the other, each with the same budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, stdev

LOWEST, HIGHEST = "lowest", "highest"

Values = Mapping[str, float]
"""A value for each knob, by its key."""
Losses = Sequence[float | None]
"""Validation losses of one value, by tuning seed; None where training diverged."""
Search = Generator[list[Values], list[Losses], "Choice"]


@dataclass(frozen=True)
class Knob:
    """How one hyperparameter was chosen.

    `losses` holds the mean validation loss of each value tried, None where training diverged.
    `edge` is `lowest` or `highest` where the best value is the last one tried: a better one may
    lie beyond. `ties` are the values whose mean lies within a standard error of the best.
    """

    value: float
    edge: str | None = None
    ties: tuple[float, ...] = ()
    losses: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The values that an arm runs with; a knob without `losses` was given, not tuned."""

    knobs: Mapping[str, Knob] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """The chosen value of every knob."""
        return {key: knob.value for key, knob in self.knobs.items()}

    @property
    def edge(self) -> str | None:
        """The first knob whose best value lies at an edge."""
        return next((key for key, knob in self.knobs.items() if knob.edge), None)


class NoneConverged(Exception):
    """Training diverged at every value of a knob."""


def search(
    knobs: Mapping[str, Sequence[float]], budget: int, allowed: Callable[[Values], bool]
) -> Search:
    """Yields the values to be tried, takes their losses, and returns the choice.

    Each knob in turn, the others at their best or middle value: first the values given, then
    beyond an edge at which the best one lies, then around the best one, until `budget` values have
    been tried. So every knob of every arm has the same number of runs. What `allowed` refuses is a
    bound of the knob, and the best value there no edge. Of equals the lower value is taken.
    """
    found = {key: Knob(sorted(values)[(len(values) - 1) // 2]) for key, values in knobs.items()}
    for key, values in knobs.items():
        if len(set(values)) < 2:
            continue
        others = {name: knob.value for name, knob in found.items()}
        trials, wanted = _Trials(), sorted(set(values))
        while wanted:
            losses = yield [{**others, key: value} for value in wanted]
            trials.losses.update(zip(wanted, losses, strict=True))
            wanted = []
            while len(trials.losses) < budget and not wanted and (step := trials.next_step()):
                place, value = step
                if value in trials.losses or not allowed({**others, key: value}):
                    trials.closed.add(place)
                else:
                    wanted = [value]
        found[key] = trials.outcome(key)
    return Choice(found)


Place = str | tuple[float, float]
"""Where a value may be tried: beyond an end, or between two others."""


@dataclass
class _Trials:
    """The values of one knob that were tried, with their losses by tuning seed."""

    losses: dict[float, Losses] = field(default_factory=dict)
    closed: set[Place] = field(default_factory=set)  # where nothing more can be tried
    steps: Counter[str] = field(default_factory=Counter)  # beyond either end

    def mean(self, value: float) -> float:
        """Mean loss over the tuning seeds; infinite where any of them diverged."""
        return fmean([math.inf if loss is None else loss for loss in self.losses[value]])

    def best(self) -> float:
        """The value of the lowest mean, of equals the lowest value."""
        return min(sorted(self.losses), key=self.mean)

    def next_step(self) -> tuple[Place, float] | None:
        """Beyond the edge where the best value lies, else between it and its farther neighbour."""
        tried, best = sorted(self.losses), self.best()
        if best == tried[0] and LOWEST not in self.closed:
            return LOWEST, self._beyond(LOWEST, tried[1], tried[0])
        if best == tried[-1] and HIGHEST not in self.closed:
            return HIGHEST, self._beyond(HIGHEST, tried[-2], tried[-1])
        place = tried.index(best)
        around = tried[max(0, place - 1) : place + 2]
        gaps = [
            (_scale(high) - _scale(low), (low, high))
            for low, high in pairwise(around)
            if (low, high) not in self.closed
        ]
        if not gaps:
            return None
        low, high = max(gaps)[1]
        lowest = self._vertex(around)
        if lowest is not None and lowest not in self.losses:
            return next((gap for _, gap in gaps if gap[0] < lowest < gap[1]), (low, high)), lowest
        return (low, high), self._rounded(math.sqrt(low * high) if low > 0 else high / 2)

    def _vertex(self, around: Sequence[float]) -> float | None:
        """The lowest point of the parabola through three values, on a logarithmic scale.

        None where there is no such parabola. So near one of the three that nothing would be
        learned it is moved away, a tenth of the way. Source: Brent 1973, Algorithms for
        Minimization without Derivatives, chapter 5.
        """
        losses = [self.mean(value) for value in around]
        if len(around) < 3 or around[0] <= 0 or not all(map(math.isfinite, losses)):
            return None
        (left, middle, right), (fl, fm, fr) = map(math.log, around), losses
        a, b = (middle - left) * (fm - fr), (middle - right) * (fm - fl)
        if a == b:
            return None
        move = ((middle - left) * a - (middle - right) * b) / (2 * (a - b))
        least = 0.1 * min(middle - left, right - middle)
        at = middle - move
        at = min(max(at, left + least), right - least)
        if abs(at - middle) < least:
            at = middle + math.copysign(least, at - middle)
        return self._rounded(math.exp(at))

    def _beyond(self, side: str, inner: float, outer: float) -> float:
        """The next value outwards: by the factor between the last two, then by its square."""
        if outer == 0:
            return outer  # nothing lies below
        self.steps[side] += 1
        factor = outer / inner if inner > 0 else 2.0
        return self._rounded(outer * factor ** min(2, self.steps[side]))

    def _rounded(self, value: float) -> float:
        """Three digits, so that names and tables stay short; whole numbers stay whole."""
        whole = all(isinstance(tried, int) for tried in self.losses)
        return round(value) if whole else float(f"{value:.3g}")

    def outcome(self, key: str) -> Knob:
        """The best value, and how sure that is."""
        tried, best = sorted(self.losses), self.best()
        if math.isinf(self.mean(best)):
            shown = ", ".join(f"{value:g}" for value in tried)
            raise NoneConverged(
                f"training diverged at every {key} that was tried ({shown}); give others in `tune`"
            )
        edge = {tried[0]: LOWEST, tried[-1]: HIGHEST}.get(best)
        means = {f"{value:g}": self.mean(value) for value in tried}
        return Knob(
            value=best,
            edge=None if edge in self.closed else edge,
            ties=tuple(v for v in tried if v != best and self._ties(v, best)),
            losses={name: None if math.isinf(mean) else mean for name, mean in means.items()},
        )

    def _ties(self, value: float, best: float) -> bool:
        pairs = zip(self.losses[value], self.losses[best], strict=True)
        apart = [a - b for a, b in pairs if a is not None and b is not None]
        if len(apart) < len(self.losses[best]):
            return False
        return fmean(apart) <= (stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0)


def _scale(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
