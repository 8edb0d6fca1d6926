"""Folders of images: `<class>/*` or `<site>/<class>/*`, with `train` and `test` above if wanted."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedclip.data.class_names import one_class_by_name
from fedclip.data.picture_types import (
    BROKEN,
    SPECIAL,
    advice,
    in_words,
    readable_suffixes,
    unread_type,
)
from fedclip.data.prompts import PROMPTS
from fedclip.data.source import FileImages, ImageSource, mask_or_none, some
from fedclip.errors import FedclipWarning, UsageError
from fedclip.files import readable

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
}


@dataclass
class Tree:
    """What lies under one folder: images and folders, as tuples of names from there."""

    images: list[tuple[str, ...]] = field(default_factory=list)
    folders: list[tuple[str, ...]] = field(default_factory=list)
    passed: list[tuple[tuple[str, ...], str]] = field(default_factory=list)  # with their types

    def below(self, name: str) -> Tree:
        """The part under the folder `name`, as seen from there."""
        return Tree(
            [path[1:] for path in self.images if path[0] == name and len(path) > 1],
            [path[1:] for path in self.folders if path[0] == name and len(path) > 1],
            [(path[1:], kind) for path, kind in self.passed if path[0] == name and len(path) > 1],
        )

    @property
    def top(self) -> list[str]:
        """Names of the folders right below."""
        return [path[0] for path in self.folders if len(path) == 1]


def imagefolder(path: str | None = None, layout: str = "auto") -> ImageSource:
    """Images in folders; `data.layout` says whether the first level is the class or the site.

    `auto` decides from the depth: one level of folders is classes; two are sites with classes in
    them, provided that at least two sites share a class. Class indices come from the union over
    sites and splits, in sorted order. Hidden files and files that are no images are passed over.
    """
    if not path:
        raise UsageError("data.path: imagefolder needs the folder that holds the images")
    root = Path(path).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UsageError(f"data.path: {root} {what}; imagefolder needs <class>/* below it")
    tree = _walk(root)
    if not tree.images:
        only = in_words({"": Counter(kind for _, kind in tree.passed)})
        raise UsageError(
            f"data.path: no images below {root}"
            + (f", only {only}, which are not read" if only else "")
            + "; expected <class>/* or <site>/<class>/*, "
            f"files ending in {', '.join(sorted(readable_suffixes()))}"
        )
    source = _source(root, _splits(root, tree), layout)
    if source.passed_over:
        kinds = {kind for counts in source.passed_over.values() for kind in counts}
        warnings.warn(
            f"data.path: files below {root} that are not read: {in_words(source.passed_over)}; "
            f"{advice(kinds)}",
            FedclipWarning,
            stacklevel=2,
        )
    return source


def _check_name(folder: os.DirEntry[str]) -> None:
    """UsageError for a folder whose name, which is that of a class or site, is not UTF-8."""
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"data.path: the name of the folder {readable(folder.path)} is not UTF-8; rename it"
        ) from None


def _walk(root: Path) -> Tree:
    """Every image and folder, sorted by name, hidden ones left out, links followed once."""
    tree = Tree()
    suffixes = readable_suffixes()

    def visit(folder: str, names: tuple[str, ...], above: frozenset[str]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UsageError(f"data.path: cannot read {folder}: {error.strerror}") from error
        for entry in entries:
            here = (*names, entry.name)
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if os.path.isdir(entry.path):  # of a link in a circle `entry.is_dir` raises an error
                _check_name(entry)
                real = os.path.realpath(entry.path)
                if real not in above:  # a link to a folder above would never end
                    tree.folders.append(here)
                    visit(entry.path, here, above | {real})
            elif kind := unread_type(entry.name):
                tree.passed.append((here, kind))
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                if os.path.isfile(entry.path):
                    tree.images.append(here)
                else:
                    there = os.path.exists(entry.path)
                    tree.passed.append((here, SPECIAL if there else BROKEN))

    visit(str(root), (), frozenset({os.path.realpath(root)}))
    return tree


def _splits(root: Path, tree: Tree) -> dict[tuple[str, str], Tree]:
    """Trees by (split, its folder's name); a set without split folders is all `train`, ''."""
    kinds = {name: SPLITS.get(name.lower()) for name in tree.top}
    if "train" not in kinds.values():
        return {("train", ""): tree}
    others = [name for name, kind in kinds.items() if kind is None]
    if not others:
        loose = [path[0] for path in tree.images if len(path) == 1]
        if loose:
            raise UsageError(f"data.path: images outside any class folder in {root}: {some(loose)}")
        return {(str(kind), name): tree.below(name) for name, kind in kinds.items()}
    if set(kinds.values()) - {"train", None}:
        splits = [name for name, kind in kinds.items() if kind]
        raise UsageError(
            f"data.path: {root} mixes split folders ({some(splits)}) with others "
            f"({some(others)}); put all classes or sites under the split folders, or rename them"
        )
    return {("train", ""): tree}  # a class that is called train, among others


def _layout_of(where: Path, tree: Tree, layout: str) -> str:
    """`classes` or `sites`; UsageError that names the folders where it cannot be told."""
    depths: dict[int, list[tuple[str, ...]]] = {}
    for image in tree.images:
        depths.setdefault(len(image) - 1, []).append(image)
    needed = 2 if layout == "sites" else 1
    shallow = [
        image for depth, found in sorted(depths.items()) if depth < needed for image in found
    ]
    if shallow and (layout != "auto" or 0 in depths):
        want = "<class>/*"
        if layout == "sites":
            want = "<site>/<class>/*; where the folders are classes, set data.layout: classes"
        raise UsageError(
            f"data.path: images outside any class folder in {where}: "
            f"{some('/'.join(image) for image in shallow)}; expected {want}"
        )
    if layout != "auto":
        return layout
    if set(depths) == {1}:
        return "classes"
    if set(depths) != {2}:
        examples = "; ".join(
            f"{depth} deep: {some({'/'.join(image[:-1]) for image in found})}"
            for depth, found in sorted(depths.items())
        )
        raise UsageError(
            f"data.path: images in {where} lie at different or unexpected depths ({examples}); "
            "expected <class>/* or <site>/<class>/* throughout. Move them, or set data.layout to "
            "classes or sites: deeper folders then count as part of their class"
        )
    inner = [{image[1] for image in tree.images if image[0] == name} for name in tree.top]
    inner = [names for names in inner if names]
    seconds = set().union(*inner)
    if all(name.lower() in SPLITS for name in seconds):
        raise UsageError(
            f"data.path: in {where} the split folders ({some(seconds)}) lie inside the others "
            f"({some(tree.top)}); they belong on top: train/<class>/*, test/<class>/*"
        )
    if len(seconds) == sum(len(names) for names in inner):  # no name occurs twice
        raise UsageError(
            f"data.path: cannot tell sites from classes in {where}: the folders on top "
            f"({some(tree.top)}) share no folder name below them ({some(seconds)}). Set "
            "data.layout: sites if the top folders are sites, or data.layout: classes if they are "
            "classes"
        )
    return "sites"


def _split_layout(where: Path, tree: Tree, layout: str, trained: str) -> str:
    """The layout of one split, given that of the training split ('' for that one itself).

    Sites to train on may have a central test set without sites beside them.
    """
    depths = {len(image) - 1 for image in tree.images}
    if trained == "sites" and depths in ({1}, {2}):
        return "classes" if depths == {1} else "sites"
    if trained and layout == "auto" and depths != {1}:
        want = "<class>/*" if trained == "classes" else "<site>/<class>/*"
        raise UsageError(
            f"data.path: {where} should hold {want} as the training split does, but has images "
            f"in {some({'/'.join(image[:-1]) for image in tree.images})}"
        )
    return _layout_of(where, tree, trained or layout)


def _source(root: Path, splits: dict[tuple[str, str], Tree], layout: str) -> ImageSource:
    paths: list[str] = []
    rows: list[tuple[str, str | None, str]] = []  # class, site, split of each image
    classes: set[str] = set()
    sites: set[str] = set()
    passed: dict[str, Counter[str]] = {}
    trained = ""
    for (split, name), tree in sorted(splits.items(), key=lambda item: item[0][0] != "train"):
        if not tree.images:
            if split == "train":
                raise UsageError(f"data.path: no images below {root / name}")
            continue
        by_site = _split_layout(root / name, tree, layout, trained) == "sites"
        trained = trained or ("sites" if by_site else "classes")
        at = 1 if by_site else 0
        classes |= {path[at] for path in tree.folders if len(path) == at + 1}
        if by_site:
            sites |= set(tree.top)
        for path, kind in tree.passed:
            site = path[0] if by_site and len(path) > 1 else ""
            passed.setdefault(site, Counter())[kind] += 1
        for path in tree.images:
            paths.append("/".join((name, *path) if name else path))
            rows.append((path[at], path[0] if by_site else None, split))
    class_names, site_names = _in_order(classes), _in_order(sites)
    numbers, names = one_class_by_name(class_names, "data.path: class folders")
    class_index = dict(zip(class_names, numbers, strict=True))
    site_index = {name: i for i, name in enumerate(site_names)}
    return ImageSource(
        name="imagefolder",
        images=FileImages(root, tuple(paths)),
        labels=np.array([class_index[row[0]] for row in rows], dtype=np.int64),
        class_names=names,
        templates=PROMPTS["imagefolder"].templates,
        is_test=mask_or_none([row[2] == "test" for row in rows]),
        is_validation=mask_or_none([row[2] == "validation" for row in rows]),
        sites=np.array([site_index[row[1]] if row[1] else -1 for row in rows], dtype=np.int64)
        if site_names
        else None,
        site_names=tuple(site_names),
        passed_over=passed,
    )


def _in_order(names: set[str]) -> list[str]:
    """Sorted by name; by value where all are whole numbers, so that 2 comes before 10."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
