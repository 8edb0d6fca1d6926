"""The card of an adapter: what it is, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence


def adapter_card(
    *,
    base_model: str,
    lora: bool,
    head: str | None,
    class_names: Sequence[str],
    templates: Sequence[str],
) -> str:
    """A model card in Markdown, with the front matter by which the hub knows a PEFT adapter."""
    kind = "LoRA adapter" if lora else "Fine-tuned weights"
    lines = ["---", f"base_model: {json.dumps(base_model)}"]
    lines += ["library_name: peft"] if lora else []
    tags = [f"base_model:adapter:{base_model}", "lora"] if lora else []
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in [*tags, "clip", "federated-learning"])]
    lines += ["---", "", f"# {kind} for CLIP, trained with fedclip", ""]
    lines += [f"Base model: `{base_model}`. Classifier: {head or 'none'}.", ""]
    if class_names:
        lines += ["Classes: " + ", ".join(class_names) + ".", ""]
    if templates:
        lines += ["Prompts: " + ", ".join(f"`{text}`" for text in templates) + ".", ""]
    code = loading(base_model, lora=lora)
    return "\n".join([*lines, "## How to load", "", "```python", *code, "```", ""])


def loading(base_model: str, *, lora: bool, place: str = "<this folder>") -> list[str]:
    """Lines of Python that load the adapter, or the whole model, from a folder or hub id."""
    return _loading(base_model, place) if lora else _loading_full(base_model, place)


def _loading(base_model: str, place: str) -> list[str]:
    embedded = base_model == "tiny"
    source = 'base_folder("tiny")' if embedded else json.dumps(base_model)
    return [
        "from peft import PeftModel",
        "from transformers import CLIPModel",
        *(["from fedclip import base_folder"] if embedded else []),
        "",
        f"clip = CLIPModel.from_pretrained({source})",
        f'model = PeftModel.from_pretrained(clip, "{place}")',
    ]


def _loading_full(base_model: str, place: str) -> list[str]:
    config = f"{{'model_name': {base_model!r}, 'lora': {{'enabled': False}}}}"
    return [
        "from fedclip import create_clip_model",
        "",
        f"model = create_clip_model({config})",
        f'model.load_adapter("{place}")',
    ]
