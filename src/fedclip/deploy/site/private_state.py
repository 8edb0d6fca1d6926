"""A site's local state between rounds: personalised factors and int8 error feedback.

Kept by round, so that a round which a killed coordinator asks for again starts where it did before.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedclip import files
from fedclip.errors import UsageError
from fedclip.models.state import adapter_sha256
from fedclip.models.tensor_files import read_tensors, tensor_bytes
from fedclip.records import State

if TYPE_CHECKING:
    import torch

ROUNDS_KEPT = 3
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class PrivateState:
    """The files of one run and one purpose, `<folder>/<run>/<purpose>/<round>.safetensors`."""

    def __init__(self, folder: Path, run: str, purpose: str, say: Callable[[str], None]) -> None:
        """`say` hears of files that are damaged."""
        self._folder = folder / _file_name(run) / _file_name(purpose)
        self._say = say

    def before(self, server_round: int) -> dict[str, torch.Tensor]:
        """What was kept after the last round before this one; empty if there was none.

        Of a round whose file is damaged, what was kept before it.
        """
        rounds = [number for number in self._rounds() if number < server_round]
        for number in reversed(rounds):
            path = self._file(number)
            try:
                tensors, metadata = read_tensors(path)
            except UsageError as error:
                self._say(f"{error}; going on from what was kept before it")
                continue
            if not metadata or metadata == {"meta": adapter_sha256(tensors)}:
                return tensors  # an older version wrote no digest
            self._say(f"{path} does not have its digest; going on from what was kept before it")
        return {}

    def save(self, server_round: int, tensors: State) -> None:
        """Keeps tensors as those after this round, and drops what is older than a few rounds."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = tensor_bytes(tensors, adapter_sha256(tensors))
        files.replace_file(self._file(server_round), data, mode=0o600)
        for number in self._rounds():
            if number > server_round or number <= server_round - ROUNDS_KEPT:
                self._file(number).unlink(missing_ok=True)

    def _file(self, server_round: int) -> Path:
        return self._folder / f"{server_round}.safetensors"

    def _rounds(self) -> list[int]:
        found = self._folder.glob("*.safetensors") if self._folder.is_dir() else ()
        return sorted(int(path.stem) for path in found if path.stem.isdecimal())


def drop_other_runs(folder: Path, run: str, keep: int = 5) -> None:
    """Removes the state of all but this run and the last few."""
    if not folder.is_dir():
        return
    others = [path for path in folder.iterdir() if path.is_dir() and path.name != _file_name(run)]
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[: -keep or None]:
        shutil.rmtree(path, ignore_errors=True)


def _file_name(text: str) -> str:
    """The text where it can be a file's name, else a digest: it comes from another machine."""
    return text if _PLAIN.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:16]
