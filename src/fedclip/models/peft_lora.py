"""LoRA on the towers of a CLIP, through PEFT's modules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CLIPModel

from fedclip.errors import UsageError
from fedclip.lora.factors import Factors, with_magnitudes
from fedclip.lora.layer_patterns import PROJECTIONS, TOWERS, pattern_regex
from fedclip.lora.names import is_adapter_tensor, layer_path
from fedclip.models.dropout import KeyedDropout
from fedclip.models.lora_settings import (
    LayerPlan,
    LoraSettings,
    planned,
    restated,
    scaling,
    targets_in,
)
from fedclip.seeding import seed_for

_ADAPTER = "default"


def add_lora(clip: CLIPModel, settings: LoraSettings, *, model_name: str, seed: int) -> PeftModel:
    """Freeze a CLIP and add a LoRA adapter (Hu et al. 2021) to the layers named.

    A is drawn by layer name from `seed`, so all who share the seed start from the same adapter,
    whatever else they adapt; B is zero, so the adapter starts as no change.
    """
    plans = planned(clip, settings)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=_whole(settings.lora_alpha),
        lora_dropout=settings.lora_dropout,
        target_modules=targets_in(clip, settings),
        bias="none",
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    if settings.exclude_modules:
        config.exclude_modules = "|".join(
            pattern_regex(p).pattern for p in settings.exclude_modules
        )
    _tell_patterns(config, restated(settings, plans))
    # PEFT draws its own start from the global generator first; that must leave no trace.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers calls deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        network = get_peft_model(clip, config)
    config.base_model_name_or_path = model_name
    for layer, module in lora_layers(network).items():
        hooked = cast(nn.Module, module)  # PEFT's type says less than it is
        hooked.register_state_dict_pre_hook(_refuse_folded)
        hooked.register_load_state_dict_pre_hook(_refuse_folded)
        generator = torch.Generator().manual_seed(seed_for(seed, "lora", layer))
        # The start that PEFT and the LoRA authors use: uniform within 1 / sqrt(in_features).
        start = cast(nn.Linear, module.lora_A[_ADAPTER]).weight
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        p = plans[layer].lora_dropout
        module.lora_dropout[_ADAPTER] = KeyedDropout(p, layer) if p > 0.0 else nn.Identity()
    return network  # type: ignore[return-value]


def _tell_patterns(config: LoraConfig, settings: LoraSettings) -> None:
    """Put ranks and scales into PEFT's configuration."""
    config.r, config.lora_alpha = settings.r, _whole(settings.lora_alpha)
    config.rank_pattern = dict(settings.rank_pattern)
    config.alpha_pattern = {path: _whole(a) for path, a in settings.alpha_pattern.items()}


def _whole(alpha: float) -> Any:
    """PEFT declares lora_alpha an int, and computes with a float as well."""
    return int(alpha) if float(alpha).is_integer() else alpha


def lora_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Live LoRA parameters under the names of `adapter_model.safetensors`, sorted."""
    found = {
        _file_name(name): parameter
        for name, parameter in network.named_parameters()
        if is_adapter_tensor(name)
    }
    return dict(sorted(found.items()))


def _file_name(name: str) -> str:
    """PEFT's name of a tensor in its file: without the adapter's name."""
    name = name.replace(f".{_ADAPTER}.", ".")
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


def base_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the CLIP underneath, under CLIP's names, sorted."""
    found = {
        layer_path(name).replace(".base_layer.", "."): parameter
        for name, parameter in network.named_parameters()
        if not is_adapter_tensor(name)
    }
    return dict(sorted(found.items()))


def adapter_config(network: PeftModel) -> dict[str, Any]:
    """What `adapter_config.json` holds, the same for the same adapter."""
    values = network.peft_config[_ADAPTER].to_dict()
    values["inference_mode"] = True
    # PEFT itself writes this for a model without a task type; it names the class to load.
    values["auto_mapping"] = {
        "base_model_class": CLIPModel.__name__,
        "parent_library": CLIPModel.__module__,
    }
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in values.items()
    }


