"""The card of an adapter: what it is, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from fedclip.errors import harmless
from fedclip.models.protocols import Trainable


def adapter_card(
    kind: type[Trainable],
    *,
    base_model: str,
    head: str | None,
    class_names: Sequence[str],
    templates: Sequence[str],
) -> str:
    """A model card in Markdown, with the front matter by which the hub knows a PEFT adapter."""
    peft = kind.peft_format
    lines = ["---", f"base_model: {json.dumps(base_model)}"]
    lines += ["library_name: peft"] if peft else []
    tags = [f"base_model:adapter:{base_model}", "lora"] if peft else []
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in [*tags, "clip", "federated-learning"])]
    lines += ["---", "", f"# {kind.heading} for CLIP, trained with fedclip", ""]
    lines += [f"Base model: `{base_model}`. Classifier: {head or 'none'}.", ""]
    if class_names:
        lines += ["Classes: " + ", ".join(map(markdown, class_names)) + ".", ""]
    if templates:
        lines += ["Prompts: " + ", ".join(map(code, templates)) + ".", ""]
    return "\n".join([*lines, "## How to load", "", *loading(kind, base_model, head=head), ""])


def loading(
    kind: type[Trainable], base_model: str, *, head: str | None, place: str = "<this folder>"
) -> list[str]:
    """Lines of Markdown that say how to load what was trained, with its head.

    `place` is a folder or hub id; only PEFT loads from a hub id.
    """
    predict = ["", "To classify images: `fedclip predict <this folder> IMAGE...`"] if head else []
    if kind.peft_format and head != "linear":
        return ["```python", *_loading(base_model, place), "```", *predict]
    told = []
    if head == "linear":
        told = [
            "The trained classifier is in `head.safetensors`, which PEFT and transformers pass "
            "over; fedclip loads it with the rest, from a folder on disk:",
            "",
        ]
    return [*told, "```python", *_loading_whole(), "```", *predict]


def markdown(name: str) -> str:
    """Escape a name for one line of Markdown."""
    line = harmless(name, lines=False)
    return re.sub(r"([\\`*_\[\]<>|#~!&])", r"\\\1", line)


def code(text: str) -> str:
    """Quote a text as inline code in Markdown."""
    line = harmless(text, lines=False)
    return f"`` {line} ``" if "`" in line else f"`{line}`"


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


def _loading_whole() -> list[str]:
    return [
        "import torch",
        "from fedclip import open_adapter",
        "from PIL import Image",
        "",
        'model = open_adapter("<this folder>")',
        'pixels = model.to_pixels([Image.open("photo.jpg")])',
        "scores = model(torch.from_numpy(pixels)).softmax(dim=-1)  # one for each class",
    ]
