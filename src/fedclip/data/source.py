"""A data set before decoding: where its images are, and what is known about each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedclip.data.picture_types import open_regular
from fedclip.data.rgb import open_rgb
from fedclip.errors import UsageError
from fedclip.files import readable

Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]


class ImageStore(Protocol):
    """Images by number: nothing is read before it is asked for."""

    def content(self, index: int) -> bytes:
        """The stored bytes of one image; what its identity in the cache is taken from."""

    def open(self, index: int) -> Image.Image:
        """One image, decoded, upright, RGB. Raises whatever the decoder raises."""

    def path_of(self, index: int) -> str:
        """How one image is named in messages."""


@dataclass(frozen=True)
class ArrayImages:
    """Images in one uint8 array, `[n, height, width]` or `[n, height, width, 3]`."""

    array: NDArray[np.uint8]
    name: str

    def content(self, index: int) -> bytes:
        """Bytes of one picture, its shape before them."""
        return repr(self.array.shape[1:]).encode() + self.array[index].tobytes()

    def open(self, index: int) -> Image.Image:
        """One picture as RGB."""
        return Image.fromarray(self.array[index]).convert("RGB")

    def path_of(self, index: int) -> str:
        """`digits/17`."""
        return f"{self.name}/{index}"


@dataclass(frozen=True)
class FileImages:
    """Images in files, by path relative to `root`."""

    root: Path
    paths: tuple[str, ...]

    def content(self, index: int) -> bytes:
        """The file as it is."""
        with open_regular(self.root / self.paths[index]) as file:
            return file.read()

    def open(self, index: int) -> Image.Image:
        """The file's picture (of an animation, the first)."""
        return open_rgb(self.root / self.paths[index])

    def path_of(self, index: int) -> str:
        """The file's whole path, bytes that are not UTF-8 written out."""
        return readable(self.root / self.paths[index])


@dataclass(frozen=True)
class ImageSource:
    """Images, not decoded, with their labels and what splits and sites the data set brings.

    All arrays have one entry per image. `sites` is -1 where an image belongs to no site;
    images of one group (variants of one drawing) must stay on one side of a split. `roles`, where
    given, say what each image is for in the place of the splits (`data.roles`). With `captioned`
    there are captions in the place of classes (`data.captions`). `passed_over` counts pictures
    that are not read, by site ('' without sites) and type.
    """

    name: str
    images: ImageStore
    labels: Labels
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    is_test: Mask | None = None
    is_validation: Mask | None = None
    groups: Labels | None = None
    sites: Labels | None = None
    site_names: tuple[str, ...] = ()
    roles: Labels | None = None
    captioned: bool = False
    passed_over: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def fingerprint(self, indices: Iterable[int]) -> str:
        """Hash of the named images' bytes, in that order.

        Bytes, not modification times: a cache keyed by times would go stale unseen after a copy
        that keeps them, and the same data would have another name on every machine. Reading and
        hashing cost a small part of what decoding the same files costs.
        """
        total = hashlib.sha256()
        for index in indices:
            try:
                digest = hashlib.blake2b(self.images.content(int(index)), digest_size=16).digest()
            except (OSError, ValueError):
                digest = b"unreadable".ljust(16)  # decoding will name the image and the reason
            total.update(digest)
        return total.hexdigest()


def path_below(roots: Sequence[Path], path: str, where: str) -> Path:
    """The file that a data set's cell names, which must be below the data set's own folder.

    A relative path starts from the first of `roots`. Links inside the folder are followed: they
    are its owner's. Raises `UsageError`, which begins with `where`.
    """
    named = Path(path)
    for root in roots:
        for base in (root.absolute(), root.resolve()):
            full = named if named.is_absolute() else base / named
            if ".." not in named.parts and "\0" not in path and full.is_relative_to(base):
                return full
    raise UsageError(
        f"data.path: {where}: {path!r} is not below the data set's own folder"
        + (f", {roots[0]}" if roots else "")
        + "; move the image there, and name it from there"
    )


def mask_or_none(mask: Any) -> Mask | None:
    """A mask of booleans, or None where it marks nothing."""
    array = np.asarray(mask, dtype=bool)
    return array if array.any() else None


def some(names: Iterable[str], limit: int = 12) -> str:
    """The first of some names, for a message, and how many there are more; sets are sorted."""
    listed = sorted(names) if isinstance(names, Set) else list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")
