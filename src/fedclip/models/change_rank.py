"""Other ranks for an adapter in place: chosen by hand, or brought along by a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from fedclip.config.model import MAX_RANK
from fedclip.errors import UsageError
from fedclip.lora import factors
from fedclip.lora.factors import Factors
from fedclip.lora.layer_patterns import check_hits, first_hit
from fedclip.lora.names import pair_of
from fedclip.models.lora_settings import LayerPlan, LoraSettings, alpha_at
from fedclip.models.peft_lora import (
    factors_of,
    lora_layers,
    plan_of,
    put_factors,
    restate,
)
from fedclip.seeding import seed_for


def set_rank(
    network: PeftModel, settings: LoraSettings, rank: int | Mapping[str, int], *, seed: int
) -> LoraSettings:
    """Give layers another rank, keeping B A and its scaling; the settings that this makes.

    `rank` is for all layers, or by pattern for those that fit. A layer's lora_alpha follows its
    rank, so that the scaling stays. Down, B A becomes the nearest matrix of the new rank, from a
    singular value decomposition in float64; up, it stays: the new rows of A are drawn from `seed`
    and the layer's name, the new columns of B are zero.
    """
    layers = lora_layers(network)
    for path, new in _ranks(rank, {path: plan_of(m).r for path, m in layers.items()}).items():
        layer, plan = layers[path], plan_of(layers[path])
        if new == plan.r:
            continue
        old = Factors(*(tensor.detach().to("cpu", torch.float64) for tensor in factors_of(layer)))
        generator = torch.Generator().manual_seed(seed_for(seed, "set_rank", path, new))
        alpha = alpha_at(plan.lora_alpha, plan.r, new, settings.use_rslora)
        put_factors(layer, factors.set_rank(old, new, generator=generator), alpha)
    return restate(network, settings)


def _ranks(rank: int | Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Every layer's new rank."""
    by_pattern = rank if isinstance(rank, Mapping) else {".+": rank}
    for pattern, value in by_pattern.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            where = f" for {pattern!r}" if by_pattern is rank else ""
            raise UsageError(f"set_rank: a rank is a whole number >= 1, got {value!r}{where}")
    check_hits("set_rank", by_pattern, now)
    return {path: first_hit(by_pattern, path, own) for path, own in now.items()}


def told_plans(
    config: Mapping[str, Any], now: Mapping[str, LayerPlan], source: str
) -> dict[str, LayerPlan]:
    """What PEFT's configuration of an adapter says of each of a model's layers.

    Dropout stays as it is now. Raises `UsageError` for ranks and scales that are none.
    """
    by_pattern = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, patterns in by_pattern.items():
        if not isinstance(patterns, Mapping):
            raise UsageError(f"{source}: {key} must be a mapping, got {patterns!r}")
    plain = config.get("r"), config.get("lora_alpha")
    plans = {}
    try:
        _checked("the adapter", *plain)
        for path, plan in now.items():
            r = first_hit(by_pattern["rank_pattern"], path, plain[0])
            alpha = first_hit(by_pattern["alpha_pattern"], path, plain[1])
            plans[path] = LayerPlan(*_checked(path, r, alpha), plan.lora_dropout)
    except ValueError as error:  # also patterns that are no regular expressions
        raise UsageError(f"{source}: {error}") from None
    return plans


def _checked(whose: str, r: Any, alpha: Any) -> tuple[int, float]:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (r, alpha))
    if not (numbers and isinstance(r, int) and r > 0 and 0 < alpha < math.inf):
        raise ValueError(f"r {r!r} and lora_alpha {alpha!r} of {whose} must be numbers > 0")
    return r, float(alpha)


def brings_own_ranks(config: Mapping[str, Any], told: bool) -> bool:
    """Whether an adapter's ranks were changed, rather than set by another configuration.

    They are where its notes have `told` so (after `set_rank`, stacking or merging), where they
    differ by layer, and where they are higher than any that can be configured.
    """
    r = config.get("r")
    high = isinstance(r, int) and r > MAX_RANK
    return told or high or bool(config.get("rank_pattern") or config.get("alpha_pattern"))


def shapes_of(
    plans: Mapping[str, LayerPlan], trainable: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The trainable tensors as they would be with these ranks: shapes without values."""
    shapes = {name: tensor.to("meta") for name, tensor in trainable.items()}
    for path, plan in plans.items():
        down, up = pair_of(path)
        shapes[down] = shapes[down].new_empty(plan.r, shapes[down].shape[1])
        shapes[up] = shapes[up].new_empty(shapes[up].shape[0], plan.r)
    return shapes


def adopt(
    network: PeftModel,
    settings: LoraSettings,
    config: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
) -> LoraSettings:
    """Give layers the ranks and scales that PEFT's configuration tells, with the factors for them.

    Returns the settings that this makes.
    """
    layers = lora_layers(network)
    now = {path: plan_of(layer) for path, layer in layers.items()}
    for path, plan in told_plans(config, now, "adopt_ranks").items():
        a, b = (state[name] for name in pair_of(path))
        put_factors(layers[path], Factors(a, b), plan.lora_alpha)
    defaults = {"r": config["r"], "lora_alpha": float(config["lora_alpha"])}
    return restate(network, replace(settings, **defaults))


def ranks_by_layer(network: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Ranks, scales and dropout by layer, each only where the layers differ."""
    plans = {path: plan_of(layer) for path, layer in lora_layers(network).items()}
    found: dict[str, dict[str, float]] = {
        "ranks": {path: plan.r for path, plan in plans.items()},
        "alphas": {path: plan.lora_alpha for path, plan in plans.items()},
        "dropouts": {path: plan.lora_dropout for path, plan in plans.items()},
    }
    return {key: values for key, values in found.items() if len(set(values.values())) > 1}
