"""The ready configurations and grids that come with fedclip, in a checkout or a wheel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedclip.errors import UsageError

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "ready", _PACKAGE.parents[1] / "configs")  # of a wheel, of a checkout
GRIDS = "bench"


@dataclass(frozen=True)
class Ready:
    """A file: `name` as in `quickstart` or `bench/ranks`, and what its first comment says."""

    name: str
    path: Path
    about: str


def ready() -> list[Ready]:
    """All ready configurations, then the grids, by name."""
    root = folder()
    found = [*sorted(root.glob("*.yaml")), *sorted((root / GRIDS).glob("*.yaml"))]
    return [
        Ready(path.relative_to(root).with_suffix("").as_posix(), path, _about(path))
        for path in found
    ]


def folder() -> Path:
    """The folder that they are in."""
    for place in _PLACES:
        if (place / "quickstart.yaml").is_file():
            return place
    raise UsageError("this installation of fedclip has lost its ready configurations")


def ready_named(name: str) -> Ready:
    """The one of a name, with or without `configs/` and `.yaml`; UsageError for any other."""
    found = of_name(name)
    if found is None:
        known = ", ".join(one.name for one in ready())
        raise UsageError(f"there is no ready configuration {name!r}; there are {known}")
    return found


def of_name(name: str) -> Ready | None:
    """The same, or None."""
    plain = name.replace("\\", "/").removeprefix("configs/").casefold()
    plain = plain.removesuffix(".yaml").removesuffix(".yml").replace("-", "_")
    return next((one for one in ready() if one.name == plain), None)


def _about(path: Path) -> str:
    """The first sentence or line of a file's first comment."""
    return " ".join(_comment(path)).partition(". ")[0].removesuffix(".")


def _comment(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            return
        yield text
