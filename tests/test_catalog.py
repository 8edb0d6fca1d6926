"""The catalogue: what a name stands for, what may be combined with it, and whose code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedclip
from fedclip.adapters.inspect import evaluate, info, load_run_model
from fedclip.catalog import FLAGS, KINDS, STRATEGIES, StrategyEntry, target_of
from fedclip.config.loading import config_from_dict
from fedclip.config.lookup import load
from fedclip.data.datasets import load_source
from fedclip.deploy.job import job_config, make_job
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.strategy import check_composition, options_of
from fedclip.federated.strategies import FedAvg, Strategy, create_strategy, load_strategy
from fedclip.federated.strategies.product_space import FlexLoRA
from tests.support.runs import with_


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_code(kind: str) -> None:
    for name in KINDS[kind].rows:
        assert load(kind, name) is not None


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_class_carries_the_flags_of_its_row(name: str) -> None:
    row, own = STRATEGIES[name], load("strategies", name)
    if not row.pools:  # centralised is FedAvg of one client
        assert all(getattr(own, flag) == getattr(row, flag) for flag in (*FLAGS, "options"))
    assert callable(target_of(row.traffic))


# --- the flags of a user's class ---

ROUND = {flag for flag in FLAGS if flag not in ("needs_lora", "personal")}


def flags_of(cls: type[Strategy]) -> set[str]:
    return {flag for flag in ROUND if getattr(cls, flag)}


def test_a_round_of_its_own_inherits_nothing_about_rounds() -> None:
    class Asks(FedAvg):
        def asked(self, request):  # type: ignore[no-untyped-def]
            return request

    class Rounds(FedAvg):
        def round(self, state, request, train):  # type: ignore[no-untyped-def]
            return state

    class Under(Rounds):
        pass

    class Says(FedAvg):
        averages = True

        def round(self, state, request, train):  # type: ignore[no-untyped-def]
            return state

    class Mixin:
        def round(self, state, request, train):  # type: ignore[no-untyped-def]
            return state

    class Mixed(Mixin, FedAvg):
        pass

    class Layers(FlexLoRA):
        def layer(self, *given):  # type: ignore[no-untyped-def]
            return given

    assert flags_of(Asks) == flags_of(FedAvg) != set()
    for cls in (Rounds, Under, Mixed, Layers):
        assert flags_of(cls) == set(), cls
    assert flags_of(Says) == {"averages"}
    assert not Rounds.needs_lora  # what it needs of the model is inherited
    assert Layers.options == FlexLoRA.options


AROUND: dict[str, dict[str, Any]] = {
    "averages": {"federation": {"scaffold": True}, "optimizer": {"name": "sgd"}},
    "stable_coordinates": {"federation": {"ditto_mu": 0.1}},
    "steps_in_place": {"federation": {"server_optimizer": {"name": "adam"}}},
    "masks": {"secure": {"aggregation": "masked"}},
    "mixes_ranks": {"federation": {"client_ranks": [2, 4]}},
    "allows_dora": {"model": {"lora": {"use_dora": True}}},
}


@pytest.mark.parametrize("flag", AROUND)
def test_a_users_class_is_held_to_its_flags(tmp_path: Path, flag: str) -> None:
    names = {}
    for said in (False, True):
        file = tmp_path / f"{said}.py".lower()
        file.write_text(
            "from fedclip.federated.strategies import Strategy\nclass Own(Strategy):\n"
            f"    {flag} = {said}\n    def round(self, state, request, train): ...\n"
        )
        names[said] = f"{file}:Own"
    for said, name in names.items():
        values = {**AROUND[flag], "federation": {**AROUND[flag].get("federation", {})}}
        values["federation"]["strategy"] = name
        config = config_from_dict(values)  # whose class is not known yet
        flags = load_strategy(name)[1]
        if said:
            check_composition(config, flags)
        else:
            with pytest.raises(UsageError, match=rf"say `{flag} = True` in the class"):
                check_composition(config, flags)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("averages = 1", "averages must be True or False, got 1"),
        ("options = 'federation.q'", "options must list keys"),
        ("import sys; sys.exit(3)", "cannot be loaded: SystemExit"),
    ],
)
def test_what_a_class_says_is_checked(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "own.py"
    head = "from fedclip.federated.strategies import FedAvg\nclass Own(FedAvg):\n"
    file.write_text(f"{head}    {line}\n")
    with pytest.raises(UsageError, match=words):
        create_strategy(f"{file}:Own")


def test_exactly_the_options_that_are_named_are_handed_on() -> None:
    config = config_from_dict({"federation": {"q": 3.0}})
    assert options_of(config, STRATEGIES["fedavg"]) == {}
    found = options_of(config, STRATEGIES["qfedavg"])
    assert found == {"q": 3.0}
    with pytest.raises(UsageError, match=r"reads federation\.qq .* no key"):
        options_of(config, StrategyEntry("", options=("federation.qq",)))


# --- names in the configuration ---


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"federation": {"strategy": "FlexLora2"}}, r"fedavg, .*py:Name, got .*mean flexlora\?"),
        ({"federation": {"strategy": "Lora-Fair"}}, r"did you mean lora_fair\?"),
        ({"data": {"name": "digit"}}, r"data\.name must be .*pairs, or path.*mean digits\?"),
        ({"engine": {"name": "batch"}}, r"engine\.name must be one of batched, sequential, or"),
        ({"federation": {"sharing": {"merge": "tie"}}}, r"merge must be .*knots, got .*ties\?"),
        ({"federation": {"sharing": {"merge": "a.py:B"}}}, r"merge must be one of linear, "),
        ({"federation": {"server_optimizer": {"name": "a.py:B"}}}, r"one of none, avgm, adam"),
        ({"evaluation": {"other_data": ["hub"]}}, r"one of digits, fashion_mnist, icons, or"),
        ({"federation": {"strategy": 3}}, r"strategy must be one of fedavg, .*got 3"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config_from_dict(values)


def test_two_packages_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("one", "two"):
        info = tmp_path / f"{package}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(
            f"[fedclip.metrics]\nsame = {package}:same\n"
            f"[fedclip.trackers]\n{package} = none_of_it:x\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UsageError, match=r"same is provided more than once, as one:same of one and two:same of two"
    ):
        load("metrics", "same")
    with pytest.raises(UsageError, match=r"none_of_it:x of one, cannot be loaded: ModuleNotFound"):
        load("trackers", "one")
    with pytest.raises(
        UsageError, match=r"tracking must be one of .*, mlflow, one, two, or .*got 'three'"
    ):
        load("trackers", "three")


# --- whose code is run ---

OWN = """
from pathlib import Path
from fedclip.data.sources.builtin import digits
from fedclip.federated.strategies.averaging import FedSA
from fedclip.experiment.engine import sequential

