"""What is trained, on disk: a PEFT folder (with LoRA), the head beside it, and fedclip's notes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedclip.errors import DamagedFile, UsageError
from fedclip.files import read_json
from fedclip.models.adapter_card import adapter_card
from fedclip.models.adapter_notes import AdapterNotes, read_notes, written_notes
from fedclip.models.peft_config import check_peft_config
from fedclip.models.pretrained import RANDOM, source_of
from fedclip.models.protocols import Trainable
from fedclip.models.tensor_files import read_tensors
from fedclip.models.trainable import KINDS
from fedclip.models.whole_folder import write_folder

CONFIG = "adapter_config.json"
HEAD = "head.safetensors"
NOTES = "fedclip.json"
CARD = "README.md"
STATEMENT = "statement.json"
"""What a federation's coordinator has signed (`deploy.log.statement`)."""
_WEIGHTS = tuple(kind.weights for kind in KINDS.values() if kind.weights)
FILES = (CONFIG, *_WEIGHTS, HEAD, NOTES, CARD, STATEMENT)
_HEAD_PREFIX = "head."
_METADATA = {"format": "pt"}


def write_adapter(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    notes: AdapterNotes,
    peft_config: Mapping[str, Any] | None,
) -> None:
    """Write an adapter folder, whole or not at all; equal adapters give equal bytes.

    `peft_config` is None for what PEFT does not read. Tensors go to the file of the kind that was
    trained, those of the head to `head.safetensors`.
    """
    head = {name: tensor for name, tensor in state.items() if name.startswith(_HEAD_PREFIX)}
    body = {name: tensor for name, tensor in state.items() if name not in head}
    weights, about = notes.kind.weights, written_notes(notes, state, peft_config)

    def write(fresh: Path) -> None:
        if peft_config is not None:
            _write_json(fresh / CONFIG, peft_config)
        if weights is not None:
            save_file(body, fresh / weights, _METADATA)
        if head:
            save_file(head, fresh / HEAD, _METADATA)
        _write_json(fresh / NOTES, about)
        card = adapter_card(
            notes.kind,
            base_model=notes.base_model,
            head=notes.head,
            class_names=notes.class_names,
            templates=notes.templates,
        )
        (fresh / CARD).write_text(card, encoding="utf-8")

    write_folder(folder, FILES, write)


def read_adapter(
    folder: Path,
) -> tuple[dict[str, torch.Tensor], AdapterNotes, dict[str, Any] | None]:
    """Read tensors, notes and PEFT configuration (None where there is none) of a folder.

    A plain PEFT adapter, without fedclip's notes, is read as well, if all of its settings are
    understood (`fedclip.models.peft_config`).
    """
    about = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    kind = _kind_in(folder, about)
    names = [name for name in (kind.weights, HEAD) if name and (folder / name).is_file()]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        found, metadata = read_tensors(folder / name)
        tensors |= found
        if "adapter_sha256" in about and metadata not in ({}, _METADATA):
            raise DamagedFile(f"{folder / name} is damaged: its metadata is {metadata}")
    config = read_json(folder / CONFIG) if kind.peft_format else None
    if config is not None:
        check_peft_config(config, str(folder))
    notes = replace(read_notes(folder, about, tensors, config), trained=kind.name)
    return tensors, notes, config


def _kind_in(folder: Path, about: Mapping[str, Any]) -> type[Trainable]:
    """The kind whose file is in a folder; without any, that which the notes name."""
    for kind in KINDS.values():
        if kind.weights and (folder / kind.weights).is_file():
            return kind
    told = [kind for kind in KINDS.values() if kind.name == about.get("trained")]
    if told and told[0].weights is None and (folder / HEAD).is_file():
        return told[0]
    raise UsageError(
        f"{folder} holds no adapter: there is none of {', '.join(_WEIGHTS)} in it, nor {HEAD} "
        f"with a {NOTES} that says that nothing else was trained"
    )


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
    folder: Path,
    notes: AdapterNotes,
    theirs: Mapping[str, Any] | None,
    kind: Trainable,
    ours: Mapping[str, Any] | None,
) -> None:
    """Raise unless a folder's kind is the model's, and of adapters, both compute alike."""
    if notes.trained != kind.name:
        raise UsageError(
            f"{folder} holds {notes.kind.title}, this model trains {kind.title}; what is trained "
            f"follows from the configuration, here {notes.kind.asked_by}"
        )
    if theirs is None or ours is None:
        return
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
