"""The documentation is complete: every name, file, layer and key; and its figures are right."""

from __future__ import annotations

import re
import runpy
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedclip
from fedclip import CLIPLoRAWrapper
from fedclip.adapters.inspect import info
from fedclip.catalog import STRATEGIES
from fedclip.config import Config
from fedclip.config.loading import config_from_dict, load_config
from fedclip.config.lookup import load
from fedclip.data.loading import load_federated
from fedclip.errors import UsageError, install
from fedclip.federated.strategies.dynamic_ranks import DynamicRanks
from fedclip.federated.strategies.wrappers import Ditto, Scaffold, ServerOptimizer

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]


def test_the_python_page_has_whatever_pages_and_examples_import() -> None:
    page = (ROOT / "docs/reference-python.md").read_text("utf-8")
    listed = set(re.findall(r"^### `(\w+)`", page, re.M))
    assert set(fedclip.__all__) - {"__version__", "UsageError"} <= listed
    texts = [p.read_text("utf-8") for p in (*PAGES, *(ROOT / "examples").glob("*.py"))]
    imports = re.findall(
        r"^from (?:fedclip[\w.]*|models\.clip) import ([\w, ]+)$", "\n".join(texts), re.M
    )
    used = {name.strip() for names in imports for name in names.split(",")}
    no_code = {"METHODS", "Train", "UsageError"}  # a table, a type, and one of the errors' page
    assert used - listed == no_code
    members = [name for name in vars(CLIPLoRAWrapper) if not name.startswith("_")]
    assert [name for name in members if f"`{name}" not in page] == []


def test_the_architecture_page_names_every_room_and_no_list_of_files() -> None:
    page = (ROOT / "docs/explanation-architecture.md").read_text("utf-8")
    rooms = [p.parent.name for p in (ROOT / "src/fedclip").glob("*/__init__.py")]
    assert len(rooms) == 11
    assert [room for room in rooms if f"| `{room}/` |" not in page] == []


def test_the_architecture_page_has_the_layers_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = "\n".join(contracts["contracts"][0]["layers"])
    assert f"\n{layers}\n" in (ROOT / "docs/explanation-architecture.md").read_text("utf-8")


def test_nothing_is_to_be_installed_that_no_index_has() -> None:
    """`pip install fedclip` or `fedclip[extra]`: there is a checkout, or a wheel by its path."""
    code = [p for f in ("src", "examples", "deploy") for p in (ROOT / f).rglob("*") if p.is_file()]
    texts = [p for p in [*PAGES, *code] if p.suffix in (".md", ".py", ".html", ".yaml", "")]
    by_name = re.compile(r"pip[ ]install (?:[^\n`]*[ '\"])?fedclip(?![-\w/])")
    found = [str(p) for p in texts if by_name.search(p.read_text("utf-8", errors="replace"))]
    assert found == []
    assert by_name.search("pip install 'fedclip[flower]'")
    assert by_name.search("pip install fedclip")
    assert not by_name.search(install("flower"))


def test_the_tutorial_has_the_figures_of_the_quickstart() -> None:
    facts = info(ROOT / "configs/quickstart.yaml")
    config = load_config(ROOT / "configs/quickstart.yaml")
    data = load_federated(
        config.data,
        num_clients=config.federation.num_clients,
        seed=config.seed,
        to_pixels=lambda images: np.zeros((len(images), 3, 1, 1), np.uint8),
        pixels_key="none",
    )
    for page in ROOT.glob("docs/tutorial-first-run*.md"):
        text = page.read_text("utf-8")
        for figure in ("base_parameters", "lora_parameters"):
            assert f"{facts[figure]:,}" in text
        for figure in ("bytes_up_per_client_round", "full_fine_tuning_bytes"):
            assert f"{facts[figure] / 1e6:.3f} MB" in text
        for client, counts in zip(data.clients[:3], data.table("train")[:3], strict=True):
            row = [client.client_id, *(str(count or ".") for count in counts), str(sum(counts))]
            assert row in [line.split() for line in text.splitlines()]


def test_the_picture_of_the_mean_shows_what_is_worked_out_by_hand() -> None:
    script = runpy.run_path(str(ROOT / "scripts/mean_of_products.py"))
    mean, used, lost = list(script["panels"]().values())[2:]
    assert mean.tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert used.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert lost.tolist() == [[0.25, -0.25], [-0.25, 0.25]]
    shown = re.findall(r">(-?[\d.]+)</text>", script["PICTURE"].read_text("utf-8"))
    assert shown == [f"{x:g}" for panel in script["panels"]().values() for x in panel.ravel()]


def test_keys_that_pages_mention_exist() -> None:
    sections = set(Config.model_fields)
    known = set(flat(Config().model_dump()))
    for page in PAGES:
        text = page.read_text("utf-8")
        for key in re.findall(r"`((?:\w+\.)+\w+)(?:: [^`]*|=[^`]*)?`", text):
            if key.split(".")[0] in sections and not key.endswith((".safetensors", ".json")):
                assert key in known, f"{page.name}: {key}"


def flat(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in tree.items():
        found.append(prefix + name)
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{name}.")
    return found


def test_markers_of_the_table_stand_in_both_front_pages() -> None:
    for page in ROOT.glob("README*.md"):
        text = page.read_text("utf-8")
        assert text.index("<!-- results-table -->") < text.index("<!-- /results-table -->")
        assert len(text.splitlines()) < 150


STRATEGY_PAGES = sorted((ROOT / "docs").glob("explanation-strategies*.md"))
# The columns of the table of what goes with what, in its order.
COLUMNS: list[dict[str, Any]] = [
    {"federation": {"client_ranks": [4, 8]}},
    {"federation": {"dynamic_ranks": {"enabled": True}}},
    {"federation": {"scaffold": True}, "optimizer": {"name": "sgd"}},
    {"federation": {"server_optimizer": {"name": "adam"}}},
    {"federation": {"ditto_mu": 0.1}},
    {"model": {"lora": {"use_dora": True}}},
    {"model": {"lora": {"enabled": False}}},
]


def rows(text: str, columns: int) -> dict[str, list[str]]:
    """Tables of so many columns by the names in their first one, which may be several."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        if len(rest) + 1 == columns:
            found |= dict.fromkeys(re.findall(r"`(\w+)`", first), rest)
    return found


@pytest.mark.parametrize("page", STRATEGY_PAGES, ids=lambda page: page.name)
def test_the_strategies_page_has_them_all_and_what_composes(page: Path) -> None:
    text = page.read_text("utf-8")
    assert set(rows(text, 6)) == set(STRATEGIES)
    composed = rows(text, 1 + len(COLUMNS))
    assert set(composed) == set(STRATEGIES)
    for name, cells in composed.items():
        for cell, column in zip(cells, COLUMNS, strict=True):
            federation = {"strategy": name, **column.get("federation", {})}
            expected: Any = nullcontext() if cell in ("yes", "是") else pytest.raises(UsageError)
            with expected:
                config_from_dict({**column, "federation": federation})
            assert cell in ("yes", "是", "")
    assert text.index("<!-- guide-table -->") < text.index("<!-- /guide-table -->")


def test_every_strategy_tells_its_source_and_its_bytes() -> None:
    around = (Ditto, Scaffold, ServerOptimizer, DynamicRanks)
    own = {load("strategies", name) for name in STRATEGIES if name != "local"}
    for strategy in {*own, *around}:
        words = strategy.__doc__ or ""
        assert "arXiv:" in words, strategy
        assert "Bytes" in words, strategy
