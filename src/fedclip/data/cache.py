"""Decoded pixels on disk: written whole or not at all, reused by later runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedclip.errors import FedclipError, FedclipWarning, UsageError
from fedclip.files import file_sha256, open_regular, parse_json, read_json

Chunk = tuple[NDArray[np.uint8], list[tuple[int, str]]]

PIXELS, BAD, DIGESTS = "pixels.npy", "bad.json", "digests.json"
_STALE_SECONDS = 2 * 24 * 3600


def cache_folder() -> Path:
    """`FEDCLIP_CACHE`, or fedclip's folder among the platform's caches."""
    named = os.environ.get("FEDCLIP_CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fedclip"


class PixelCache:
    """One decoded array: a folder `pixels-<key>` of `pixels.npy`, `bad.json` and `digests.json`.

    Whoever opens it compares the digests first. That reads the pixels once, which costs about what
    hashing the images for the key has cost already, and leaves them in the system's page cache. A
    folder that is damaged, or of a version without digests, is made anew. It is made under another
    name and renamed when it is complete, so that a killed run leaves no half of it and of two
    processes that make the same one, the first wins.
    """

    def __init__(self, content_key: str, pixels_key: str) -> None:
        """Name the place; nothing is read or written yet."""
        key = hashlib.sha256(f"1/{content_key}/{pixels_key}".encode()).hexdigest()[:32]
        self.folder = cache_folder() / f"pixels-{key}"

    def load_or_make(
        self, shape: tuple[int, ...], chunks: Callable[[], Iterator[Chunk]]
    ) -> tuple[NDArray[np.uint8], list[tuple[int, str]]]:
        """The pixels as a read-only memory map, and the bad images, decoded at most once."""
        found = self._load(shape)
        if found is None:
            if self.folder.exists():
                warnings.warn(
                    f"the cache of decoded images in {self.folder} is damaged, or of an older "
                    "version: its images are decoded again",
                    FedclipWarning,
                    stacklevel=2,
                )
            try:
                self._make(shape, chunks)
            except OSError as error:
                raise FedclipError(
                    f"cannot write the cache of decoded images, {self.folder}: {error}; it needs "
                    f"{np.prod(shape) / 1e9:.1f} GB: free some space, point FEDCLIP_CACHE at "
                    "another disk, or raise data.memory_gb"
                ) from error
            found = self._load(shape)
        if found is None:
            raise FedclipError(f"the cache of decoded images vanished while in use: {self.folder}")
        return found

    def _load(
        self, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.uint8], list[tuple[int, str]]] | None:
        try:
            told = read_json(self.folder / DIGESTS)
            if told != {name: file_sha256(self.folder / name) for name in (PIXELS, BAD)}:
                return None
            pixels = np.load(self.folder / PIXELS, mmap_mode="r", allow_pickle=False)
            with open_regular(self.folder / BAD) as file:
                bad = [(place, str(reason)) for place, reason in parse_json(file.read(), BAD)]
            if pixels.shape != shape or pixels.dtype != np.uint8:
                return None
            known = all(type(at) is int and 0 <= at < len(pixels) for at, _ in bad)
            return (pixels, bad) if known else None
        except (OSError, ValueError, EOFError, TypeError, UsageError):
            return None

    def _make(self, shape: tuple[int, ...], chunks: Callable[[], Iterator[Chunk]]) -> None:
        parent = self.folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        self._sweep(parent)
        work = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=parent))
        try:
            bad: list[tuple[int, str]] = []
            # Plain writes: a memory map on a full disk ends the process instead of failing.
            with (work / PIXELS).open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                digest = hashlib.sha256((work / PIXELS).read_bytes())
                for rows, found in chunks():
                    data = rows.tobytes()
                    digest.update(data)
                    file.write(data)
                    bad += found
                file.flush()
                os.fsync(file.fileno())
            (work / BAD).write_text(json.dumps(bad), encoding="utf-8")
            digests = {PIXELS: digest.hexdigest(), BAD: file_sha256(work / BAD)}
            (work / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
            try:
                work.rename(self.folder)
            except OSError:
                if self._load(shape) is None:  # what stands there is damaged: replace it
                    shutil.rmtree(self.folder)
                    work.rename(self.folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    @staticmethod
    def _sweep(parent: Path) -> None:
        """Remove what runs killed days ago left half done."""
        for left in parent.glob(".pixels-*"):
            try:
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
            except FileNotFoundError:
                continue
