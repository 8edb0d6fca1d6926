"""Model inputs by example index: pixels, or what the frozen layers make of them, kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedclip.errors import FedclipError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 64


class PixelInputs:
    """Pixels as they are, uint8 `[rows, 3, size, size]`."""

    def __init__(self, pixels: NDArray[np.uint8], device: torch.device) -> None:
        self._pixels = pixels
        self._device = device

    @cached_property
    def source(self) -> torch.Tensor | None:
        """All of them on a GPU, once, where they take at most a quarter of its free memory."""
        if self._device.type != "cuda":
            return None
        if self._pixels.nbytes > torch.cuda.mem_get_info(self._device)[0] / 4:
            return None
        whole = torch.empty(self._pixels.shape, dtype=torch.uint8, device=self._device)
        for start in range(0, len(whole), CHUNK):
            chunk = self._pixels[start : start + CHUNK].copy()  # which torch may write to
            whole[start : start + CHUNK] = torch.from_numpy(chunk)
        return whole

    def prepare(self, indices: NDArray[np.int64]) -> None:
        """Nothing to do."""

    def take(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Pixels of these examples, on the device."""
        return torch.from_numpy(self._pixels[indices]).to(self._device)


class FrozenInputs:
    """What a frozen prefix makes of each image, computed once and kept across epochs and rounds.

    Examples that are prepared together are computed in chunks of fixed composition. So the values,
    which depend on a chunk's composition by rounding, do not depend on when that happens: a run
    that was killed and resumed trains on the same bytes.
    """

    def __init__(
        self,
        frozen: Callable[[torch.Tensor], torch.Tensor],
        pixels: NDArray[np.uint8],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
    ) -> None:
        """`frozen` maps pixels `[rows, 3, size, size]` to `[rows, ...]`.

        They are kept as `dtype` on the device, or with `folder` in a memory-mapped file there,
        which vanishes with the process.
        """
        self._frozen = frozen
        self._inputs = PixelInputs(pixels, device)
        self._device = device
        self._known = np.zeros(len(pixels), dtype=bool)
        row = frozen(self._inputs.take(np.zeros(1, dtype=np.int64)))[0]
        shape = (len(pixels), *row.shape)
        if folder is None:
            # Pages that are never written take no memory.
            self._kept = torch.empty(shape, dtype=dtype, device=device)
        else:
            self._kept = _mapped(shape, dtype, folder)

    def prepare(self, indices: NDArray[np.int64]) -> None:
        """Computes what is not known yet, in the order given."""
        missing = indices[~self._known[indices]]
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            made = self._frozen(self._inputs.take(chunk)).to(self._kept)
            self._kept[torch.from_numpy(chunk).to(self._kept.device)] = made
        self._known[missing] = True

    @property
    def source(self) -> torch.Tensor | None:
        """What is kept of all examples, if it is kept on the device."""
        return self._kept if self._kept.device.type == self._device.type else None

    def take(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """The frozen layers' output for prepared examples, on the device."""
        where = torch.from_numpy(indices).to(self._kept.device)
        return self._kept[where].to(self._device)


def frozen_numbers(
    frozen: Callable[[torch.Tensor], torch.Tensor], image_size: int, device: torch.device
) -> int:
    """Numbers that the frozen prefix makes of one image."""
    blank = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
    return frozen(blank)[0].numel()


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    numbers = int(np.prod(shape))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".frozen-") as file:
            # The mapping outlives the name: a killed process leaves nothing behind.
            file.truncate(numbers * dtype.itemsize)
            flat = torch.from_file(file.name, shared=True, size=numbers, dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise FedclipError(
            f"cannot write the cache of frozen activations in {folder}: {error}; free some space, "
            "point FEDCLIP_CACHE at another disk, or set engine.prefix_cache: off"
        ) from error
    return flat.view(shape)
