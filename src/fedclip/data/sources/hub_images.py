"""Images of a table that `datasets` has opened, and where files that it names may be."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from fedclip.data.rgb import open_rgb
from fedclip.data.source import path_below
from fedclip.files import open_regular


@dataclass(frozen=True)
class HubImages:
    """Images of an Arrow table, encoded; rows by their number in the concatenated splits.

    A cell may hold a file's path in the place of its bytes, which must lie below one of `roots`.
    """

    table: Any
    column: str
    name: str
    roots: tuple[Path, ...]

    def _cell(self, index: int) -> dict[str, Any]:
        return self.table[int(index)][self.column] or {}

    def content(self, index: int) -> bytes:
        """The encoded image."""
        cell = self._cell(index)
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if cell.get("path"):
            where = f"{self.name}, row {index}"
            with open_regular(path_below(self.roots, cell["path"], where)) as file:
                return file.read()
        raise ValueError("the data set has no image here")

    def open(self, index: int) -> Image.Image:
        """One image, decoded."""
        return open_rgb(BytesIO(self.content(index)))

    def path_of(self, index: int) -> str:
        """`user/name[17]`, with the file's name where the data set keeps it."""
        path = self._cell(index).get("path")
        return f"{self.name}[{index}]{f' {path}' if path else ''}"


def roots_of(name: str) -> tuple[Path, ...]:
    """Where a data set's files may be: its folder, or the hub's caches for one of the hub."""
    local = Path(name).expanduser()
    if local.exists():
        return (local if local.is_dir() else local.parent,)
    if local.suffix == ".tar":
        return ()  # all in the shards
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
