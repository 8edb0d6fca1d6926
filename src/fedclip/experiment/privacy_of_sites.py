"""Privacy of a run whose clients are on other machines, as its coordinator sees it.

Every site draws its own noise and keeps its own ledger; the coordinator has no secret. It records
the largest epsilon that a site has told, and nothing of single sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.context import RunContext
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.openness import Openness, public_part
from fedclip.experiment.privacy import begin_privacy, noise_of
from fedclip.federated.privacy.dp_sgd import steps_of
from fedclip.federated.rounds import RoundResult
from fedclip.records import ClientReport
from fedclip.reports.listener import Listener


@dataclass
class PrivacyOfSites(Openness):
    """What the sites have spent so far, for the records and the summary."""

    context: RunContext
    spent: float = 0.0
    metrics: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = self.context.config.evaluation.metrics

    @classmethod
    def begin(cls, context: RunContext, folder: RunFolder) -> PrivacyOfSites:
        """That of a run whose finished rounds are in its folder."""
        told = [line["epsilon"] for line in folder.read_metrics() if "epsilon" in line]
        return cls(context, max(told, default=0.0))

    def hears(self, listener: Listener) -> Callable[[ClientReport], None]:
        """Nobody."""
        return lambda report: None

    def result(self, result: RoundResult) -> RoundResult:
        """The round, whose sites have told what they have spent."""
        told = [report.epsilon for report in result.reports if report.epsilon is not None]
        self.spent = max([self.spent, *told])
        return result

    def shown(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What speaks of the adapter and of the coordinator's test images."""
        return public_part(record, self.metrics)

    def public(self, folder: RunFolder, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record without the rest, and with the largest epsilon of a site."""
        return self.shown(record) | {"epsilon": self.spent}

    def promise(self) -> dict[str, Any]:
        """What the sites promise for their examples, each by itself."""
        config = self.context.config
        privacy, size, epochs = config.privacy, config.data.batch_size, config.client.local_epochs
        counts = [n for n in self.context.clients.values() if n >= size]
        times = config.federation.rounds * epochs
        noises = [noise_of(privacy, size / n, times * steps_of(n, size)) for n in counts]
        return {
            "privacy": {
                "guarantee": True,
                "unit": privacy.unit,
                "epsilon": self.spent,
                "epsilon_rdp": None,
                "delta": privacy.delta,
                "clip_norm": privacy.clip_norm,
                "noise_multiplier": [min(noises), max(noises)] if noises else None,
            }
        }


def take_up_privacy(
    context: RunContext, folder: RunFolder, checkpoint: Checkpoint, listener: Listener
) -> Openness:
    """The privacy of a run, kept here, or at the sites where the clients are elsewhere."""
    if context.sites is not None and context.config.privacy.unit is not None:
        return PrivacyOfSites.begin(context, folder)
    return begin_privacy(context, folder, checkpoint, listener)
