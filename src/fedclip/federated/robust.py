"""Robust aggregation: a guard that puts a rule in the place of the mean by examples.

`Robust` goes directly around a strategy. What the strategy takes by `mean` is then the rule's, and
what it takes by `stacked` are the updates with the rule's weights. The rules are in
`fedclip.lora.robust_rules`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedclip.errors import FedclipWarning, TrainingFailed, UsageError
from fedclip.federated.strategies.base import Setting, Strategy, Train, guarded, product_gram
from fedclip.federated.update_checks import Outlier, Reason, outliers
from fedclip.federated.updates import Guarded, Quorum, Updates, Weigh, by_examples
from fedclip.lora.names import pairs
from fedclip.lora.robust_rules import RULES, Rule, capped_weights, mixing
from fedclip.records import ClientReport, Cohort, RunState, TrainRequest

START = ""
"""Client id of the row that stands for the round's start, where weights are less than 1 in sum."""


@dataclass(frozen=True)
class RobustPlan:
    """The rule by name, how many hostile clients it tolerates, and what precedes it.

    An update whose norm is more than `largest_update` times the others' is left out beforehand.
    """

    name: str
    rule: Rule
    attackers: int
    mixing: bool = False
    largest_update: float = 10.0


class Robust(Strategy):
    """A robust rule, or a cap on what one client weighs, around a strategy.

    Ignores numbers of examples where there is a rule: they are a client's own word. A round's
    updates are held in memory. Bytes as the strategy inside.
    """

    def __init__(self, inner: Strategy, plan: RobustPlan | float) -> None:
        """Takes the strategy, and the plan or the largest share of the weights."""
        super().__init__(inner.setting)
        self.personal = inner.personal
        self._inner = inner
        self._plan = plan
        self._told: set[str] = set()

    def asked(self, request: TrainRequest) -> TrainRequest:
        """As the strategy inside has it."""
        return self._inner.asked(request)

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """A round of the strategy inside, whose updates come through a guard."""

        def guard(updates: Updates) -> Updates:
            if isinstance(self._plan, RobustPlan):
                return RobustUpdates(updates, self._plan, self.setting)
            return CappedUpdates(updates, self._plan, self._told)

        return self._inner.round(state, request, guarded(train, guard))


class RobustUpdates(Guarded):
    """Updates whose mean is a robust rule's, and whose stack has its weights."""

    def __init__(self, inner: Updates, plan: RobustPlan, setting: Setting) -> None:
        super().__init__(inner)
        self._plan, self._setting = plan, setting

    def mean(self, weigh: Weigh = by_examples) -> dict[str, torch.Tensor]:
        """The rule's aggregate, whatever the clients were to weigh."""
        if not self._plan.rule.coordinates:
            return Updates(self.request, [self.stacked()], quorum=Quorum(1)).mean()
        cohort, gram, attackers = self._taken()
        found = {}
        for name, stacked in cohort.tensors.items():
            values = stacked.double().numpy().reshape(len(gram), -1)
            if self._plan.mixing:
                values = mixing(gram, attackers) @ values
            value = torch.from_numpy(self._plan.rule.apply(values, attackers))
            found[name] = value.to(stacked.dtype).reshape(stacked.shape[1:])
        return found

    def stacked(self) -> Cohort:
        """The clients that the rule gives a weight, and the start for what is left of 1.

        Of a coordinate rule it is the geometric median, for a strategy's round that needs products.
        """
        cohort, gram, attackers = self._taken()
        weights = weights_of(self._plan, gram, attackers)
        named = zip(cohort.reports, weights.tolist(), strict=True)
        self.weights.update({report.client_id: round(weight, 12) for report, weight in named})
        kept = [row for row, weight in enumerate(weights) if weight > 1e-12]
        weighed = _weighed(cohort.rows(kept), [float(weights[row]) for row in kept])
        return weighed if (left := 1 - weights.sum()) < 1e-9 else self._with_start(weighed, left)

    def _with_start(self, cohort: Cohort, weight: float) -> Cohort:
        report = ClientReport(START, 1, 0.0, 1, 0.0, weight=weight)
        tensors = {
            name: torch.cat([stacked, self.request.state[name][None].to(stacked)])
            for name, stacked in cohort.tensors.items()
        }
        return Cohort((*cohort.reports, report), tensors)

    def _taken(self) -> tuple[Cohort, Any, int]:
        """The updates that are not far too large, their Gram matrix, and attackers among them."""
        cohort, plan = self.inner.stacked(), self._plan
        gram = gram_of_changes(self._setting, self.request, cohort)
        norms = np.sqrt(np.diag(gram) / [report.steps for report in cohort.reports])
        ids = [report.client_id for report in cohort.reports]
        by_client = dict(zip(ids, norms.tolist(), strict=True))
        large = outliers(by_client, plan.largest_update, usual=None)
        self.left_out += [self._too_large(found).of(client) for client, found in large.items()]
        kept = [row for row, client_id in enumerate(ids) if client_id not in large]
        attackers = max(0, plan.attackers - len(large))
        if len(kept) < plan.rule.least(attackers) or len(ids) < plan.rule.least(plan.attackers):
            raise TrainingFailed(
                f"round {self.request.server_round}: {len(kept)} updates can be used, and "
                f"robust.rule: {plan.name} needs {plan.rule.least(plan.attackers)} to bear "
                f"{plan.attackers} hostile clients; the last finished round is kept"
            )
        return cohort.rows(kept), gram[np.ix_(kept, kept)], attackers

    def _too_large(self, found: Outlier) -> Reason:
        limit = f"{self._plan.largest_update:g} times is the limit (deploy.largest_update)"
        words = f"sends an update {found.times:.0f} times as large as the others'; {limit}"
        return Reason("size", words, found.times)


