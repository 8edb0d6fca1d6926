"""Client-level privacy: the mean of a round's updates as a Gaussian mechanism.

McMahan et al. 2018 (arXiv:1710.06963): every client takes part with the probability q, by itself;
its update is the joint difference, over all tensors that travel, to what it started from, scaled
to a norm of at most C; the mean is (sum of them + N(0, (z C)^2)) / (q N), whoever took part. One
client more or less changes the sum by at most C. What a strategy makes of it is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedclip.federated.privacy.charging import Refused, with_digest
from fedclip.federated.privacy.dp_sgd import clip_rows
from fedclip.federated.privacy.secret import Draws
from fedclip.federated.updates import Guarded, Updates, Weigh, by_examples
from fedclip.records import Cohort, State, TrainRequest


@dataclass(frozen=True)
class ClientMechanism:
    """The norm C, the noise multiplier z, how many clients there are, and how many are expected."""

    clip_norm: float
    multiplier: float
    clients: int
    expected: int
    draws: Draws

    @property
    def sampling_rate(self) -> float:
        """The probability q that a client takes part in a round."""
        return self.expected / self.clients

    def sample(self, clients: tuple[str, ...], server_round: int) -> tuple[str, ...]:
        """Poisson-sample the clients of a round, in their order; perhaps none."""
        draws = self.draws.uniforms(len(clients), "clients", server_round)
        return tuple(c for c, u in zip(clients, draws, strict=True) if u < self.sampling_rate)

    def noise(self, request: TrainRequest, name: str) -> torch.Tensor:
        """The noise on a tensor's sum of clipped differences."""
        assert request.digest is not None
        like = request.state[name]
        names = (request.purpose, request.server_round, request.digest, name)
        drawn = self.draws.normals(like.numel(), "mean", *names)
        return torch.from_numpy(drawn * (self.multiplier * self.clip_norm)).view(like.shape)


class PrivateMean(Guarded):
    """Updates of which only the private mean is given."""

    def __init__(
        self, inner: Updates, mechanism: ClientMechanism, charge: Callable[[TrainRequest], None]
    ) -> None:
        """`charge` notes the mean in the ledger before it is given."""
        super().__init__(inner)
        self._mechanism = mechanism
        self._charge = charge

    def mean(self, weigh: Weigh = by_examples) -> dict[str, torch.Tensor]:
        """The private mean; every client weighs the same, whatever `weigh` says."""
        request, mechanism = with_digest(self.request), self._mechanism
        names = sorted(request.names_sent)
        self._charge(request)
        sums = {n: torch.zeros(request.state[n].shape, dtype=torch.float64) for n in names}

        def to_differences(cohort: Cohort) -> Cohort:
            for name, stacked in self._clipped(cohort, names).items():
                sums[name] += stacked.sum(dim=0)
            return Cohort(cohort.reports, {})

        if request.client_ids:
            self.inner.apply(to_differences)
            self.inner.mean(lambda report: 1.0)
        # What has travelled would tell how many took part.
        self.bytes_up = mechanism.expected * sum(request.state[n].nbytes for n in names)
        noisy = {n: (sums[n] + mechanism.noise(request, n)) / mechanism.expected for n in names}
        return {n: request.state[n] + noisy[n].to(request.state[n].dtype) for n in names}

    def stacked(self) -> Cohort:
        """Refused: no single update may be seen."""
        raise Refused(
            "federation.strategy: it reads single updates, which privacy.unit: client does not "
            "show to anybody; use a strategy that takes their mean, such as ffa, fedsvd or "
            "fedavg, without federation.scaffold or federation.ditto_mu"
        )

    def _clipped(self, cohort: Cohort, names: list[str]) -> State:
        """Each client's difference to its start, by name, `[clients, ...]`, in float64."""
        starts = [self.request.start(report.client_id) for report in cohort.reports]
        differences = {
            n: cohort.tensors[n].double() - torch.stack([s[n].double() for s in starts])
            for n in names
        }
        flat = torch.cat([d.flatten(1) for d in differences.values()], dim=1)
        parts = clip_rows(flat, self._mechanism.clip_norm).split(
            [self.request.state[n].numel() for n in names], dim=1
        )
        return {n: p.view_as(differences[n]) for n, p in zip(names, parts, strict=True)}
