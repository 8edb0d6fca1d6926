"""What contributors are told is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_every_file_and_folder_that_is_named_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"`([\w./*-]+/[\w./*-]*|[\w*]+\.(?:py|md|toml|txt))`", text))
    assert len(named) > 30
    missing = [
        name
        for name in named
        if not any([*(ROOT / "src/fedclip").glob(name), *ROOT.glob(name.removesuffix("/"))])
    ]
    assert missing == []


def test_a_table_has_twenty_changes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = text.partition("## Twenty changes")[2].partition("\n\n`docs/")[0]
    assert sum(line.startswith("| ") for line in table.splitlines()) - 1 == 20


def test_citation_and_project_agree() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (cited["title"], cited["version"]) == (PROJECT["name"], PROJECT["version"])
    assert cited["license"] == PROJECT["license"]
    assert [author["name"] for author in cited["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]


@pytest.mark.parametrize("file", [".github/workflows/ci.yml", ".pre-commit-config.yaml"])
def test_the_steps_are_the_makefile_s_and_the_checkers_are_there(file: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    assert yaml.safe_load(text)
    targets = re.findall(r"run: make (\w+)", text)
    rules = (ROOT / "Makefile").read_text("utf-8")
    assert all(f"\n{target}:" in rules for target in targets)
    if "workflows" in file:
        assert targets == ["test", "check", "docs", "demo"]
        versions = re.findall(r'"(3\.\d+)"', text)
        assert versions == [
            word.rpartition(" ")[2] for word in PROJECT["classifiers"] if "Python :: 3." in word
        ]
