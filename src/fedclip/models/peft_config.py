"""PEFT's `adapter_config.json`: the settings and values that are understood, and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedclip.errors import UsageError


def _anything(_: Any) -> bool:
    return True


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(v) and value == v for v in values)


_FLAG = _one_of(True, False)

# Ranks, scales and patterns are checked where they are read, tensors' names and shapes as well.
_UNDERSTOOD: dict[str, Callable[[Any], bool]] = {
    "peft_type": _one_of("LORA"),
    "r": _anything,
    "lora_alpha": _anything,
    "rank_pattern": _anything,
    "alpha_pattern": _anything,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    # Which layers are adapted is told by the tensors.
    "target_modules": _anything,
    "exclude_modules": _anything,
    "layers_to_transform": _anything,
    "layers_pattern": _anything,
    "bias": _one_of("none"),
    # Starts that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, ...)
    # change it, so their tensors fit a base that is nobody's.
    "init_lora_weights": _one_of(True, False, "gaussian", "orthogonal", "eva"),
    "eva_config": _anything,
    "revision": _one_of("main"),
    # Training, notes, and what only matters to settings that are refused.
    "lora_dropout": _anything,
    "inference_mode": _anything,
    "base_model_name_or_path": _anything,
    "task_type": _anything,
    "auto_mapping": _anything,
    "peft_version": _anything,
    "megatron_core": _anything,
    "qalora_group_size": _anything,
}


def check_peft_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter by the name of the first setting that fedclip does not understand.

    A setting that is not known may be there if it is off: null, false or empty.
    """
    if config.get("peft_type") != "LORA":
        raise UsageError(
            f"{source} holds a {config.get('peft_type')} adapter, expected a LoRA adapter (LORA)"
        )
    for name, value in config.items():
        off = value is None or value is False or value in ({}, [], "")
        understood = _UNDERSTOOD.get(name)
        if off and understood is None:
            continue
        if understood is None or not (value is None or understood(value)):
            raise UsageError(
                f"{source} has {name}: {value!r} in its adapter_config.json, which fedclip does "
                f"not understand, so its results would be others than PEFT's{_advice(name)}"
            )


def _advice(name: str) -> str:
    if name == "init_lora_weights":
        return (
            ". Such a start changes the base model; save the adapter by PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) to have it for the "
            "base as it came"
        )
    return "; use PEFT for it"
