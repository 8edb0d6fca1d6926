"""Safetensors files: read with one error for whatever is wrong, written from any tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedclip.errors import DamagedFile, UsageError

if TYPE_CHECKING:
    import torch


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all tensors of a file, and its metadata.

    Raises `UsageError` where there is no such file, and `DamagedFile` where it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            # Clones, because what is read may lie in a file mapping that a new save replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RuntimeError,
        AttributeError,  # a type of number that torch does not have
    ) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None


def tensor_bytes(tensors: Mapping[str, torch.Tensor], metadata: str) -> bytes:
    """A safetensors file; equal tensors give equal bytes, however they lie in memory.

    The metadata is one entry, `meta`: several would come in an order that differs from process to
    process.
    """
    from safetensors.torch import save

    return save(_owned(tensors), metadata={"meta": metadata})


def _owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the CPU that share no memory, as safetensors wants them."""
    owned: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != flat.nbytes
        owned[name] = flat.clone() if shared else flat
        seen.add(storage.data_ptr())
    return owned
