"""What a run's figures rest on: whether there is anything to measure, and which classes lack it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedclip.config import EvaluationConfig
from fedclip.data.federated_data import FederatedData
from fedclip.data.source import some
from fedclip.errors import FedclipWarning, UsageError
from fedclip.evaluation.metrics import chosen
from fedclip.evaluation.per_client import measured, validated
from fedclip.experiment.context import RunContext

if TYPE_CHECKING:
    from numpy.typing import NDArray

NOT_TESTED, NOT_VALIDATED = "classes_not_tested", "classes_not_validated"


@dataclass(frozen=True)
class Coverage:
    """Of so many `classes` to train on, the names of those without a test or validation image.

    Of several tasks, names have their task's in front. A set without any images misses no class.
    """

    classes: int
    not_tested: tuple[str, ...]
    not_validated: tuple[str, ...]

    @classmethod
    def of(cls, context: RunContext, personal: bool = False) -> Coverage:
        """What the figures of a run cover; `personal` models are judged on the clients' tests."""
        limit, seed = context.config.evaluation.max_examples, context.config.seed
        if not context.several:
            return cls.of_data(context.data, limit, seed, personal)
        found = {
            name: cls.of_data(task.data, limit, seed, personal)
            for name, task in context.tasks.items()
        }
        return cls(
            sum(own.classes for own in found.values()),
            tuple(f"{name}: {c}" for name, own in found.items() for c in own.not_tested),
            tuple(f"{name}: {c}" for name, own in found.items() for c in own.not_validated),
        )

    @classmethod
    def of_data(
        cls, data: FederatedData, max_examples: int | None, seed: int, personal: bool = False
    ) -> Coverage:
        """The same for one data set, of which at most `max_examples` of each set are measured."""
        if data.captioned:
            return cls(0, (), ())
        tests, by_client = measured(data, max_examples, seed)
        chosen_by = validated(data, max_examples, seed)
        if personal and data.clients:
            tests = np.concatenate(list(by_client.values()))
            chosen_by = np.concatenate([client.validation for client in data.clients])
        pool = _pool(data)
        missing = [_missing(data, pool, measured_rows) for measured_rows in (tests, chosen_by)]
        return cls(len(pool), *missing)

    def record(self) -> dict[str, list[str]]:
        """What `summary.json` holds of it."""
        return {NOT_TESTED: list(self.not_tested), NOT_VALIDATED: list(self.not_validated)}

    def warn_of_tests(self) -> None:
        """Name the classes without a test image."""
        self._warn(self.not_tested, "test", "no accuracy speaks of them")

    def warn_of_validation(self, what: str) -> None:
        """Name the classes without a validation image, where validation chooses something."""
        self._warn(self.not_validated, "validation", f"{what} chosen without them")

    def warn_of_choices(self, evaluation: EvaluationConfig) -> None:
        """The same for what a run chooses by validation."""
        best, end = evaluation.keep_best, evaluation.patience is not None
        if best or end:
            both = "the best round and the end of the run are"
            one = "the best round is" if best else "the end of the run is"
            self.warn_of_validation(both if best and end else one)

    def _warn(self, names: Sequence[str], kind: str, so: str) -> None:
        if names:
            warnings.warn(
                f"{len(names)} of {self.classes} classes have no {kind} image, so {so}: "
                f"{some(names)}; use more images, or raise data.{kind}_fraction (or "
                "evaluation.max_examples, where that is set)",
                FedclipWarning,
                stacklevel=4,
            )


def check_measurable(context: RunContext, personal: bool) -> None:
    """Refuse a run that cannot be evaluated as asked; `personal`: personalised models."""
    chosen(context.config.evaluation.metrics)
    evaluation, remote = context.config.evaluation, context.sites is not None
    for key, given, what in (
        ("keep_best", evaluation.keep_best, "chooses"),
        ("patience", evaluation.patience is not None, "ends a run"),
    ):
        if given and remote and personal:
            raise UsageError(
                f"evaluation.{key} {what} by validation accuracy, but the sites have models of "
                "their own, which the coordinator does not see; leave it out"
            )
        if given and not context.has_validation:
            why = " (the coordinator's own, of a data set with a test split)" if remote else ""
            raise UsageError(
                f"evaluation.{key} {what} by validation accuracy, but there are no validation "
                f"examples{why}; raise data.validation_fraction, or use more data"
            )
    if not remote and not context.has_client_tests and personal:
        raise UsageError(
            "federation.strategy: models of the clients' own are judged on their own test "
            "examples, and no client has any; raise data.test_fraction, leave out data.shots, or "
            "use a strategy that shares one model"
        )


def missing_in(summary: Mapping[str, Any], key: str) -> Sequence[str]:
    """The names under a key of `summary.json`, none in those of older versions."""
    found = summary.get(key)
    return found if isinstance(found, list) else ()


def _pool(data: FederatedData) -> NDArray[np.int64]:
    """Classes that clients have images of; all classes where the clients are elsewhere."""
    if not data.clients:
        return np.arange(len(data.class_names))
    rows = [part for c in data.clients for part in (c.train, c.validation, c.test)]
    return np.unique(data.labels[np.concatenate(rows)])


def _missing(
    data: FederatedData, pool: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[str, ...]:
    if not len(rows):
        return ()
    return tuple(data.class_names[i] for i in np.setdiff1d(pool, data.labels[rows]))
