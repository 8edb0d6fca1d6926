"""The container files: what they parse to, what they mount, and what stays out of the image."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from fedclip.cli import main as cli

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy/docker"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    text = (DOCKER / "compose.yaml").read_text("utf-8")
    return dict(yaml.safe_load(text)["services"])


def test_one_profile_for_each_kind_of_machine(compose: dict[str, Any]) -> None:
    assert {name: service["profiles"] for name, service in compose.items()} == {
        "coordinator": ["coordinator"],
        "site": ["site"],
    }
    assert compose["coordinator"]["command"] == ["coordinate", "/config/coordinator.yaml"]
    assert compose["site"]["command"] == ["site", "--config", "/config/site.yaml"]


def test_the_commands_are_fedclips(compose: dict[str, Any]) -> None:
    group: Any = typer.main.get_command(cli.app)
    for service in compose.values():
        name, *arguments = service["command"]
        context = click.Context(group)
        group.commands[name].make_context(name, list(arguments), parent=context)


def test_a_site_listens_nowhere_and_only_work_can_be_written(compose: dict[str, Any]) -> None:
    assert "ports" not in compose["site"]
    for service in compose.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        mounts = [re.fullmatch(r"\$\{\w+:-\S+\}:(/\S+?)(:ro)?", m) for m in service["volumes"]]
        written = [mount[1] for mount in mounts if mount and not mount[2]]
        assert all(mounts)
        assert written == ["/federation"]


def test_every_variable_is_explained_and_has_a_default() -> None:
    text = (DOCKER / "compose.yaml").read_text("utf-8")
    used = set(re.findall(r"\$\{(\w+):-[^}]+\}", text))
    assert set(re.findall(r"\$\{?(\w+)", text)) == used
    comments = " ".join(line for line in text.splitlines() if line.startswith("#"))
    page = (ROOT / "docs/how-to-docker.md").read_text("utf-8")
    for name in used:
        assert name in comments
        assert f"`{name}`" in page


def test_the_image_is_built_from_what_is_there(compose: dict[str, Any]) -> None:
    build = compose["site"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    dockerfile = (ROOT / build["dockerfile"]).read_text("utf-8")
    copied = [
        name for line in re.findall(r"^COPY (.*)$", dockerfile, re.M) for name in line.split()[:-1]
    ]
    allowed = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert allowed[1] == "*"
    assert copied
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed
    assert {line[1:] for line in allowed if line.startswith("!")} == set(copied)
    assert "**/*.key" in allowed
    assert dockerfile.index("\nUSER fedclip") < dockerfile.index("\nENTRYPOINT")


@pytest.mark.parametrize("profile", ["coordinator", "site"])
def test_docker_accepts_the_compose_file(profile: str) -> None:
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    command = ["docker", "compose"]
    there = subprocess.run([*command, "version"], capture_output=True, check=False)
    if there.returncode:
        pytest.skip("docker is here without its plugin compose")
    done = subprocess.run(
        [*command, "-f", DOCKER / "compose.yaml", "--profile", profile, "config", "--quiet"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
