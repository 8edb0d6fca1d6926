"""A model folder's settings, by allow-list: numbers that describe a CLIP, and no choice of code.

What a `config.json` may also hold is left out, so that it decides nothing: the attention
implementation, a type of numbers, generation settings. What would make its weights mean something
else, remote code or quantisation, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from transformers import CLIPConfig, CLIPTokenizer, PreTrainedTokenizerFast

from fedclip.errors import UsageError

_REFUSED = ("auto_map", "quantization_config", "custom_pipelines")
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")
# Both read the folder's tokenizer.json, or CLIP's own vocab.json and merges.txt.
_TOKENIZERS = {
    "CLIPTokenizer": CLIPTokenizer,
    "CLIPTokenizerFast": CLIPTokenizer,
    "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
    "TokenizersBackend": PreTrainedTokenizerFast,
}

Check = tuple[Callable[[Any], bool], str]


def _whole(most: int, least: int = 1) -> Check:
    def fits(value: Any) -> bool:
        return type(value) is int and least <= value <= most

    return fits, f"a whole number from {least} to {most}"


def _number(least: float, most: float) -> Check:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and least <= value <= most

    return fits, f"a number from {least:g} to {most:g}"


_EITHER: dict[str, Check] = {
    "hidden_size": _whole(1 << 15),
    "intermediate_size": _whole(1 << 17),
    "projection_dim": _whole(1 << 15),
    "num_hidden_layers": _whole(256),
    "num_attention_heads": _whole(1 << 10),
    "hidden_act": (lambda value: value in _ACTIVATIONS, f"one of {', '.join(_ACTIVATIONS)}"),
    "layer_norm_eps": _number(0, 1),
    "initializer_range": _number(0, 100),
    "initializer_factor": _number(0, 100),
}
_ID = (lambda value: value is None or _whole(1 << 24, 0)[0](value), "a token's id")
_TEXT: dict[str, Check] = {
    **_EITHER,
    "vocab_size": _whole(1 << 24),
    "max_position_embeddings": _whole(1 << 14),
    "pad_token_id": _ID,
    "bos_token_id": _ID,
    "eos_token_id": _ID,
}
_VISION: dict[str, Check] = {
    **_EITHER,
    "num_channels": _whole(3, 3),
    "image_size": _whole(1 << 12),
    "patch_size": _whole(1 << 12),
}
_BOTH: dict[str, Check] = {
    "projection_dim": _whole(1 << 15),
    "logit_scale_init_value": _number(-100, 100),
    "initializer_factor": _number(0, 100),
}
_PARTS = {
    "text_config": _TEXT,
    "text_config_dict": _TEXT,  # how old files of OpenAI's and others say the same
    "vision_config": _VISION,
    "vision_config_dict": _VISION,
}


def clip_config(found: Mapping[str, Any], name: str) -> CLIPConfig:
    """The architecture that a `config.json` describes; `UsageError` names what does not fit."""
    _refuse_code(found, name, "config.json")
    if found.get("model_type") != "clip":
        kind = f"a model of type {found.get('model_type')!r}"
        raise UsageError(f"model.model_name: {name} is {kind}; fedclip fine-tunes CLIP ('clip')")
    values = _understood(found, _BOTH, name)
    for part, checks in _PARTS.items():
        own = found.get(part)
        if own is None:
            continue
        if not isinstance(own, Mapping):
            raise UsageError(f"model.model_name: {name}: config.json: {part} must be an object")
        _refuse_code(own, name, f"config.json: {part}")
        values[part] = _understood(own, checks, name, f"{part}.")
    config: CLIPConfig = CLIPConfig.from_dict(values)
    return config


def tokenizer_class(found: Mapping[str, Any], name: str) -> Any:
    """The tokenizer class of a folder, from an allow-list."""
    _refuse_code(found, name, "tokenizer_config.json")
    asked = found.get("tokenizer_class") or "CLIPTokenizer"
    if asked not in _TOKENIZERS:
        raise UsageError(
            f"model.model_name: {name}: tokenizer_config.json: tokenizer_class must be one of "
            f"{', '.join(_TOKENIZERS)}, got {asked!r}"
        )
    return _TOKENIZERS[asked]


def check_preprocessing(processor: Any, size: int, name: str) -> None:
    """Refuse preprocessing that does not fill the squares of `size` pixels that a tower sees."""
    crop, resize = _sides(processor.crop_size), _sides(processor.size)
    least = min(resize.values(), default=0)
    problem = ""
    if not processor.do_resize:
        problem = "do_resize is false: images would be cut or filled up with black"
    elif processor.do_center_crop:
        if crop != {"height": size, "width": size}:
            problem = f"crop_size is {crop}"
        elif least < size or set(resize) not in ({"shortest_edge"}, {"height", "width"}):
            problem = f"size is {resize}, which leaves a crop of {size} pixels partly black"
    elif resize != {"height": size, "width": size}:
        problem = f"do_center_crop is false and size is {resize}"
    if processor.resample not in tuple(Image.Resampling):
        problem = problem or f"resample is {processor.resample}, expected 0 to 5"
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    numbers = [scale]
    if processor.do_normalize:
        numbers += [*processor.image_mean, *processor.image_std]
        if len(numbers) != 7 or min(processor.image_std) <= 0:
            problem = problem or "image_mean and image_std must be three numbers, the second > 0"
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers) or not 0 < scale <= 1:
        problem = problem or "rescale_factor, image_mean and image_std must be plain numbers"
    if problem:
        raise UsageError(
            f"model.model_name: {name}: preprocessor_config.json does not fit the vision tower, "
            f"whose input is {size} x {size} pixels: {problem}; use the preprocessor_config.json "
            "that belongs to this model"
        )


def _sides(value: Any) -> dict[str, Any]:
    """The given sides of a size, by name."""
    return {} if value is None else {k: v for k, v in dict(value).items() if v is not None}


def _refuse_code(found: Mapping[str, Any], name: str, where: str) -> None:
    for key in _REFUSED:
        if found.get(key):
            raise UsageError(
                f"model.model_name: {name}: {where} asks for {key}, which fedclip does not follow: "
                "weights are used as a plain CLIP in fp32; use a model without it"
            )


def _understood(
    found: Mapping[str, Any], checks: Mapping[str, Check], name: str, at: str = ""
) -> dict[str, Any]:
    values = {key: found[key] for key in checks if key in found}
    for key, value in values.items():
        fits, expected = checks[key]
        if not fits(value):
            raise UsageError(
                f"model.model_name: {name}: config.json: {at}{key} must be {expected}, "
                f"got {str(value)[:80]!r}"
            )
    return values
