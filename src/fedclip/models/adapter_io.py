"""Save a model's adapter as a folder, and load one into a model that it fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedclip.errors import UsageError
from fedclip.models import change_rank
from fedclip.models.adapter_folder import (
    check_base,
    check_classes,
    check_kind,
    read_adapter,
    write_adapter,
)
from fedclip.models.adapter_notes import AdapterNotes
from fedclip.models.lora_settings import LayerPlan
from fedclip.models.peft_lora import base_parameters, lora_layers, plan_of
from fedclip.models.protocols import AdapterHost
from fedclip.models.state import adapter_sha256, checked_state


def save_adapter(model: AdapterHost, folder: Path) -> None:
    """Write a model's trainable tensors as an adapter folder."""
    notes = AdapterNotes(
        base_model=model.base_name,
        base_sha256=_frozen_sha256(model),
        head=model.head,
        class_names=model.class_names,
        templates=model.templates,
        own_ranks=model.kind.own_ranks,
        trained=model.kind.name,
    )
    write_adapter(folder, model.get_parameters(), notes, model.kind.config(model.network))


def load_adapter(model: AdapterHost, folder: Path) -> None:
    """Check a folder against a model, and only then put its tensors (and classes) in.

    An adapter that brings its own ranks gives them to the model.
    """
    tensors, notes, theirs = read_adapter(folder)
    check_kind(folder, notes, theirs, model.kind, model.kind.config(model.network))
    plans = _new_plans(model, folder, theirs, notes) if theirs else None
    check_base(folder, notes, base_model=model.base_name, base_sha256=_frozen_sha256(model))
    check_classes(folder, notes, model.class_names)
    expected = change_rank.shapes_of(plans, model.trainable()) if plans else model.trainable()
    state = checked_state(tensors, expected, source=f"the adapter in {folder}")
    if notes.class_names and not model.class_names:
        model.set_classes(notes.class_names, notes.templates or None)
    if plans and theirs:
        model.adopt_ranks(theirs, state)
    model.set_parameters(state)


def _new_plans(
    model: AdapterHost, folder: Path, theirs: Mapping[str, Any], notes: AdapterNotes
) -> dict[str, LayerPlan] | None:
    """Ranks and scales that the adapter brings along; None where it has the model's."""
    now = {path: plan_of(layer) for path, layer in lora_layers(model.network).items()}
    plans = change_rank.told_plans(theirs, now, f"the adapter in {folder}")
    if plans == now:
        return None
    if not change_rank.brings_own_ranks(theirs, notes.own_ranks):
        raise UsageError(f"the adapter in {folder} {_other_ranks(plans, now)}")
    return plans


def _other_ranks(theirs: Mapping[str, LayerPlan], ours: Mapping[str, LayerPlan]) -> str:
    layer = next(layer for layer, plan in ours.items() if plan != theirs[layer])
    there, here = theirs[layer], ours[layer]
    key, word = ("r", "rank") if there.r != here.r else ("lora_alpha", "lora_alpha")
    one, other = getattr(there, key), getattr(here, key)
    return f"has {word} {one:g}, the model {word} {other:g}; set model.lora.{key} to match"


def _frozen_sha256(model: AdapterHost) -> str | None:
    """Digest of the weights that training leaves alone; None where it leaves none alone."""
    frozen = {n: p for n, p in base_parameters(model.network).items() if not p.requires_grad}
    with model.unmerged():
        return adapter_sha256(frozen) if frozen else None
