"""Terms that a request adds to many clients' gradients: SCAFFOLD's offsets, the proximal pull.

`local_optimizer.correction` is the readable twin for one client.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from fedclip.federated.engines.stacked_optimizer import StackedParameters, clip_by_client
from fedclip.federated.local_steps import LocalSettings
from fedclip.records import TrainRequest


@dataclass(frozen=True)
class GradientTerms:
    """What is added to gradients `[clients, numbers]` before they are clipped.

    `offsets` as they are, and with weight `mu` the way from `anchors` to the parameters (FedProx,
    Li et al. 2020, arXiv:1812.06127, equation 2); both `[clients, numbers]`.
    """

    offsets: torch.Tensor | None = None
    anchors: torch.Tensor | None = None
    mu: float = 0.0

    @classmethod
    def of(
        cls,
        request: TrainRequest,
        ids: Sequence[str],
        settings: LocalSettings,
        parameters: StackedParameters,
    ) -> GradientTerms:
        """What a request asks of these clients, whose parameters are at their start."""
        mu = settings.proximal_mu if request.proximal_mu is None else request.proximal_mu
        offsets = [request.offsets[c] for c in ids] if request.offsets else None
        return cls(
            offsets=None if offsets is None else parameters.flat_rows(offsets),
            anchors=parameters.anchors(request.anchor) if mu else None,
            mu=mu,
        )

    @property
    def layout(self) -> Hashable:
        """What is equal of terms that one can be loaded with in the place of the other."""
        return self.offsets is not None, self.anchors is not None, self.mu

    def room_for(self, values: torch.Tensor) -> GradientTerms:
        """Terms of the same layout for parameters like `values`, to be loaded."""

        def like(own: torch.Tensor | None) -> torch.Tensor | None:
            return None if own is None else torch.zeros_like(values)

        return GradientTerms(like(self.offsets), like(self.anchors), self.mu)

    def load(self, other: GradientTerms) -> None:
        """Take over the numbers of terms of the same layout, of as many clients or fewer."""
        for own, given in ((self.offsets, other.offsets), (self.anchors, other.anchors)):
            if own is not None and given is not None:
                own[: len(given)].copy_(given)

    @torch.no_grad()
    def settle(self, grads: torch.Tensor, values: torch.Tensor, max_norm: float | None) -> None:
        """Makes of the losses' gradients what the optimizer takes, of the first clients."""
        active = len(grads)
        if self.offsets is not None:
            grads.add_(self.offsets[:active])
        if self.anchors is not None:
            grads.add_(values - self.anchors[:active], alpha=self.mu)
        if max_norm is not None:
            clip_by_client(grads, max_norm)
