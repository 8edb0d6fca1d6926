"""Strategies that work on the products B A of whole layers and send factors of the same rank."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch

from fedclip.errors import UsageError
from fedclip.federated.strategies.averaging import FFA
from fedclip.federated.strategies.base import (
    Setting,
    Strategy,
    Train,
    at_client_ranks,
    examples,
    factors,
    held,
    layer_updates,
    others,
    refuse_ranks,
)
from fedclip.lora.aggregate import (
    StackedLora,
    among_owners,
    corrected_mean,
    mean_of_factors,
    norm_weights,
    owner_mean,
    truncated_mean,
    update_norms,
)
from fedclip.lora.factors import Factors, ordered_rows, orthonormal_rows
from fedclip.lora.names import pairs
from fedclip.records import Cohort, RunState, TrainRequest


class ProductStrategy(Strategy):
    """Combines one layer after another; what belongs to no layer is averaged."""

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """New factors for every layer."""
        updates = train(at_client_ranks(self.setting, request)).stacked()
        weights = self.weights(updates)
        shared = {**state.shared, **others(updates.tensors, weights)}
        for layer, pair in pairs(updates.tensors).items():
            x = layer_updates(self.setting, updates, layer, pair, weights)
            old = factors(state.shared, pair)
            shared[pair.a], shared[pair.b] = self.layer(layer, x, updates, old, request)
        return replace(state, shared=shared)

    def weights(self, updates: Cohort) -> torch.Tensor:
        """Positive weights of the clients, by default their examples."""
        return examples(updates)

    @abstractmethod
    def layer(
        self, layer: str, x: StackedLora, updates: Cohort, old: Factors, request: TrainRequest
    ) -> Factors:
        """A layer's new factors, at the model's scaling."""


class FlexLoRA(ProductStrategy):
    """The best approximation of the exact mean at the model's rank, by SVD.

    Bai et al. 2024 (arXiv:2402.11505): U S V^T of sum_i p_i s_i B_i A_i, cut at the rank; a client
    of lower rank takes the leading part. With `federation.average_owners` a row weighs as in a mean
    over the clients that hold it (raFLoRA, arXiv:2602.13486), so that what few hold does not
    shrink. Bytes per client and round, up and down: 4 r_i (in + out) for each layer.
    """

    def layer(
        self, layer: str, x: StackedLora, updates: Cohort, old: Factors, request: TrainRequest
    ) -> Factors:
        """The truncated mean."""
        if self.setting.options.get("average_owners"):
            x = among_owners(x, held(self.setting, updates, x.a.shape[1]))
        return truncated_mean(
            x,
            x.a.shape[1],
            scaling=self.setting.scalings[layer],
            generator=self.setting.generator("svd", request.server_round, layer),
        )


class HetLoRA(ProductStrategy):
    """Factors padded with zeros and averaged, clients weighted by the norm of their update.

    Cho et al. 2024 (arXiv:2401.06432): w_i = |s_i B_i A_i| / sum, over all layers; client i takes
    the first r_i rows back. Their regulariser, which drives what matters into the first rows and
    lets ranks be pruned, is not here: with `federation.order_rows` the server turns the mean, B A
    unchanged, so that the first rows hold the most. `federation.average_owners` averages a row
    over the clients that hold it (RBLA, Chen et al. 2024, arXiv:2408.08699), so that rows of high
    index do not shrink.
    Bytes per client and round, up and down: 4 r_i (in + out) for each layer.
    """

    def weights(self, updates: Cohort) -> torch.Tensor:
        """Norms of the updates."""
        ones = torch.ones(len(updates.reports), dtype=torch.float64)
        squares = ones * 0
        for layer, pair in pairs(updates.tensors).items():
            x = layer_updates(self.setting, updates, layer, pair, ones)
            squares += update_norms(x).double().square()
        return norm_weights(squares.sqrt()).clamp(min=1e-12)

    def layer(
        self, layer: str, x: StackedLora, updates: Cohort, old: Factors, request: TrainRequest
    ) -> Factors:
        """The mean of the padded factors."""
        scaling, options = self.setting.scalings[layer], self.setting.options
        if options.get("average_owners"):
            ranks = held(self.setting, updates, x.a.shape[1])
            mean = owner_mean(x, ranks, scaling=scaling, kept=old)
        else:
            mean = mean_of_factors(x, scaling=scaling)
        # Nothing to order where every client has all rows.
        least = min(self.setting.ranks.values(), default=len(mean.a))
        if least >= len(mean.a) or not options.get("order_rows", 1.0):
            return mean
        turned = ordered_rows(Factors(mean.a.double(), mean.b.double()))
        return Factors(turned.a.to(mean.a.dtype), turned.b.to(mean.b.dtype))


class LoraFair(ProductStrategy):
    """The mean of A, and of B with a correction towards the exact mean.

    Bian et al. 2024 (arXiv:2411.14961): A = Abar, B = Bbar + D, with D the least of
    |M - s (Bbar + D) Abar|^2 and a penalty on |D|^2, M the exact mean. The distance is squared
    where theirs is a cosine, so that D is closed, and `federation.ridge` is relative to the size
    of Abar: `aggregate.corrected_mean`. Bytes as FedIT.
    """

    def __init__(self, setting: Setting | None = None) -> None:
        """Refuses clients of different ranks."""
        super().__init__(setting)
        refuse_ranks(self.setting, "the mean of factors stands for one rank")

    def layer(
        self, layer: str, x: StackedLora, updates: Cohort, old: Factors, request: TrainRequest
    ) -> Factors:
        """The corrected mean."""
        ridge = self.setting.options.get("ridge", 1.0)
        return corrected_mean(x, scaling=self.setting.scalings[layer], ridge=ridge)


class FedSVD(FFA):
    """B is trained and averaged, then both are turned so that A has orthonormal rows.

    Lee et al. 2025 (arXiv:2505.12805): B A = U S V^T, B = U S, A = V^T. Nothing is lost, and
    unlike FFA's, A moves. Bytes per client and round: 4 r out up, 4 r (in + out) down, for each
    layer.
    """

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The mean of B, then the turn."""
        after = super().round(state, request, train)
        shared = dict(after.shared)
        for layer, pair in pairs(shared).items():
            try:
                shared[pair.a], shared[pair.b] = orthonormal_rows(factors(shared, pair))
            except ValueError as error:
                raise UsageError(f"federation.strategy: fedsvd at {layer}: {error}") from None
        return replace(after, shared=shared, news=shared)
