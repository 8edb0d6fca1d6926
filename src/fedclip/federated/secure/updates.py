"""Updates of which only the masked sum is known."""

from __future__ import annotations

from math import nan

import torch

from fedclip.errors import TrainingFailed, UsageError
from fedclip.federated.updates import Change, Updates, Weigh, by_examples
from fedclip.records import Cohort

EXTRA = 2
"""Words of a masked vector beside the update's own numbers: the loss and the weight."""


class Hidden(UsageError):
    """What a strategy asks for cannot be had of masked updates."""


INSTEAD = (
    "use a strategy that takes their mean by examples alone, such as ffa, fedsvd or fedavg, "
    "without federation.scaffold, federation.ditto_mu or robust rules"
)


class SummedUpdates(Updates):
    """Updates that their engine has summed behind masks: a mean, and nothing of single clients."""

    loss: float = nan
    """The mean loss, by examples."""

    def mean(self, weigh: Weigh = by_examples) -> dict[str, torch.Tensor]:
        """The mean by examples, which the clients themselves have weighed."""
        if weigh is not by_examples:
            raise Hidden(f"secure.aggregation: masked sums weigh by examples alone; {INSTEAD}")
        found = None
        for cohort in self.cohorts:
            self.left_out += cohort.left_out
            self.reports += cohort.reports
            found = cohort.total or found
        if found is None:
            raise TrainingFailed(f"round {self.request.server_round}: there is no masked sum")
        size = sum(self.request.state[n].numel() for n in self.request.names_sent)
        self.bytes_up = 4 * (size + EXTRA) * len(self.reports)
        self._require_quorum()
        self.loss = found.loss
        return dict(found.mean)

    def stacked(self) -> Cohort:
        """Refused: nobody has seen a single update."""
        raise Hidden(
            "federation.strategy: it reads single updates, which secure.aggregation: masked hides "
            f"from everybody; {INSTEAD}"
        )

    def apply(self, change: Change) -> None:
        """Refused, as `stacked` is."""
        self.stacked()
