"""Strategy wrappers that train one adapter per group of clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedclip.federated.strategies.base import Setting, Strategy, Train, guarded, product_gram
from fedclip.federated.updates import Kept, Updates
from fedclip.lora.names import first_ranks, pairs
from fedclip.records import Cohort, RunState, State, TrainRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST = 10  # clusters, where their number is looked for


class Grouped(Strategy):
    """One adapter for each group, whose members alone train it by the strategy inside.

    With tasks as groups it is a federation of each task, in the rounds of one. All groups start
    from the same tensors, and a group none of whose clients was drawn stays as it is. Bytes as the
    strategy inside.
    """

    def __init__(self, inner: Strategy, member_of: Mapping[str, str]) -> None:
        """Takes the strategy, and the group of every client."""
        super().__init__(inner.setting)
        self._inner = inner
        self._member_of = dict(member_of)

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """A round of every group that has clients in it."""
        if not state.groups:
            names = sorted(set(self._member_of.values()))
            start = {name: RunState(state.shared) for name in names}
            state = replace(state, groups=start, member_of=self._member_of)
        return _group_rounds(self._inner, state, request, train)


class SharedAndTask(Grouped):
    """Adapters whose first ranks are shared by all groups, the rest group-specific.

    B A is the sum over ranks of column times row, so the adapter of group g stands for
    B_s A_s + B_g A_g, trained together: rows of A and columns of B below `shared_rank` are the mean
    over all clients of a round, weighted by examples, those above it the mean over the group's.
    Shared and task-specific parts in one sum are Evgeniou and Pontil's (2004, "Regularized
    multi-task learning"). Bytes as FedIT.
    """

    def __init__(self, inner: Strategy, member_of: Mapping[str, str], shared_rank: int) -> None:
        """Takes a strategy that averages factors, the groups, and how many ranks they share."""
        super().__init__(inner, member_of)
        self._shared_rank = shared_rank

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """A round of every group, whose first ranks then become those of all."""
        noted: list[Updates] = []

        def noting(asked: TrainRequest) -> Updates:
            noted.append(train(asked))
            return noted[-1]

        after = super().round(state, request, noting)
        examples: dict[str, int] = {}
        for report in (r for updates in noted for r in updates.reports):
            group = self._member_of[report.client_id]
            examples[group] = examples.get(group, 0) + report.num_examples
        return replace(after, groups=with_common_ranks(after.groups, examples, self._shared_rank))


class Clustered(Strategy):
    """Groups found from the clients' updates after a first while of training together.

    Federated learning with hierarchical clustering (Briggs et al. 2020, arXiv:2004.11791): in one
    round all clients train, average linkage joins those whose updates point the same way, and from
    then on every cluster is a federation of its own. Updates are compared as products B A, by the
    cosine between them; how many clusters there are is given, or told by the silhouette. Bytes as
    the strategy inside, for all clients in the round of clustering.
    """

    personal = True

    def __init__(
        self, inner: Strategy, clients: Mapping[str, int], cluster_round: int, clusters: int | None
    ) -> None:
        """Takes the strategy, all clients' numbers of examples, and when to find how many."""
        super().__init__(inner.setting)
        self._inner = inner
        self._everyone = tuple(sorted(clients, key=lambda c: (-clients[c], c)))
        self._cluster_round = cluster_round
        self._clusters = clusters

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """A round of all, of all and then of the clusters found, or of every cluster."""
        if state.groups:
            return _group_rounds(self._inner, state, request, train)
        if request.server_round < self._cluster_round:
            return self._inner.round(state, request, train)
        heard: list[Kept] = []

        def keeping(updates: Updates) -> Updates:
            heard.append(Kept(updates))
            return heard[-1]

        everyone = replace(request, client_ids=self._everyone)
        self._inner.round(state, everyone, guarded(train, keeping))
        cohort = heard[0].stacked()
        alike = similarities(self.setting, state.shared, cohort)
        labels = cluster(alike, self._clusters)
        ids = [report.client_id for report in cohort.reports]
        member_of = {c: f"cluster-{label}" for c, label in zip(ids, labels, strict=True)}
        largest = max(sorted(set(labels)), key=labels.count)  # for whoever was left out
        member_of |= {c: f"cluster-{largest}" for c in self._everyone if c not in member_of}
        names = sorted(set(member_of.values()))
        parted = replace(
            state,
            groups={name: replace(state, private={}) for name in names},
            member_of=member_of,
        )
        return _group_rounds(self._inner, parted, everyone, heard[0].of)


def _group_rounds(
    inner: Strategy, state: RunState, request: TrainRequest, train: Train
) -> RunState:
    """A round of the strategy for every group that has clients in it, in the order of names."""
    groups = {}
    for name, own in state.groups.items():
        own = replace(own, news=None)
        ids = tuple(c for c in request.client_ids if state.member_of[c] == name)
        asked = replace(request, client_ids=ids, state=own.shared, shift=own.shift)
        groups[name] = inner.round(own, asked, train) if ids else own
    return replace(state, groups=groups)


def with_common_ranks(
    groups: Mapping[str, RunState], weights: Mapping[str, float], shared_rank: int
) -> dict[str, RunState]:
    """The groups with their first ranks replaced by the weighted mean."""
    total = sum(weights.values())
    common: dict[str, torch.Tensor] = {}
    names = [n for pair in pairs(next(iter(groups.values())).shared).values() for n in pair]
    for name in names:
        parts = [
            first_ranks(name, groups[group].shared[name], shared_rank).double() * (weight / total)
            for group, weight in weights.items()
        ]
        common[name] = torch.stack(parts).sum(dim=0)
    renewed = {}
    for group, state in groups.items():
        shared = dict(state.shared)
        for name in names:
            shared[name] = shared[name].clone()
            first_ranks(name, shared[name], shared_rank).copy_(common[name])
        renewed[group] = replace(state, shared=shared)
    return renewed


def similarities(setting: Setting, start: State, updates: Cohort) -> torch.Tensor:
    """Cosines `[clients, clients]` between what the clients added to the product B A of all layers.

    A client that changed nothing is at right angles to all.
    """
    total = product_gram(setting, start, updates)
    norms = total.diagonal().clamp(min=0).sqrt()
    cosines = total / (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)
    return cosines.clamp(-1, 1)


def cluster(cosines: torch.Tensor, count: int | None) -> list[int]:
    """A cluster's number for each client, from 0 in the clients' order.

    Average linkage on 1 - cosine. Without a `count` it is the number from 2 to 10 with the highest
    mean silhouette (Rousseeuw 1987), of equals the lowest.
    """
    clients = len(cosines)
    if clients < 3:
        return [0] * clients
    distances = (1 - (cosines + cosines.T) / 2).numpy().copy()
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform(distances, checks=False), method="average")
    counts = [count] if count is not None else range(2, min(_MOST, clients - 1) + 1)
    cuts = [fcluster(tree, min(k, clients), criterion="maxclust") for k in counts]
    scores = [_silhouette(distances, cut) for cut in cuts]
    found = cuts[int(np.argmax(scores))].tolist()
    order = {label: number for number, label in enumerate(dict.fromkeys(found))}
    return [order[label] for label in found]


def _silhouette(distances: NDArray[np.float64], labels: NDArray[np.int32]) -> float:
    """Mean silhouette of a clustering; -1 where undefined."""
    if not 2 <= len(np.unique(labels)) < len(labels):
        return -1.0
    from sklearn.metrics import silhouette_score  # slow to import

    return float(silhouette_score(distances, labels, metric="precomputed"))
