"""A model's weights as a plain transformers folder, which needs neither PEFT nor fedclip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPImageProcessorPil

from fedclip.errors import UsageError, first_fault
from fedclip.files import read_json
from fedclip.models.pretrained import EMBEDDED, RANDOM, load_base, quiet, source_of
from fedclip.models.state import checked_state
from fedclip.models.tensor_files import read_tensors
from fedclip.models.text_head import prompts
from fedclip.models.trainable.full import FullFineTuning
from fedclip.models.whole_folder import write_folder
from fedclip.models.wrapper import CLIPLoRAWrapper

CLASSES = "classes.json"
PROCESSORS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
)
_HEAD = "head.safetensors"
_CARD = "README.md"
_FILES = (*PROCESSORS, "config.json", "model.safetensors", CLASSES, _HEAD, _CARD)


def save_plain(model: CLIPLoRAWrapper, folder: Path) -> None:
    """Write a model without adapter as `CLIPModel.from_pretrained` and pipelines read it.

    `classes.json` tells the classes and prompts, `head.safetensors` holds a trained head. Raises
    `UsageError` for random weights, which have no tokenizer of their own.
    """
    assert not model.is_lora_enabled()
    check_processors(model.base_name)

    def write(fresh: Path) -> None:
        with quiet():
            model.clip.save_pretrained(fresh)
        save_processors(model.base_name, fresh)
        write_classes(model, fresh)
        if model.classifier is not None:
            head = {f"head.{name}": t for name, t in model.classifier.state_dict().items()}
            save_file(head, fresh / _HEAD, {"format": "pt"})
        (fresh / _CARD).write_text(_card(model), encoding="utf-8")

    write_folder(folder, _FILES, write)


def open_plain(folder: Path) -> CLIPLoRAWrapper:
    """The model in a folder of `save_plain`, with its classes and its trained head."""
    about = read_json(folder / CLASSES)
    try:
        told = _Classes.model_validate(about)
    except ValidationError as error:
        raise UsageError(f"{folder / CLASSES} is damaged: {first_fault(error)}") from None
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} holds towers for other programs; to use the model with fedclip, name the "
            "run, its adapter, or an export `--to merged`"
        )
    linear = told.head == "linear"
    head = read_tensors(folder / _HEAD)[0] if linear else {}
    model = CLIPLoRAWrapper(
        load_base(str(folder.resolve())),
        kind=FullFineTuning(),
        head=told.head or "auto",
        num_classes=len(head["head.bias"]) if "head.bias" in head else None,
        class_names=told.class_names or None,
        templates=told.templates or None,
    )
    if model.classifier is not None:
        own = {f"head.{name}": value for name, value in model.classifier.state_dict().items()}
        state = checked_state(head, own, source=str(folder / _HEAD))
        model.classifier.load_state_dict({n.removeprefix("head."): t for n, t in state.items()})
    return model


class _Classes(BaseModel):
    """The fields of `classes.json` that say what the classifier is."""

    model_config = ConfigDict(strict=True, frozen=True)

    head: Literal["text", "linear"] | None
    class_names: list[str]
    templates: list[str]


def check_processors(model_name: str) -> None:
    """Raise unless a model has a tokenizer and an image processor that can be handed on."""
    if model_name.startswith(RANDOM) and model_name.removeprefix(RANDOM) not in EMBEDDED:
        raise UsageError(
            f"{model_name} has random weights and no tokenizer of its own, so it cannot be "
            "exported; train on a pretrained model"
        )


def save_processors(model_name: str, folder: Path) -> None:
    """Write a model's tokenizer and image processor into a folder."""
    with quiet():
        source = source_of(model_name)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        # It calls itself CLIPImageProcessor, which transformers finds with or without torchvision.
        CLIPImageProcessorPil.from_pretrained(source).save_pretrained(folder)


def write_classes(model: CLIPLoRAWrapper, folder: Path, **more: Any) -> None:
    """Write what a classifier needs besides the towers: classes, prompts, and the logits' scale."""
    about = {
        "base_model": model.base_name,
        "head": model.head,
        "class_names": list(model.class_names),
        "templates": list(model.templates),
        "prompts": prompts(model.class_names, model.templates),
        "logit_scale": float(model.clip.logit_scale.detach().exp()),
    }
    text = json.dumps(about | more, indent=2, ensure_ascii=False)
    (folder / CLASSES).write_text(text + "\n", encoding="utf-8")


def _card(model: CLIPLoRAWrapper) -> str:
    names = ", ".join(json.dumps(name, ensure_ascii=False) for name in model.class_names)
    template = json.dumps(next(iter(model.templates), "{}"), ensure_ascii=False)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: zero-shot-image-classification",
        "tags:",
        '- "clip"',
        '- "federated-learning"',
        "---",
        "",
        "# CLIP, fine-tuned with fedclip",
        "",
        f"Made from `{model.base_name}`; the adapter is merged into the weights.",
        f"Classifier: {model.head or 'none'}.",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        'classify = pipeline("zero-shot-image-classification", model="<this folder>")',
        f"classify(image, candidate_labels=[{names}], hypothesis_template={template})",
        "```",
        "",
    ]
    lines += [
        "`image` is an upright RGB image of 8 bits: lay transparency over white, turn a photograph",
        "as its EXIF says, bring 16-bit levels to 8 first (fedclip's `to_pixels` does all that).",
        "",
    ]
    if model.head == "linear":
        lines += [
            "The trained head is in `head.safetensors`; it works on the projected image embedding,",
            "not normalised. The pipeline above does not use it.",
            "",
        ]
    elif len(model.templates) > 1:
        lines += [
            "There are several prompt templates, in `classes.json`. A pipeline takes one; fedclip",
            "averages the normalised features of a class's prompts and normalises the mean.",
            "",
        ]
    return "\n".join(lines)
