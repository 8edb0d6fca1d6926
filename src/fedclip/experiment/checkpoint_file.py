"""The checkpoint's file: tensors and facts with a digest over both, and the one before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip.errors import DamagedFile, UsageError
from fedclip.files import parse_json
from fedclip.models.tensor_files import read_tensors, tensor_bytes

if TYPE_CHECKING:
    import torch

FORMAT = 2
_DIGEST = "sha256"


def checkpoint_bytes(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> bytes:
    """A checkpoint file of tensors and JSON-able facts."""
    facts = {**facts, "format": FORMAT}
    return tensor_bytes(tensors, _text({**facts, _DIGEST: _digest(tensors, facts)}))


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint's tensors and facts.

    Raises `DamagedFile` where its bytes are not those that were written, and a plain `UsageError`
    where another version or another program wrote them: then an older file is no help.
    """
    tensors, metadata = read_tensors(path)
    try:
        facts = parse_json(metadata.get("meta", ""), "its metadata")
    except UsageError as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None
    if not isinstance(facts, dict):
        raise UsageError(f"{path} is no checkpoint: its facts must be an object, got {facts!r}")
    as_written = metadata["meta"] == _text(facts)
    if _DIGEST not in facts and not as_written:
        raise UsageError(
            f"{path} was written by an older version of fedclip, whose checkpoints do not say what "
            "they belong to; finish the run with that version, or start a new one"
        )
    if not as_written:
        raise UsageError(
            f"{path} was rewritten by another program since fedclip saved it; put the file back "
            "as it was, or remove it to go on from the checkpoint before"
        )
    written = facts.pop(_DIGEST, None)
    if written != _digest(tensors, facts):
        raise DamagedFile(f"{path} is damaged: its contents do not have the digest {written}")
    if facts.pop("format", None) != FORMAT:
        raise UsageError(
            f"{path} was written by another version of fedclip; finish the run with that version, "
            "or start a new one"
        )
    return tensors, facts


def _text(facts: Mapping[str, Any]) -> str:
    """Facts in the one form that fedclip writes."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _digest(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> str:
    """SHA-256 over the facts, and over the tensors' names, types, shapes and bytes."""
    from fedclip.models.state import adapter_sha256

    return hashlib.sha256(f"{_text(facts)}\n{adapter_sha256(tensors)}".encode()).hexdigest()