class CappedUpdates(Guarded):
    """Updates of which none weighs more than a share of the round."""

    def __init__(self, inner: Updates, share: float, told: set[str]) -> None:
        super().__init__(inner)
        self._share, self._told = share, told

    def mean(self, weigh: Weigh = by_examples) -> dict[str, torch.Tensor]:
        """The mean by capped weights."""
        return Updates(self.request, [self._capped(weigh)], quorum=Quorum(1)).mean()

    def stacked(self) -> Cohort:
        """The updates with capped weights."""
        return self._capped(by_examples)

    def _capped(self, weigh: Weigh) -> Cohort:
        cohort = self.inner.stacked()
        before = np.array([weigh(report) for report in cohort.reports], dtype=np.float64)
        after = capped_weights(before, self._share)
        before, after = before / before.sum(), after / after.sum()
        for report, own, now in zip(cohort.reports, before, after, strict=True):
            if now >= own - 1e-12:
                continue
            self.weights[report.client_id] = round(float(now), 12)
            if report.client_id not in self._told:
                self._told.add(report.client_id)
                warnings.warn(
                    f"{report.client_id} has {report.num_examples} examples, {own:.1%} of the "
                    f"round's, and weighs {now:.1%} (robust.largest_share: {self._share:g})",
                    FedclipWarning,
                    stacklevel=2,
                )
        return _weighed(cohort, after.tolist())


def weights_of(plan: RobustPlan, gram: Any, attackers: int) -> Any:
    """The weights `[n]` by which the changes are summed, at most 1 together."""
    rule = RULES["rfa"] if plan.rule.coordinates else plan.rule
    mixed = mixing(gram, attackers) if plan.mixing else np.eye(len(gram))
    try:
        found = np.asarray(rule.apply(mixed @ gram @ mixed.T, attackers), dtype=np.float64)
    except Exception as error:  # of a user's rule; those of fedclip raise nothing
        raise UsageError(f"robust.rule: {plan.name}: {type(error).__name__}: {error}") from error
    if found.shape != (len(gram),) or not (np.isfinite(found).all() and (found >= 0).all()):
        raise UsageError(f"robust.rule: {plan.name} must give {len(gram)} weights, none below 0")
    if not 0 < found.sum() <= 1 + 1e-9:
        raise UsageError(f"robust.rule: the weights of {plan.name} must sum to 1 at most")
    return found @ mixed


def gram_of_changes(setting: Setting, request: TrainRequest, cohort: Cohort) -> Any:
    """Inner products `[n, n]` of what the clients changed: products B A, and all other tensors."""
    sent = {n: t for n, t in cohort.tensors.items() if n in request.names_sent}
    updates = replace(cohort, tensors=sent)
    total = product_gram(setting, request.state, updates, request.frames)
    inside = {name for pair in pairs(request.state).values() for name in pair}
    for name in sorted(sent.keys() - inside):
        change = (sent[name].double() - request.state[name].double()).flatten(1)
        total = total + change @ change.T
    return total.numpy()


def _weighed(cohort: Cohort, weights: list[float]) -> Cohort:
    pairs_ = zip(cohort.reports, weights, strict=True)
    return replace(cohort, reports=tuple(replace(r, weight=weight) for r, weight in pairs_))
