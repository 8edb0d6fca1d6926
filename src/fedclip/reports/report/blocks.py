"""The pieces of a page, as `page.html` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """A cell of a table: `shade` colours it by a share of 0 to 1, `bar` is a bar of that length.

    `start` is where the bar begins; a `low` one shows a loss.
    """

    text: str
    shade: float | None = None
    bar: float | None = None
    start: float = 0.0
    low: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Facts:
    """Names and values; `tiles` are large."""

    pairs: Sequence[tuple[str, str]]
    kind: Literal["facts", "tiles"] = "facts"


@dataclass(frozen=True)
class Charts:
    """Charts as SVG, side by side where there is room; each tells its title to screen readers."""

    charts: Sequence[Markup]
    kind: Literal["charts"] = "charts"


@dataclass(frozen=True)
class Picture:
    """An image with what it is, what was said of it, and where it lies in the data set."""

    source: str
    true: str
    predicted: str
    confidence: str
    right: bool
    place: str = ""


@dataclass(frozen=True)
class Pictures:
    """A row of images."""

    caption: str
    pictures: Sequence[Picture]
    kind: Literal["pictures"] = "pictures"


@dataclass(frozen=True)
class Text:
    """A paragraph, or with a `title` a text to be unfolded, as it was typed."""

    text: str
    title: str = ""
    kind: Literal["text"] = "text"


Block = Table | Facts | Charts | Pictures | Text


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading."""

    title: str
    blocks: Sequence[Block]