Path(__file__).with_suffix(".ran").touch()


class Own(FedSA):
    pass


def data(path, layout):
    return digits()


def engine(parts, **common):
    return sequential(parts, **common)


def half(predictions):
    return 0.5


def no_data(path, layout):
    return 3
"""


def test_only_a_run_imports_the_files_that_its_folder_names(tmp_path: Path) -> None:
    file, ran = tmp_path / "own.py", tmp_path / "own.ran"
    file.write_text(OWN)
    config = with_(
        federation={"strategy": f"{file}:Own", "rounds": 1},
        engine={"name": f"{file}:engine"},
        evaluation={"metrics": [f"{file}:half"]},
    )
    run = fedclip.run(config, output=tmp_path / "run")
    assert ran.exists()
    assert run.summary["engine"] == f"{file}:engine"
    config = {**config, "data": {**config["data"], "name": f"{file}:data"}}
    with_data = fedclip.run(config, output=tmp_path / "with_data")
    ran.unlink()
    assert run.summary["half"] == 0.5
    with pytest.warns(FedclipWarning, match=r"own\.py:half is a file of code.*left out"):
        figures = evaluate(
            run.folder
        )  # of the clients' models, as the state tells without the class
    assert figures["accuracy"] == run.summary["accuracy"]
    assert figures["client_accuracy"] == run.summary["client_accuracy"]
    facts = info(run.folder)
    assert facts["message_bytes_up_per_site_round"] is None
    load_run_model(run.folder)
    load_run_model(with_data.folder)
    with pytest.raises(UsageError, match=r"data\.name: .*own\.py:data is a file of code"):
        evaluate(with_data.folder)
    assert not ran.exists()


def test_a_reader_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    with pytest.raises(UsageError, match=r"no_data must return .*ImageSource, got int"):
        load_source(f"{file}:no_data")
    with pytest.raises(UsageError, match=r"cannot be read: TypeError"):
        load_source(f"{file}:Path")
    with pytest.raises(UsageError, match=r"data\.name: .* has no function nothing"):
        load_source(f"{file}:nothing")


def test_a_coordinator_names_no_file_for_a_site_to_run() -> None:
    job = make_job(config_from_dict({}), ["a"], ["{}"])
    job["config"]["evaluation"]["other_data"] = ["/tmp/own.py:data"]
    job["config"]["engine"] = {"name": "/tmp/own.py:engine"}
    config = job_config(job, "cpu", config_from_dict({}).data)
    assert config.evaluation.other_data == ()
    assert config.engine.name == "sequential"
