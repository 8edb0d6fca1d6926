"""Strategy wrappers: SCAFFOLD, Ditto, server optimizers, guards and adaptive clipping."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedclip.federated.parameter_rules import bound_temperature
from fedclip.federated.privacy.adaptive_clip import ClipNorm
from fedclip.federated.strategies.base import (
    Guard,
    Strategy,
    Train,
    examples,
    guarded,
    kept_by,
    own_starts,
)
from fedclip.federated.strategies.server_optimizers import server_step
from fedclip.federated.updates import Updates
from fedclip.records import RunState, TrainRequest

_CONTROL = "control/"
NORM = "privacy/clip_norm"
"""Name of the clip norm in the server's memory."""


class Scaffold(Strategy):
    """Control variates against client drift, around a strategy that averages tensors.

    Karimireddy et al. 2020 (arXiv:1910.06378, option II): every gradient of client i is corrected
    by c - c_i; after its steps c_i' = c_i - c + (x - y_i) / (sum of its learning rates). Where the
    paper counts every client alike, model and control variates are both weighted by examples here:
    c = sum n_i c_i / sum n_i over all clients, so that the optimum is FedAvg's, of the loss over
    all examples. Plain SGD only, as gradients are recovered from the way travelled. So c_i holds
    what was stepped: SGD's weight decay, which is part of the client's loss as the paper has it,
    and, unlike the paper, which has none, clipping (of the corrected gradient). Bytes: twice those
    of FedAvg.
    """

    def __init__(self, inner: Strategy, total_examples: int) -> None:
        """Takes a strategy that `averages`, and how many examples all clients have together."""
        super().__init__(inner.setting)
        self._inner = inner
        self._total = total_examples

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The mean of the tensors, and new control variates of server and clients."""
        request = self._inner.asked(request)
        names = sorted(state.shared.keys() if request.trained is None else request.trained)
        zero = {n: torch.zeros_like(state.shared[n]) for n in names}
        central = {n: state.server.get(_CONTROL + n, zero[n]) for n in names}
        own = {
            c: {n: state.private.get(c, {}).get(_CONTROL + n, zero[n]) for n in names}
            for c in request.client_ids
        }
        offsets = {c: {n: central[n] - own[c][n] for n in names} for c in own}
        answers = train(replace(request, offsets=offsets))
        updates = answers.stacked()
        answers.bytes_up *= 2  # the change of its control variate goes with each tensor
        shares = examples(updates) / examples(updates).sum()
        shared, server = dict(state.shared), dict(state.server)
        private: dict[str, dict[str, torch.Tensor]] = {
            c: dict(kept) for c, kept in state.private.items()
        }
        for name in names:
            stacked, start = updates.tensors[name], state.shared[name]
            shared[name] = torch.tensordot(shares, stacked.double(), dims=1).to(start)
            moved = torch.zeros_like(start)
            for index, report in enumerate(updates.reports):
                client = report.client_id
                if report.rate_sum == 0:  # fp16 left all its steps out: nothing is known
                    continue
                change = (start - stacked[index]) / report.rate_sum - central[name]
                private.setdefault(client, {})[_CONTROL + name] = own[client][name] + change
                moved += change * (report.num_examples / self._total)
            server[_CONTROL + name] = central[name] + moved
        news = {n: shared[n] for n in names} | {_CONTROL + n: server[_CONTROL + n] for n in names}
        return replace(state, shared=shared, server=server, private=private, news=news)


class Ditto(Strategy):
    """A personal model beside the shared one, pulled towards it.

    Li et al. 2021 (arXiv:2012.04221): client i also trains v_i on its own loss plus
    mu / 2 |v_i - w|^2, w being the shared model that it received. The shared one comes from the
    strategy inside. Bytes as that strategy: nothing more travels.
    """

    personal = True

    def __init__(self, inner: Strategy, mu: float) -> None:
        """Takes the strategy of the shared model, and the weight of the pull."""
        super().__init__(inner.setting)
        self._inner = inner
        self._mu = mu

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """A round of the shared model, and one of the personal ones."""
        after = self._inner.round(state, request, train)
        personal = replace(
            request,
            starts=own_starts(state),
            anchor=state.shared,
            proximal_mu=self._mu,
            sent=frozenset(),
            purpose="personal",
        )
        return replace(after, private=kept_by(after, train(personal).stacked()))


class ServerOptimizer(Strategy):
    """The server steps along the way that the inner strategy proposes, instead of going it.

    Reddi et al. 2021 (arXiv:2003.00295, algorithm 2): the gradient is g = old - proposed, and the
    next state one step of SGD with momentum, Adagrad, Adam or Yogi on g from the old one (FedAvgM,
    FedAdagrad, FedAdam, FedYogi). Bytes as the inner strategy.
    """

    def __init__(self, inner: Strategy, name: str, options: dict[str, float]) -> None:
        """Takes the strategy, and the optimizer's name and settings."""
        super().__init__(inner.setting)
        self.personal = inner.personal
        self._inner = inner
        self._name = name
        self._options = options

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The old state, one step of the optimizer on."""
        sent: set[str] = set()

        def noting(asked: TrainRequest) -> Updates:
            sent.update(asked.names_sent)
            return train(asked)

        proposed = self._inner.round(state, request, noting)
        names = sorted(sent & state.shared.keys())
        if not names:
            return proposed
        stepped, memory = server_step(
            self._name,
            {n: state.shared[n] for n in names},
            {n: state.shared[n] - proposed.shared[n] for n in names},
            state.server,
            self._options,
        )
        bound_temperature(stepped)
        return replace(
            proposed,
            shared={**proposed.shared, **stepped},
            server={**proposed.server, **memory},
        )


class Guarding(Strategy):
    """A strategy that is given its updates by a guard, such as privacy's noisy mean."""

    def __init__(self, inner: Strategy, guard: Guard) -> None:
        """Takes the strategy with all that goes around it, and the guard."""
        super().__init__(inner.setting)
        self.personal = inner.personal
        self._inner = inner
        self._guard = guard

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """A round of the strategy inside."""
        return self._inner.round(state, request, guarded(train, self._guard))


class AdaptiveClip(Strategy):
    """A private strategy whose clip norm is kept from round to round, in the server's memory."""

    def __init__(self, inner: Strategy, clip: ClipNorm) -> None:
        """Takes the strategy with its guard, which clips to `clip` and has it hear the share."""
        super().__init__(inner.setting)
        self.personal = inner.personal
        self._inner = inner
        self._clip = clip

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """A round of the strategy inside, and the norm for the next one."""
        if NORM in state.server:
            self._clip.norm = float(state.server[NORM])
        after = self._inner.round(state, request, train)
        norm = torch.tensor(self._clip.norm, dtype=torch.float64)
        return replace(after, server={**after.server, NORM: norm})
