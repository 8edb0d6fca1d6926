"""Which layers of a CLIP get an adapter, and of which rank, scale and dropout: no PEFT needed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import CLIPModel

from fedclip.errors import UsageError
from fedclip.lora.layer_patterns import LAYERS, PROJECTIONS, TOWERS, check_hits, first_hit, fits_any


class LayerPlan(NamedTuple):
    """One layer's rank, scale and dropout."""

    r: int
    lora_alpha: float
    lora_dropout: float


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale, dropout, and the layers by tower: `{"vision_encoder": ["q_proj", ...]}`.

    `last_layers` leaves all but so many of the top encoder layers of either tower without adapter.
    Patterns (`fedclip.lora.layer_patterns`) are exceptions for the layers that they fit;
    `exclude_modules` are layers without adapter. The update is scaled by lora_alpha / r, or for
    rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) by lora_alpha / sqrt(r). `use_dora` is DoRA (Liu
    et al. 2024, arXiv:2402.09353). `own_ranks`: ranks were changed after the model was made.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: Mapping[str, Sequence[str] | None]
    last_layers: int | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: Sequence[str] = ()
    use_rslora: bool = False
    use_dora: bool = False
    own_ranks: bool = False

    def facts(self) -> dict[str, Any]:
        """What `get_lora_info` says of an adapter, except for per-layer settings."""
        targets = {tower: list(names) for tower, names in self.target_modules.items() if names}
        facts: dict[str, Any] = {
            "enabled": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": targets,
        }
        seldom = {
            "last_layers": self.last_layers,
            "exclude_modules": list(self.exclude_modules),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }
        return facts | {name: value for name, value in seldom.items() if value}


def scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """What an update B A is multiplied with."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def alpha_at(lora_alpha: float, r: int, new: int, use_rslora: bool) -> float:
    """The lora_alpha that scales an adapter of rank `new` as `lora_alpha` does one of rank `r`.

    Rounded to twelve digits, so that layers which came there by other ways agree.
    """
    exact = lora_alpha * math.sqrt(new / r) if use_rslora else lora_alpha * new / r
    return float(f"{exact:.12g}")


def target_regex(
    target_modules: Mapping[str, Sequence[str] | None], chosen: Mapping[str, str] | None = None
) -> str:
    """One expression that matches exactly the layers asked for, tower by tower.

    `chosen` is an expression for the numbers of the encoder layers by tower, by default all.
    """
    found = []
    for tower, names in target_modules.items():
        if tower not in TOWERS:
            raise UsageError(_unknown("model.lora.target_modules", tower, TOWERS))
        projection = PROJECTIONS[tower]
        for name in names or ():
            if name not in (*LAYERS, projection):
                key = f"model.lora.target_modules.{tower}"
                raise UsageError(_unknown(key, name, (*LAYERS, projection)))
        inner = [LAYERS[name] for name in LAYERS if name in (names or ())]
        if inner:
            layers = "|".join(inner).replace(".", r"\.")
            numbers = (chosen or {}).get(tower, r"\d+")
            found.append(rf"{TOWERS[tower]}\.encoder\.layers\.{numbers}\.(?:{layers})")
        if projection in (names or ()):
            found.append(projection)
    if not found:
        raise UsageError(
            "model.lora.target_modules names no layer, so nothing would be trained; name some of "
            f"{', '.join(LAYERS)} under vision_encoder or text_encoder, or set lora.enabled: false"
        )
    return "|".join(found)


def targets_in(clip: CLIPModel, settings: LoraSettings) -> str:
    """The expression for the layers that settings name, before any is excluded."""
    return target_regex(settings.target_modules, _top_layers(clip, settings))


def planned(clip: CLIPModel, settings: LoraSettings) -> dict[str, LayerPlan]:
    """Each adapted layer's plan by its path in the CLIP.

    Where a pattern changes the rank and none gives a lora_alpha, lora_alpha follows the rank so
    that the scaling stays. Raises `UsageError` for a pattern that fits no adapted layer.
    """
    targets = re.compile(targets_in(clip, settings))
    paths = [path for path, _ in clip.named_modules() if targets.fullmatch(path)]
    check_hits("model.lora.exclude_modules", settings.exclude_modules, paths)
    paths = [path for path in paths if not fits_any(settings.exclude_modules, path)]
    if not paths:
        raise UsageError(
            "model.lora.exclude_modules excludes every layer of model.lora.target_modules, so "
            "nothing would be trained; exclude fewer, or set lora.enabled: false"
        )
    for key in ("rank_pattern", "alpha_pattern", "dropout_pattern"):
        check_hits(f"model.lora.{key}", getattr(settings, key), paths)
    return {path: _plan(path, settings) for path in paths}


def _plan(path: str, settings: LoraSettings) -> LayerPlan:
    r = first_hit(settings.rank_pattern, path, settings.r)
    following = alpha_at(settings.lora_alpha, settings.r, r, settings.use_rslora)
    alpha = first_hit(settings.alpha_pattern, path, following)
    return LayerPlan(r, alpha, first_hit(settings.dropout_pattern, path, settings.lora_dropout))


def restated(settings: LoraSettings, plans: Mapping[str, LayerPlan]) -> LoraSettings:
    """Settings that say what the plans say, with whole paths for patterns: PEFT reads them alike.

    What all layers agree on is said once.
    """
    r = _common([plan.r for plan in plans.values()], settings.r)
    alpha = _common([plan.lora_alpha for plan in plans.values()], settings.lora_alpha)
    dropout = _common([plan.lora_dropout for plan in plans.values()], settings.lora_dropout)
    return replace(
        settings,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        rank_pattern={path: plan.r for path, plan in plans.items() if plan.r != r},
        alpha_pattern={
            path: plan.lora_alpha
            for path, plan in plans.items()
            if plan.lora_alpha != alpha or plan.r != r
        },
        dropout_pattern={
            path: plan.lora_dropout for path, plan in plans.items() if plan.lora_dropout != dropout
        },
    )


def _common(values: list[Any], default: Any) -> Any:
    return values[0] if len(set(values)) == 1 else default


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


def _unknown(key: str, name: str, known: Mapping[str, str] | Sequence[str]) -> str:
    return f"{key}: {name!r} is not known; known are {', '.join(known)}"
