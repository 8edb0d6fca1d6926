"""The card of an adapter: what it is, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fedclip.models.protocols import Trainable


def adapter_card(
    kind: type[Trainable],
    *,
    base_model: str,
    head: str | None,
    class_names: Sequence[str],
    templates: Sequence[str],
    num_classes: int | None = None,
) -> str:
    """A model card in Markdown, with the front matter by which the hub knows a PEFT adapter.

    `num_classes` is that of a trained head.
    """
    peft = kind.peft_format
    lines = ["---", f"base_model: {json.dumps(base_model)}"]
    lines += ["library_name: peft"] if peft else []
    tags = [f"base_model:adapter:{base_model}", "lora"] if peft else []
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in [*tags, "clip", "federated-learning"])]
    lines += ["---", "", f"# {kind.heading} for CLIP, trained with fedclip", ""]
    lines += [f"Base model: `{base_model}`. Classifier: {head or 'none'}.", ""]
    if class_names:
        lines += ["Classes: " + ", ".join(class_names) + ".", ""]
    if templates:
        lines += ["Prompts: " + ", ".join(f"`{text}`" for text in templates) + ".", ""]
    code = loading(kind, base_model, num_classes=num_classes)
    return "\n".join([*lines, "## How to load", "", "```python", *code, "```", ""])


def loading(
    kind: type[Trainable],
    base_model: str,
    *,
    place: str = "<this folder>",
    num_classes: int | None = None,
) -> list[str]:
    """Lines of Python that load what was trained from a folder or hub id."""
    if kind.peft_format:
        return _loading(base_model, place)
    keys = {"model_name": base_model, **kind.model_keys}
    if num_classes is not None:
        keys |= {"head": "linear", "num_classes": num_classes}
    return [
        "from fedclip import create_clip_model",
        "",
        f"model = create_clip_model({keys!r})",
        f'model.load_adapter("{place}")',
    ]


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
