"""What is released: one version, a wheel that works anywhere, and a workflow that people end."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import fedclip
from tests.support.wheel import ROOT, install_wheel

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_every_page_names_the_version_of_the_project() -> None:
    assert fedclip.__version__ == PROJECT["version"]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "CITATION.cff"]
    named = re.compile(r"fedclip-(\d[\w.]*?)-py3|version = \{([\w.]+)\}|^version: (\S+)$", re.M)
    found = {page.name: named.findall(page.read_text("utf-8")) for page in pages}
    versions = {"".join(groups) for every in found.values() for groups in every}
    assert versions == {PROJECT["version"]}
    assert sum(map(bool, found.values())) >= 4


def test_the_changelog_has_what_comes_next_and_what_was_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert headings[0] == "Unreleased"
    assert len(set(headings)) == len(headings)


def test_a_release_is_built_tried_and_attested_and_published_by_a_person() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text("utf-8")
    flow = yaml.safe_load(text)
    build, publish = flow["jobs"]["build"], flow["jobs"]["publish"]
    assert "attest-build-provenance" in str(build["steps"])
    assert "try_installed.py" in str(build["steps"])
    assert publish["needs"] == "build"
    assert publish["environment"] == "release"  # which waits for a reviewer
    assert flow["permissions"] == {"contents": "read"}
    assert "write" not in str({k: v for k, v in build["permissions"].items() if k == "contents"})


@pytest.mark.federation
def test_a_wheel_works_in_another_folder_without_a_network(tmp_path: Path) -> None:
    """init, doctor, run, report, predict, serve, and the README's block of Python."""
    pytest.importorskip("uvicorn")
    python = install_wheel(tmp_path)
    here = tmp_path / "elsewhere"
    here.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [python, ROOT / "scripts" / "try_installed.py", ROOT / "README.md"],
        cwd=here,
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all works: fedclip {PROJECT['version']}" in done.stdout
