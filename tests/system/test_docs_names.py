"""What pages name outside their blocks exists: commands, options, files, targets, Python names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import fedclip
from fedclip.catalog import KINDS
from fedclip.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
GROUP: Any = typer.main.get_command(app)
TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
# Options of other programs that pages name.
OTHERS = {
    "--build-arg",
    "--insecure",
    "--logdir",
    "--backend-store-uri",
    "--no-deps",
    "--nproc-per-node",
    "--nnodes",
    "--list",
}

NOT_OURS = {"fedclip compiled"}  # a row of a table


def spans(page: Path) -> list[str]:
    """Code inside sentences, and the lines of blocks that are not carried out."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```text\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [*re.findall(r"(?<!`)`([^`]+)`(?!`)", inline), *(ln for ln in lines if "fedclip " in ln)]


def options(command: click.Command) -> set[str]:
    return {name for p in command.params if isinstance(p, click.Option) for name in p.opts}


def every_command(command: click.Command) -> Iterator[click.Command]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from every_command(inner)


ALL_OPTIONS = {"--help", *OTHERS}.union(*(options(command) for command in every_command(GROUP)))


def fault_of_command(words: list[str]) -> str | None:
    """What is wrong with the words after `fedclip`."""
    command: Any = GROUP
    while words and words[0] in getattr(command, "commands", {}):
        command, *words = command.commands[words[0]], *words[1:]
    if isinstance(command, click.Group) and words and re.fullmatch(r"[a-z]+", words[0]):
        return f"no command {words[0]}"
    known = options(command) | {"--help", "--version"}
    named = {word.partition("=")[0] for word in words if word.startswith("--")}
    return f"no option {sorted(named - known)}" if named - known else None


def exists_in_python(name: str) -> bool:
    """Whether a dotted name is a module of the package, or one of what a module defines."""
    parts = name.split(".")
    if len(parts) == 2 and parts[1] in fedclip.__all__:
        return True
    for length in range(len(parts), 0, -1):
        base = ROOT / "src" / Path(*parts[:length])
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if file.is_file():
            rest = parts[length : length + 1]
            return not rest or re.search(rf"\b{rest[0]}\b", file.read_text("utf-8")) is not None
    return False


def fault(span: str) -> str | None:
    """What a piece of code names that does not exist; None where all does."""
    span = span.partition("  #")[0].strip()
    word = span.split()[0].partition("=")[0] if span else ""
    if span in NOT_OURS:
        return None
    if word == "fedclip":
        return fault_of_command(span.replace("'", "").replace('"', "").split()[1:])
    if re.match(r"--[a-z]", word) and word not in ALL_OPTIONS:
        return "no such option"
    if word == "make" and not {*span.split()[1:2]} <= {*TARGETS}:
        return "no such target"
    if re.fullmatch(r"(?:src|configs|examples|benchmarks|scripts|tests|deploy)/[\w./-]+", span):
        places = [ROOT / span, ROOT / "src/fedclip" / span, ROOT / "src/fedclip" / f"{span}.py"]
        written = re.match(r"deploy/\w+\.\w+", span)  # by a run, into its folder
        return None if written or any(p.exists() for p in places) else "no such file"
    name = re.fullmatch(r"(fedclip(?:\.[A-Za-z_]\w*)+)(?:\(.*\))?", span)
    groups = {f"fedclip.{kind}" for kind in KINDS}  # of entry points
    files = (".json", ".yaml")
    if name and not (span in groups or span.endswith(files) or exists_in_python(name[1])):
        return "no such name"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    found = {span: fault(span) for span in spans(page)}
    assert {span: what for span, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "span",
    [
        "fedclip rnu x.yaml",
        "fedclip run --ouput x",
        "fedclip keys sight north",
        "--dry-runs",
        "make tests",
        "configs/nothing.yaml",
        "fedclip.adapters.predict.Predicter",
        "fedclip.nothing",
    ],
)
def test_what_does_not_exist_is_found(span: str) -> None:
    assert fault(span)
