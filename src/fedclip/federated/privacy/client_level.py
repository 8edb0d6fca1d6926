"""Client-level privacy: the mean of a round's updates as a Gaussian mechanism.

McMahan et al. 2018 (arXiv:1710.06963): every client takes part with the probability q, by itself;
its update is the joint difference, over all tensors that travel, to what it started from, scaled
to a norm of at most C; the mean is (sum of them + N(0, (z C)^2)) / (q N), whoever took part. One
client more or less changes the sum by at most C. What a strategy makes of it is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fedclip.federated.privacy.adaptive_clip import COUNTED, ClipNorm
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

    def share(self, request: TrainRequest, shorter: int, asked: int) -> float:
        """The noisy share of updates that are no longer than the norm."""
        assert request.digest is not None
        names = (request.purpose, request.server_round, request.digest)
        (noise,) = self.draws.normals(1, "share", *names) * (self.expected / COUNTED)
        return float(0.5 + (shorter - asked / 2 + noise) / self.expected)

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
        self,
        inner: Updates,
        mechanism: ClientMechanism,
        charge: Callable[[TrainRequest], None],
        clip: ClipNorm | None = None,
    ) -> None:
        """`charge` notes the mean in the ledger before it is given; `clip` moves the norm."""
        super().__init__(inner)
        self.mechanism = mechanism if clip is None else replace(mechanism, clip_norm=clip.norm)
        self._charge = charge
        self._clip = clip

    def mean(self, weigh: Weigh = by_examples) -> dict[str, torch.Tensor]:
        """The private mean; every client weighs the same, whatever `weigh` says."""
        request, mechanism = with_digest(self.request), self.mechanism
        names = sorted(request.names_sent)
        self._charge(request)
        sums = {n: torch.zeros(request.state[n].shape, dtype=torch.float64) for n in names}
        shorter = [0, 0]

        def to_differences(cohort: Cohort) -> Cohort:
            flat = self.differences(cohort, names)
            shorter[0] += int((flat.norm(dim=1) <= mechanism.clip_norm).sum())
            shorter[1] += len(flat)
            for name, clipped in self.clipped(flat, names).items():
                sums[name] += clipped
            return Cohort(cohort.reports, {})

        if request.client_ids:
            self.inner.apply(to_differences)
            self.inner.mean(lambda report: 1.0)
        if self._clip is not None:
            self._clip.hear(mechanism.share(request, *shorter))
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

    def differences(self, cohort: Cohort, names: list[str]) -> torch.Tensor:
        """Each client's difference to its start, `[clients, numbers]`, in float64."""
        starts = [self.request.start(report.client_id) for report in cohort.reports]
        return torch.cat(
            [
                (cohort.tensors[n].double() - torch.stack([s[n].double() for s in starts])).flatten(
                    1
                )
                for n in names
            ],
            dim=1,
        )

    def clipped(self, differences: torch.Tensor, names: list[str]) -> State:
        """The sum of the clipped differences, by name."""
        total = clip_rows(differences, self.mechanism.clip_norm).sum(dim=0)
        like = [self.request.state[n] for n in names]
        parts = total.split([t.numel() for t in like])
        return {n: p.view(t.shape) for n, t, p in zip(names, like, parts, strict=True)}
