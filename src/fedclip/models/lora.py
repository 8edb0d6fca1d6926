"""LoRA on the towers of a CLIP, through PEFT: the only file that knows PEFT's key names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CLIPModel

from fedclip.errors import UsageError
from fedclip.models.dropout import KeyedDropout
from fedclip.seeding import seed_for

LAYERS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
TOWERS = {"vision_encoder": "vision_model", "text_encoder": "text_model"}
_ADAPTER = "default"
_FILE_PREFIX = "base_model.model."


def target_regex(
    target_modules: Mapping[str, Sequence[str] | None], chosen: Mapping[str, str] | None = None
) -> str:
    """One expression that matches exactly the layers asked for, tower by tower.

    `chosen` is an expression for the numbers of the encoder layers by tower, by default all.
    """
    towers = []
    for tower, names in target_modules.items():
        if tower not in TOWERS:
            raise UsageError(_unknown("model.lora.target_modules", tower, TOWERS))
        for name in names or ():
            if name not in LAYERS:
                raise UsageError(_unknown(f"model.lora.target_modules.{tower}", name, LAYERS))
        if names:
            layers = "|".join(LAYERS[name] for name in LAYERS if name in names).replace(".", r"\.")
            numbers = (chosen or {}).get(tower, r"\d+")
            towers.append(rf"{TOWERS[tower]}\.encoder\.layers\.{numbers}\.(?:{layers})")
    if not towers:
        raise UsageError(
            "model.lora.target_modules names no layer, so nothing would be trained; name some of "
            f"{', '.join(LAYERS)} under vision_encoder or text_encoder, or set lora.enabled: false"
        )
    return "|".join(towers)


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale, dropout, and the layers by tower: `{"vision_encoder": ["q_proj", ...]}`.

    `last_layers` leaves all but so many of the top encoder layers of either tower without adapter.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: Mapping[str, Sequence[str] | None]
    last_layers: int | None = None

    def facts(self) -> dict[str, Any]:
        """What `get_lora_info` says of an adapter."""
        targets = {tower: list(names) for tower, names in self.target_modules.items() if names}
        facts: dict[str, Any] = {
            "enabled": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": targets,
        }
        return facts | ({} if self.last_layers is None else {"last_layers": self.last_layers})


def add_lora(clip: CLIPModel, settings: LoraSettings, *, model_name: str, seed: int) -> PeftModel:
    """Freeze a CLIP and add a LoRA adapter (Hu et al. 2021) to the layers named.

    A is drawn by layer name from `seed`, so all who share the seed start from the same adapter,
    whatever else they adapt; B is zero, so the adapter starts as no change.
    """
    alpha: Any = settings.lora_alpha  # PEFT declares an int and computes with a float as well
    config = LoraConfig(
        r=settings.r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=target_regex(settings.target_modules, _top_layers(clip, settings)),
        bias="none",
    )
    # PEFT draws its own start from the global generator first; that must leave no trace.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers calls deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        network = get_peft_model(clip, config)
    config.base_model_name_or_path = model_name
    for layer, module in lora_layers(network).items():
        generator = torch.Generator().manual_seed(seed_for(seed, "lora", layer))
        # The start that PEFT and the LoRA authors use: uniform within 1 / sqrt(in_features).
        start = cast(nn.Linear, module.lora_A[_ADAPTER]).weight
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        if settings.lora_dropout > 0.0:
            module.lora_dropout[_ADAPTER] = KeyedDropout(settings.lora_dropout, layer)
    return network  # type: ignore[return-value]


def _top_layers(clip: CLIPModel, settings: LoraSettings) -> dict[str, str]:
    """Expressions for the numbers of the top encoder layers; nothing where all are adapted."""
    if settings.last_layers is None:
        return {}
    found = {}
    for tower, module in TOWERS.items():
        count = len(cast(nn.ModuleList, clip.get_submodule(f"{module}.encoder.layers")))
        if settings.target_modules.get(tower) and settings.last_layers > count:
            raise UsageError(
                f"model.lora.last_layers is {settings.last_layers}, but the {tower} has {count} "
                "layers; give a smaller number, or null for all"
            )
        top = range(max(0, count - settings.last_layers), count)
        found[tower] = f"(?:{'|'.join(map(str, top))})"
    return found


def lora_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Live LoRA parameters under the names of `adapter_model.safetensors`, sorted."""
    found = {
        name.replace(f".{_ADAPTER}.", "."): parameter
        for name, parameter in network.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    return dict(sorted(found.items()))


def base_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the CLIP underneath, under CLIP's own names, sorted."""
    found = {
        name.removeprefix(_FILE_PREFIX).replace(".base_layer.", "."): parameter
        for name, parameter in network.named_parameters()
        if ".lora_A." not in name and ".lora_B." not in name
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
    for tower, module in TOWERS.items():
        if f"{module}." in name:
            return tower
    if name.startswith("text_projection"):
        return "text_encoder"
    return "vision_encoder" if name.startswith("visual_projection") else ""


def rank_of(tensors: Mapping[str, Any]) -> int | None:
    """Rank of an adapter's tensors; None when there are none or they disagree."""
    ranks = {value.shape[0] for name, value in tensors.items() if name.endswith("lora_A.weight")}
    return ranks.pop() if len(ranks) == 1 else None


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by their path in the CLIP."""
    return {
        name.removeprefix(_FILE_PREFIX): module
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer)
    }


def _unknown(key: str, name: str, known: Mapping[str, str]) -> str:
    return f"{key}: {name!r} is not known; known are {', '.join(known)}"


def factor_names(layer: str) -> tuple[str, str]:
    """Names of a layer's A and B in `adapter_model.safetensors`."""
    return f"{_FILE_PREFIX}{layer}.lora_A.weight", f"{_FILE_PREFIX}{layer}.lora_B.weight"


def scaling_of(layer: LoraLayer) -> float:
    """What a layer multiplies its update with: lora_alpha / r."""
    return float(layer.scaling[_ADAPTER])


def at_rank(state: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The state with all but the first `rank` rows of A and columns of B set to zero.

    Where both are zero neither gets a gradient: the client trains an adapter of that rank.
    """
    cut = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in cut.items():
        if ".lora_A." in name:
            tensor[rank:] = 0
        elif ".lora_B." in name:
            tensor[:, rank:] = 0
    return cut


def scalings(network: nn.Module) -> dict[str, float]:
    """What each adapted layer multiplies its update with, by the layer's path."""
    return {layer: scaling_of(module) for layer, module in lora_layers(network).items()}


def layers_in(tensors: Mapping[str, Any]) -> list[str]:
    """Paths of the layers whose A is among an adapter's tensors, sorted."""
    end = ".lora_A.weight"
    names = (name.removesuffix(end) for name in tensors if name.endswith(end))
    return sorted(name.removeprefix(_FILE_PREFIX) for name in names)


@torch.no_grad()
def dense_updates(network: nn.Module) -> dict[str, torch.Tensor]:
    """Each adapted layer's update s B A `[out, in]`, by the layer's path."""
    layers: dict[str, Any] = dict(lora_layers(network))  # PEFT defines it in subclasses only
    return {layer: module.get_delta_weight(_ADAPTER) for layer, module in layers.items()}


def set_folded(network: nn.Module, folded: bool) -> None:
    """Tell the layers whether their weights hold the update already."""
    for layer in lora_layers(network).values():
        layer.merged_adapters = [_ADAPTER] if folded else []


@contextmanager
def scaled_for_rank(network: nn.Module, rank: int) -> Iterator[None]:
    """Inside, updates are scaled as those of an adapter of that rank: lora_alpha / rank."""
    layers = lora_layers(network).values()
    before = [scaling_of(layer) for layer in layers]
    for layer in layers:
        layer.scaling[_ADAPTER] = layer.lora_alpha[_ADAPTER] / rank
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[_ADAPTER] = scaling
