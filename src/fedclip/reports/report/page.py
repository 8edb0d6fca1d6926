"""A page as text: everything that is not markup of this package is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from fedclip.errors import harmless
from fedclip.reports.report.blocks import Section


def page(title: str, about: str, sections: Sequence[Section]) -> str:
    """A whole HTML page; sections without blocks are left out."""
    shown = [section for section in sections if section.blocks]
    return _template().render(title=title, about=about, sections=shown)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("fedclip.reports.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _printable(value: Any) -> Any:
    """Names without signs that turn the direction of a text or hide in it."""
    return harmless(value) if isinstance(value, str) and not isinstance(value, Markup) else value
