"""`fedclip.json` beside an adapter: what it says, checked field by field, and its digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedclip.errors import DamagedFile, UsageError, first_fault
from fedclip.models.protocols import Trainable
from fedclip.models.state import adapter_sha256
from fedclip.models.trainable import KINDS

_DIGEST = "notes_sha256"


@dataclass(frozen=True)
class AdapterNotes:
    """What `fedclip.json` says about an adapter, besides PEFT's configuration.

    `trained` is the kind of what was trained, a name in `fedclip.models.trainable.KINDS`.
    `base_sha256` is the digest of the frozen weights that the tensors belong to. `own_ranks`:
    the ranks are not those of a configuration, but come of `set_rank`, stacking or merging.
    """

    base_model: str
    base_sha256: str | None
    head: str | None
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    own_ranks: bool = False
    trained: str = "lora"

    @property
    def kind(self) -> type[Trainable]:
        """What was trained."""
        return KINDS[self.trained]


class _Notes(BaseModel):
    """The file's fields; all may be missing in a folder that an older version wrote."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    base_model: str | None = Field(None, min_length=1)
    base_sha256: str | None = None
    head: Literal["text", "linear"] | None = None
    class_names: list[str] = []
    templates: list[str] = []
    own_ranks: bool = False
    trained: str | None = None
    adapter_sha256: str | None = None
    config_sha256: str | None = None
    notes_sha256: str | None = None


def written_notes(
    notes: AdapterNotes, state: Mapping[str, torch.Tensor], peft_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What `fedclip.json` holds: the notes, and digests of tensors, configuration and itself."""
    about: dict[str, Any] = {
        "base_model": notes.base_model,
        "base_sha256": notes.base_sha256,
        "head": notes.head,
        "class_names": list(notes.class_names),
        "templates": list(notes.templates),
        "adapter_sha256": adapter_sha256(state),
    }
    if peft_config is not None:
        about["config_sha256"] = _json_sha256(peft_config)
    if notes.own_ranks:
        about["own_ranks"] = True
    if notes.kind.weights is None:  # no file would tell
        about["trained"] = notes.trained
    return about | {_DIGEST: _json_sha256(about)}


def read_notes(
    folder: Path,
    about: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    peft_config: Mapping[str, Any] | None,
) -> AdapterNotes:
    """The notes of a folder, whose digests fit wherever they stand; raises `UsageError` if not."""
    try:
        found = _Notes.model_validate(about)
    except ValidationError as error:
        raise UsageError(
            f"the adapter in {folder}: fedclip.json: {first_fault(error)}; put the file back as "
            "fedclip wrote it"
        ) from None
    own = {key: value for key, value in about.items() if key != _DIGEST}
    if found.config_sha256 is not None and found.notes_sha256 is None:  # written together
        found = found.model_copy(update={"notes_sha256": "none"})
    for name, told, there in (
        ("fedclip.json", found.notes_sha256, lambda: _json_sha256(own)),
        ("adapter_config.json", found.config_sha256, lambda: _json_sha256(peft_config)),
        ("its tensors", found.adapter_sha256, lambda: adapter_sha256(state)),
    ):
        if told is not None and told != there():
            raise DamagedFile(
                f"the adapter in {folder} is damaged: {name} changed since the digest in "
                "fedclip.json was written; copy the folder again (if you changed it on purpose, "
                "remove fedclip.json: a plain PEFT adapter is read as well)"
            )
    return AdapterNotes(
        base_model=str(found.base_model or (peft_config or {}).get("base_model_name_or_path")),
        base_sha256=found.base_sha256,
        head=found.head,
        class_names=tuple(found.class_names),
        templates=tuple(found.templates),
        own_ranks=found.own_ranks,
    )


def _json_sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
