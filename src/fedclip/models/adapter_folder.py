"""An adapter on disk: a PEFT folder, the trained head beside it, and what fedclip adds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedclip.errors import UsageError
from fedclip.files import write_folder
from fedclip.models.adapter_card import adapter_card
from fedclip.models.pretrained import RANDOM, source_of
from fedclip.models.state import adapter_sha256

CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
FULL = "model.safetensors"
HEAD = "head.safetensors"
NOTES = "fedclip.json"
CARD = "README.md"
FILES = (CONFIG, ADAPTER, FULL, HEAD, NOTES, CARD)
_HEAD_PREFIX = "head."


@dataclass(frozen=True)
class AdapterNotes:
    """What `fedclip.json` says about an adapter, besides PEFT's own configuration.

    `base_sha256` is the digest of the frozen weights that the tensors belong to. `own_ranks`:
    the ranks are not those of a configuration, but come of `set_rank`, stacking or merging.
    """

    base_model: str
    base_sha256: str | None
    head: str | None
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    own_ranks: bool = False


def write_adapter(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    notes: AdapterNotes,
    peft_config: Mapping[str, Any] | None,
) -> None:
    """Write an adapter folder, whole or not at all; equal adapters give equal bytes.

    `peft_config` is None after full fine-tuning, whose tensors go to `model.safetensors`.
    """
    head = {name: tensor for name, tensor in state.items() if name.startswith(_HEAD_PREFIX)}
    body = {name: tensor for name, tensor in state.items() if name not in head}
    about = {
        "base_model": notes.base_model,
        "base_sha256": notes.base_sha256,
        "head": notes.head,
        "class_names": list(notes.class_names),
        "templates": list(notes.templates),
        "adapter_sha256": adapter_sha256(state),
    } | ({"own_ranks": True} if notes.own_ranks else {})

    def write(fresh: Path) -> None:
        if peft_config is not None:
            _write_json(fresh / CONFIG, peft_config)
        save_file(body, fresh / (FULL if peft_config is None else ADAPTER), {"format": "pt"})
        if head:
            save_file(head, fresh / HEAD, {"format": "pt"})
        _write_json(fresh / NOTES, about)
        card = adapter_card(
            base_model=notes.base_model,
            lora=peft_config is not None,
            head=notes.head,
            class_names=notes.class_names,
            templates=notes.templates,
        )
        (fresh / CARD).write_text(card, encoding="utf-8")

    write_folder(folder, FILES, write)


def read_adapter(
    folder: Path,
) -> tuple[dict[str, torch.Tensor], AdapterNotes, dict[str, Any] | None]:
    """Read tensors, notes and PEFT configuration (None after full fine-tuning) of a folder.

    A plain PEFT adapter, without fedclip's notes, is read as well.
    """
    full = folder / FULL
    weights = full if full.is_file() else folder / ADAPTER
    if not weights.is_file():
        raise UsageError(f"{folder} holds no adapter: there is no {ADAPTER} (nor {FULL}) in it")
    try:
        tensors = load_file(weights)
        if (folder / HEAD).is_file():
            tensors |= load_file(folder / HEAD)
        config = None if weights == full else _read_json(folder / CONFIG)
        about = _read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"the adapter in {folder} cannot be read: {error}") from error
    notes = AdapterNotes(
        base_model=str(about.get("base_model") or (config or {}).get("base_model_name_or_path")),
        base_sha256=about.get("base_sha256"),
        head=about.get("head"),
        class_names=tuple(about.get("class_names", ())),
        templates=tuple(about.get("templates", ())),
        own_ranks=about.get("own_ranks") is True,
    )
    return tensors, notes, config


def check_base(
    folder: Path, notes: AdapterNotes, *, base_model: str, base_sha256: str | None
) -> None:
    """Raise unless the adapter was made on this base: by its weights' digest, or else its name."""
    if notes.base_sha256 is None or base_sha256 is None:
        if _same_source(notes.base_model, base_model):
            return
    elif notes.base_sha256 == base_sha256:
        return
    if notes.base_model == base_model:
        raise UsageError(
            f"the adapter in {folder} was made on other weights of {base_model} than these "
            f"(another seed or version?): sha256 {notes.base_sha256} there, {base_sha256} here"
        )
    raise UsageError(
        f"the adapter in {folder} was made on {notes.base_model}, this model is {base_model}; "
        f"set model.model_name to {notes.base_model} to use it"
    )


def _same_source(theirs: str, ours: str) -> bool:
    if theirs == ours or theirs.startswith(RANDOM) or ours.startswith(RANDOM):
        return theirs == ours
    try:
        return source_of(theirs) == source_of(ours)
    except UsageError:  # a folder that is on another machine, or gone
        return False


def check_kind(
    folder: Path, theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None
) -> None:
    """Raise unless both are full models, or adapters that compute alike from tensors and ranks."""
    if theirs is None or ours is None:
        if theirs is not ours:
            kinds = ("a full model", "a LoRA adapter")
            there, here = (kinds[config is not None] for config in (theirs, ours))
            raise UsageError(
                f"{folder} holds {there}, this model trains {here}; change model.lora.enabled"
            )
        return
    if theirs.get("peft_type") != "LORA":
        raise UsageError(f"{folder} holds a {theirs.get('peft_type')} adapter, expected LORA")
    for key in ("use_rslora", "use_dora"):
        there_on, here_on = bool(theirs.get(key)), bool(ours.get(key))
        if there_on != here_on:
            raise UsageError(
                f"the adapter in {folder} has {key} {there_on}, the model {here_on}; "
                f"set model.lora.{key} to match"
            )


def check_classes(folder: Path, notes: AdapterNotes, class_names: Sequence[str]) -> None:
    """Raise when a trained head stands for other classes than the model's."""
    there = notes.class_names
    if notes.head == "linear" and there and class_names and there != tuple(class_names):
        raise UsageError(
            f"the trained head in {folder} is for the classes {', '.join(there)}; "
            f"the model's are {', '.join(class_names)}"
        )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return values
