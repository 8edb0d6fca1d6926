"""What a run tells of its clients: all where nothing is promised, else what is public."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedclip.evaluation.metrics import chosen
from fedclip.experiment.folder import RunFolder
from fedclip.federated.privacy.dp_sgd import DpSgd
from fedclip.federated.rounds import Engine, RoundResult, Sample
from fedclip.federated.strategies import Strategy
from fedclip.records import ClientReport
from fedclip.reports.listener import Listener

PUBLIC = frozenset(
    {"server_round", "bytes_up", "bytes_down", "accuracy", "test_loss", "test_examples"}
    | {"learning_rate", "update_norm"}
    | {"retrieval", "macro_f1", "majority_class_rate", "worst_class", "stopped_by"}
)
"""Keys of a record that speak of the adapter and of test images, not of single clients."""


def public_part(record: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """What of a record speaks of the adapter and of test images; `metrics` are the chosen ones."""
    public = PUBLIC | chosen(metrics).keys()
    return {k: v for k, v in record.items() if k in public or k.startswith("zero_shot_")}


class Openness:
    """What a run that promises nothing does with what `RunPrivacy` keeps private: it tells all."""

    tells_classes = True
    sample: Sample | None = None

    def engine(self, create: Callable[[DpSgd | None], Engine]) -> Engine:
        """The engine of the run."""
        return create(None)

    def strategy(self, inner: Strategy) -> Strategy:
        """What combines the updates."""
        return inner

    def hears(self, listener: Listener) -> Callable[[ClientReport], None]:
        """Who hears of each client's training."""
        return listener.client

    def result(self, result: RoundResult) -> RoundResult:
        """A round's result as it may be told."""
        return result

    def shown(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What of a record may be told."""
        return dict(record)

    def public(self, folder: RunFolder, record: Mapping[str, Any]) -> dict[str, Any]:
        """A round's record as written; what is left out may go to a separate file."""
        return dict(record)

    def promise(self) -> dict[str, Any]:
        """What the summary says of it."""
        return {}

    def end(self, folder: RunFolder, summary: Mapping[str, Any]) -> None:
        """Clears up after the last round."""
