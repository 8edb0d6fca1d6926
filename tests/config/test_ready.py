"""Ready configurations, and the one that `fedclip init` writes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.config.ready import of_name, ready
from fedclip.config.starter import Wishes, starter
from fedclip.config.wording import SYNONYMS, known_keys
from fedclip.errors import UsageError


def test_every_ready_configuration_is_listed_and_valid() -> None:
    found = {one.name: one for one in ready()}
    assert {"quickstart", "imagefolder", "bench/strategies"} <= found.keys()
    assert found["quickstart"].about == (
        "Quickstart: ten sites with different handwritten digits train one CLIP together"
    )
    for one in found.values():
        assert one.about
        if not one.name.startswith("bench/"):
            load_config(one.path)


@pytest.mark.parametrize("name", ["quickstart", "Quickstart.yaml", "configs/quickstart.yaml"])
def test_a_ready_one_is_known_however_it_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = of_name(name)
    assert found is not None
    assert found.name == "quickstart"
    monkeypatch.chdir(tmp_path)  # there is no such file here
    with pytest.raises(UsageError, match="fedclip configs quickstart"):
        load_config(name)
    assert of_name("quick") is None


names = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=40)


@settings(max_examples=12)
@given(folder=names, classes=st.lists(names, min_size=2, max_size=4, unique_by=str.casefold),
       rounds=st.integers(1, 50), clients=st.integers(1, 100))  # fmt: skip
def test_what_init_writes_reads_back_as_it_was_wished(
    folder: str, classes: list[str], rounds: int, clients: int
) -> None:
    wishes = Wishes(folder, False, classes, "openai/clip-vit-base-patch32", rounds, clients)
    try:
        text = starter(wishes)
    except UsageError:  # names that no configuration may have
        return
    values = yaml.safe_load(text)
    assert values["data"]["path"] == folder
    assert values["data"]["class_names"] == classes
    assert values["federation"]["rounds"] == rounds
    assert values["client"]["learning_rate"] == 1e-4


def test_what_init_writes_has_its_comments_in_a_column() -> None:
    lines = [line for line in starter(Wishes()).splitlines() if "  #" in line]
    assert len(lines) > 8
    assert {line.index("# ") for line in lines} <= {31, 33}


@pytest.mark.parametrize("wishes", [Wishes(), Wishes("a", False, ["x", "y"]), Wishes("a" * 90)],
                         ids=["digits", "classes", "sites"])  # fmt: skip
def test_every_value_that_init_writes_has_a_comment(wishes: Wishes) -> None:
    lines = starter(wishes).splitlines()
    for above, line in pairwise(lines):
        key, _, value = line.strip().partition(":")
        if not value.split("#")[0].strip() or line.startswith(("#", "  #", "  - ")):
            continue  # a heading, a comment or an item
        assert "# " in line or f"# {key}: " in above, line


def test_synonyms_lead_to_keys_that_there_are() -> None:
    keys = {key for key, _ in known_keys(Config)}
    assert {key for meant in SYNONYMS.values() for key in meant} <= keys


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("lr=3", "client.learning_rate"),
        ("optimizer.lr=3", "optimizer.learning_rate"),
        ("dataset=x", "data.name"),
        ("num_rounds=3", "federation.rounds"),
        ("fedprox=0.1", "client.proximal_mu"),
        ("federation.strategy=FedProx", "client.proximal_mu"),
        ("federation.strategy=SCAFFOLD", "federation.scaffold: true"),
        ("federation.strategy=Fed-Adam", "server_optimizer.name: adam"),
        ("federation.strategy=FedIT", "did you mean fedit"),
        ("lora.r=4", "model.lora"),
    ],
)
def test_names_as_people_write_them_lead_to_the_key(written: str, told: str) -> None:
    with pytest.raises(UsageError, match=told.replace(".", r"\.")):
        load_config(None, [written])
