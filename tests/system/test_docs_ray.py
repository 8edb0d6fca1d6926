"""The page on Flower's simulation: its app is one that Flower takes, and its facts are Flower's."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to-ray.md").read_text("utf-8")
PROJECT, CONNECTION = re.findall(r"```toml\n(.*?)```", PAGE, re.S)

pytest.importorskip("flwr")


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_flower_takes_the_app(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    (tmp_path / "pyproject.toml").write_text(PROJECT)
    shutil.copy(ROOT / "examples/flower_stock.py", tmp_path)
    config, warnings = load_and_validate(tmp_path / "pyproject.toml")
    assert warnings == []
    assert len(build_fab_from_disk(tmp_path)) < 10_000_000
    used = set(
        re.findall(r'run_config\.get\("(\w+)"', (ROOT / "examples/flower_stock.py").read_text())
    )
    assert set(config["tool"]["flwr"]["app"]["config"]) == used


def test_the_command_line_is_flowers() -> None:
    from flwr.common.config import parse_config_args
    from flwr.supercore.utils import simulation_config_from_json

    (text,) = re.findall(r'--federation-config "([^"]*)"', PAGE)
    chosen = {k.replace("-", "_"): v for k, v in parse_config_args([text]).items()}
    assert simulation_config_from_json(chosen).num_supernodes == 8
    (name,) = tomllib.loads(CONNECTION)["superlink"]
    assert re.search(rf"flwr run \S+ {name} ", PAGE)


def test_the_facts_are_flowers() -> None:
    from flwr.supercore.constant import DEFAULT_SIMULATION_CONFIG as DEFAULTS

    assert DEFAULTS.num_supernodes == DEFAULTS.client_resources_num_cpus == 2
    assert DEFAULTS.client_resources_num_gpus == 0
    needs = importlib.metadata.requires("flwr") or []
    assert {need.split(" ")[0].rstrip(";") for need in needs if "simulation" in need} == {
        "ray==2.55.1"
    }
    assert "Ray\n2.55.1" in PAGE
    assert importlib.metadata.version("flwr") == "1.41.0"
    assert "flwr[simulation]==1.41.0" in PAGE
