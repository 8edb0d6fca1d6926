"""Fed-SB: only a small core between two fixed factors is trained."""

from __future__ import annotations

from dataclasses import replace

from fedclip.errors import UsageError
from fedclip.federated.strategies.averaging import without
from fedclip.federated.strategies.base import (
    Setting,
    Strategy,
    Train,
    examples,
    layer_updates,
    others,
    refuse_ranks,
)
from fedclip.lora.aggregate import stack
from fedclip.lora.factors import singular_frame
from fedclip.lora.names import pairs
from fedclip.records import RunState, TrainRequest


class FedSB(Strategy):
    """B R A with B and A fixed: the cores R are averaged, which is the exact mean.

    Singhal et al. 2025 (arXiv:2502.15436). B and A are the leading singular vectors of an estimate
    of the first full update (LoRA-SB, arXiv:2411.19557); here of the exact mean of the first
    round's LoRA updates, of which K clients together know K r directions. Wants a larger rank than
    LoRA. Bytes per client and round, up and down: 4 r (in + out) in the first round, then 4 r^2,
    for each layer.
    """

    def __init__(self, setting: Setting | None = None) -> None:
        """Refuses clients of different ranks."""
        super().__init__(setting)
        refuse_ranks(self.setting, "all cores must have one size")

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The first round finds the frame, the others average the cores."""
        found = pairs(state.shared)
        if not state.server:
            return self._frame(state, request, train)
        frames = {pair.b: state.server[f"frame/{layer}"] for layer, pair in found.items()}
        cores = {pair.b: state.server[f"core/{layer}"] for layer, pair in found.items()}
        request = replace(request, state={**state.shared, **cores}, frames=frames)
        means = train(without(request, "a")).mean()
        shared, server = {**state.shared, **means}, dict(state.server)
        for layer, pair in found.items():
            server[f"core/{layer}"] = means[pair.b]
            shared[pair.b] = frames[pair.b] @ means[pair.b]
        return replace(state, shared=shared, server=server, news=means)

    def _frame(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        updates = train(request).stacked()
        weights = examples(updates)
        rest = others(updates.tensors, weights)
        shared, server = {**state.shared, **rest}, dict(state.server)
        for layer, pair in pairs(updates.tensors).items():
            x = layer_updates(self.setting, updates, layer, pair, weights)
            try:
                frame, core = singular_frame(
                    stack(x),
                    x.a.shape[1],
                    scaling=self.setting.scalings[layer],
                    generator=self.setting.generator("svd", layer),
                )
            except ValueError as error:
                raise UsageError(f"federation.strategy: fed_sb at {layer}: {error}") from None
            server[f"frame/{layer}"], server[f"core/{layer}"] = frame.b, core
            shared[pair.a], shared[pair.b] = frame.a, frame.b @ core
        return replace(state, shared=shared, server=server, news=shared)
