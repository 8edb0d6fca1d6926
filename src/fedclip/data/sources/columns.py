"""Which columns of a table hold images, labels and captions."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedclip.errors import UsageError

LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
CAPTION_NAMES = ("caption", "captions", "text", "txt")


class Table(NamedTuple):
    """How messages call a table, and how a column is chosen there, `{}` for `image` or `label`."""

    name: str
    key: str
    choose: str

    @property
    def told(self) -> str:
        """The key to blame, and the table's name."""
        return f"{self.key}: {self.name}"


def image_column(table: Table, features: Any, asked: str | None) -> str:
    """The column of images: the one asked for, a usual name, or the only one."""
    import datasets

    found = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    if asked is not None:
        if asked not in found:
            raise UsageError(
                f"{table.key}: {asked!r} is no image column of {table.name}: {listed(features)}"
            )
        return asked
    preferred = [column for column in ("image", "img") if column in found]
    if preferred or len(found) == 1:
        return (preferred or found)[0]
    problem = "several image columns" if found else "no image column"
    raise UsageError(
        f"{table.told} has {problem}; its columns: {listed(features)}; "
        f"{table.choose.format('image')}"
    )


def label_column(table: Table, features: Any, asked: str | None) -> str:
    """The column of labels: the one asked for, a usual name, or the only ClassLabel."""
    import datasets

    if asked is not None:
        if asked not in features:
            raise UsageError(f"{table.told} has no column {asked!r}: {listed(features)}")
        return asked
    found = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    preferred = [column for column in LABEL_NAMES if column in found]
    if preferred or len(found) == 1:
        return (preferred or found)[0]
    plain = [column for column in LABEL_NAMES if column in features]
    if not found and plain:
        return plain[0]
    problem = "several label columns" if found else "no label column (ClassLabel)"
    raise UsageError(
        f"{table.told} has {problem}; its columns: {listed(features)}; "
        f"{table.choose.format('label')}"
    )


def caption_column(table: Table, features: Any, options: dict[str, str]) -> str | None:
    """The column of captions: the one asked for, or one of a usual name where no labels are."""
    import datasets

    asked = options.get("caption")
    if asked is not None and asked not in features:
        raise UsageError(f"{table.told} has no column {asked!r}: {listed(features)}")
    if asked is not None or "label" in options:
        return asked
    labelled = any(isinstance(kind, datasets.ClassLabel) for kind in features.values())
    if labelled or any(column in features for column in LABEL_NAMES):
        return None
    return next((column for column in CAPTION_NAMES if column in features), None)


def listed(features: Any) -> str:
    """Columns and their types, in words."""
    return ", ".join(f"{column} ({type(kind).__name__})" for column, kind in features.items())
