"""Files that a data set on disk names: only those below its folder are opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedclip.data.source import path_below
from fedclip.errors import UsageError
from fedclip.files import read_json


def check_named_files(folder: Path, config: Any) -> None:
    """Refuse a folder whose README names data files elsewhere, on this machine or another."""
    if not (folder / "README.md").is_file():
        return  # then all files were found in the folder
    files: dict[str, Iterable[Any]] = config.data_files or {}
    for split, paths in files.items():
        for path in paths:
            path_below((folder,), str(path), f"{folder / 'README.md'}, data_files of {split}")


def check_saved_files(folder: Path) -> None:
    """Refuse a `save_to_disk` folder that names tables elsewhere."""
    for part in _parts(folder):
        state = part / "state.json"
        for entry in read_json(state).get("_data_files") or ():
            name = entry.get("filename") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                raise UsageError(f"{state} is damaged: _data_files must name files, got {entry!r}")
            path_below((part,), name, str(state))


def _parts(folder: Path) -> Iterator[Path]:
    """The folders of the splits, or the folder itself."""
    listed = folder / "dataset_dict.json"
    if not listed.is_file():
        yield folder
        return
    for split in read_json(listed).get("splits") or ():
        yield path_below((folder,), str(split), str(listed))