def tower_of(name: str) -> str:
    """`vision_encoder`, `text_encoder`, or "" for a parameter that belongs to neither tower."""
    path = layer_path(name)
    for tower, module in TOWERS.items():
        if path.startswith((f"{module}.", PROJECTIONS[tower])):
            return tower
    return ""


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by their path in the CLIP."""
    return {
        layer_path(name): module
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer)
    }


def scaling_of(layer: LoraLayer, rank: int | None = None) -> float:
    """What a layer multiplies its update with; with `rank`, that of a client's lower rank."""
    r = layer.r[_ADAPTER]
    r = r if rank is None else min(rank, r)
    return scaling(layer.lora_alpha[_ADAPTER], r, layer.use_rslora[_ADAPTER])


def plan_of(layer: LoraLayer) -> LayerPlan:
    """A layer's rank, scale and dropout as they stand."""
    return LayerPlan(layer.r[_ADAPTER], float(layer.lora_alpha[_ADAPTER]), dropout_of(layer))


def dropout_of(layer: LoraLayer) -> float:
    """The share of a layer's input that its adapter does not see in training."""
    module = layer.lora_dropout[_ADAPTER]
    return module.p if isinstance(module, KeyedDropout) else 0.0


def scalings(network: nn.Module) -> dict[str, float]:
    """What each adapted layer multiplies its update with, by the layer's path."""
    return {layer: scaling_of(module) for layer, module in lora_layers(network).items()}


@torch.no_grad()
def dense_updates(network: nn.Module) -> dict[str, torch.Tensor]:
    """What each adapted layer adds to its weight `[out, in]`, by the layer's path.

    That is s B A; for DoRA the difference to the weight that its magnitudes make of W + s B A.
    """
    return {layer: _dense_update(module) for layer, module in lora_layers(network).items()}


def _dense_update(layer: Any) -> torch.Tensor:
    update: torch.Tensor = layer.get_delta_weight(_ADAPTER)
    if _ADAPTER not in layer.lora_magnitude_vector:
        return update
    weight = layer.get_base_layer().weight
    return with_magnitudes(weight + update, layer.lora_magnitude_vector[_ADAPTER].weight) - weight


def _refuse_folded(layer: Any, *_: Any) -> None:
    """A hook: the layer's state is W and the adapter, which W already holds while it is merged."""
    if layer.merged_adapters:
        raise UsageError(
            "the adapter is merged into the weights, so a state_dict would hold it twice; call "
            "unmerge_lora() first, or save_adapter, which works either way"
        )


def set_folded(network: nn.Module, folded: bool) -> None:
    """Tell the layers whether their weights hold the update already."""
    for layer in lora_layers(network).values():
        layer.merged_adapters = [_ADAPTER] if folded else []


@contextmanager
def scaled_for_rank(network: nn.Module, rank: int) -> Iterator[None]:
    """Inside, updates are scaled as those of an adapter of that rank (or of the layer's, if lower).

    So by lora_alpha / rank, for rsLoRA by lora_alpha / sqrt(rank).
    """
    layers = lora_layers(network).values()
    before = [layer.scaling[_ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[_ADAPTER] = scaling_of(layer, rank)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.scaling[_ADAPTER] = own


def factors_of(layer: LoraLayer) -> Factors:
    """A layer's live A and B."""
    a, b = (cast(nn.Linear, home[_ADAPTER]).weight for home in (layer.lora_A, layer.lora_B))
    return Factors(a, b)


def put_factors(layer: LoraLayer, factors: Factors, lora_alpha: float) -> None:
    """Replace a layer's A and B by new parameters, whose rank may differ, and its lora_alpha."""
    for home, value in ((layer.lora_A, factors.a), (layer.lora_B, factors.b)):
        linear = cast(nn.Linear, home[_ADAPTER])
        old = linear.weight
        fresh = value.detach().to(old, copy=True, memory_format=torch.contiguous_format)
        linear.weight = nn.Parameter(fresh, requires_grad=old.requires_grad)
        linear.out_features, linear.in_features = value.shape
    layer.r[_ADAPTER] = len(factors.a)
    layer.lora_alpha[_ADAPTER] = _whole(lora_alpha)
    layer.scaling[_ADAPTER] = scaling_of(layer)


def restate(network: PeftModel, settings: LoraSettings) -> LoraSettings:
    """Settings that say what the layers are by now, put into PEFT's configuration as well."""
    plans = {path: plan_of(layer) for path, layer in lora_layers(network).items()}
    settings = replace(restated(settings, plans), own_ranks=True)
    _tell_patterns(cast(LoraConfig, network.peft_config[_ADAPTER]), settings)
    return settings
