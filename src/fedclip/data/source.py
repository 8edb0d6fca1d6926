"""A data set before decoding: where its images are, and what is known about each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedclip.data.rgb import open_rgb
from fedclip.errors import UsageError
from fedclip.files import open_regular, readable

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
class SomeImages:
    """Some of the images of another store, by their numbers there."""

    all: ImageStore
    rows: Labels

    def content(self, index: int) -> bytes:
        """As in the whole store."""
        return self.all.content(int(self.rows[index]))

    def open(self, index: int) -> Image.Image:
        """As in the whole store."""
        return self.all.open(int(self.rows[index]))

    def path_of(self, index: int) -> str:
        """As in the whole store."""
        return self.all.path_of(int(self.rows[index]))


@dataclass(frozen=True)
class ImageSource:
    """Images, not decoded, with their labels and what splits and sites the data set brings.

    All arrays have one entry per image. `sites` is -1 where an image belongs to no site;
    images of one group (variants of one drawing) must stay on one side of a split. `roles`, where
    given, say what each image is for in the place of the splits (`data.roles`). With `captioned`
    there are captions in the place of classes (`data.captions`). `passed_over` counts pictures
    that are not read, by site ('' without sites) and type. `rows` are the images' numbers in the
    data set as it comes, where some of it was left out.
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
    rows: Labels | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def only(self, rows: Labels) -> ImageSource:
        """The same data set with some of its images."""
        arrays = ("labels", "is_test", "is_validation", "groups", "sites", "roles")
        kept = {name: getattr(self, name) for name in arrays}
        picked: dict[str, Any] = {n: None if own is None else own[rows] for n, own in kept.items()}
        for name in ("is_test", "is_validation"):
            picked[name] = None if picked[name] is None else mask_or_none(picked[name])
        numbers = rows if self.rows is None else self.rows[rows]
        return replace(self, images=SomeImages(self.images, rows), rows=numbers, **picked)

    def digests(self, indices: Iterable[int]) -> list[bytes]:
        """Hash of each of the named images' bytes, in that order.

        Bytes, not modification times: a cache keyed by times would go stale unseen after a copy
        that keeps them, and the same data would have another name on every machine. Reading and
        hashing cost a small part of what decoding the same files costs.
        """
        found = []
        for index in indices:
            try:
                digest = hashlib.blake2b(self.images.content(int(index)), digest_size=16).digest()
            except (OSError, ValueError):
                digest = b"unreadable".ljust(16)  # decoding will name the image and the reason
            found.append(digest)
        return found

    def fingerprint(self, indices: Iterable[int]) -> str:
        """Hash of all the named images' bytes, in that order."""
        return fingerprint_of(self.digests(indices))

    def places(self, indices: Labels) -> tuple[str | int, ...]:
        """Where other programs find these images: paths in the folder, else the row numbers."""
        if isinstance(self.images, FileImages) and not self.captioned:
            return tuple(readable(self.images.paths[i]) for i in indices)
        return tuple((indices if self.rows is None else self.rows[indices]).tolist())


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """One hash of the images' hashes."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def path_below(roots: Sequence[Path], path: str, where: str) -> Path:
    """The file that a data set names, which must be below the data set's folder.

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
        + "; move the file there, and name it from there"
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
