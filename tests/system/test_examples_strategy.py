"""The example of a strategy of one's own does what it says, also in a run."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import trim_mean

import fedclip
from fedclip.config.loading import config_from_dict
from fedclip.errors import UsageError
from fedclip.experiment.run import resume
from fedclip.federated.rounds import bytes_down
from fedclip.federated.strategies import create_strategy
from fedclip.federated.strategies.wrappers import ServerOptimizer
from fedclip.federated.updates import Updates
from fedclip.records import ClientReport, Cohort, RunState, TrainRequest
from tests.support.runs import StopAfter, contents, with_
from tests.support.strategies import SIDES, SIZES, names, rounds, setting, start

FILE = Path(__file__).parents[2] / "examples" / "custom_strategy.py"
NAME = f"{FILE}:TrimmedMean"


def test_a_wild_client_does_not_move_the_trimmed_mean():
    values = torch.tensor([[1.0, -9.0], [2.0, 5.0], [3.0, 6.0], [4.0, 7.0], [1e9, 1e9]])

    def train(request):
        reports = tuple(ClientReport(c, 10, 0.5, 4, 0.1) for c in request.client_ids)
        return Updates(request, [Cohort(reports, {"w": values})])

    state = RunState({"w": torch.zeros(2)})
    request = TrainRequest(1, ("a", "b", "c", "d", "e"), state.shared)
    after = create_strategy(NAME).round(state, request, train)
    assert after.shared["w"].tolist() == [3, 6]
    assert after.shared["w"].numpy() == pytest.approx(trim_mean(values.numpy(), 0.2))


def test_only_b_is_trained_and_sent():
    strategy = create_strategy(NAME)
    (result,), engine = rounds(strategy)
    before = start()
    sent = 0
    for layer in SIDES:
        a, b = names(layer)
        assert torch.equal(result.state.shared[a], before[a])
        # A fifth of three clients is none: the plain mean, unweighted.
        plain = sum(engine.sent[1, c][b] for c in SIZES) / len(SIZES)
        torch.testing.assert_close(result.state.shared[b], plain)
        sent += before[b].nbytes
    assert result.bytes_up == result.bytes_down == len(SIZES) * sent


def test_a_run_with_it_is_resumed_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(FILE.parents[1])
    own = with_(federation={"strategy": "examples/custom_strategy.py:TrimmedMean", "rounds": 2})
    whole = fedclip.run(own, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(own, output=tmp_path / "cut", listener=StopAfter(1))
    monkeypatch.chdir(tmp_path)
    again = resume(tmp_path / "cut")
    assert contents(again.folder) == contents(whole.folder)
    assert whole.summary["strategy"] == NAME


def test_what_goes_around_the_configured_ones_may_not_go_around_it(tmp_path):
    for key, value in {"dynamic_ranks": {"enabled": True}, "scaffold": True}.items():
        config = with_(federation={"strategy": NAME, key: value}, optimizer={"name": "sgd"})
        with pytest.raises(UsageError, match=rf"federation\.{key}"):
            fedclip.run(config, output=tmp_path / key)


HEAD = """from __future__ import annotations
from dataclasses import dataclass, replace
from fedclip.federated.strategies import FedAvg, Strategy
"""


def own(folder, body, name="Own"):
    """The configured name of a class in a file of its own."""
    path = folder / "own.py"
    path.write_text(HEAD + body, encoding="utf-8")
    return f"{path}:{name}"


def test_a_file_may_have_a_dataclass(tmp_path):
    body = "@dataclass\nclass Memory:\n    x: int = 1\nclass Own(FedAvg):\n    memory = Memory()\n"
    assert create_strategy(own(tmp_path, body)).memory.x == 1
    before = set(sys.modules)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=r"own\.py cannot be loaded: ZeroDivisionError"):
        create_strategy(own(tmp_path / "other", "1 / 0\n"))
    assert set(sys.modules) == before


def test_a_class_that_takes_no_setting_is_named(tmp_path):
    name = own(tmp_path, "class Own(FedAvg):\n    def __init__(self):\n        pass\n")
    with pytest.raises(UsageError, match=r"own\.py:Own cannot be made: TypeError.*Setting"):
        create_strategy(name)


@pytest.mark.parametrize("answer", ["state", "(train(request), state)[1]"])
@pytest.mark.parametrize("around", [False, True])
def test_a_round_that_takes_no_updates_is_named(tmp_path, answer, around):
    body = "class Own(Strategy):\n    def round(self, state, request, train):\n"
    strategy = create_strategy(own(tmp_path, f"{body}        return {answer}\n"))
    options = {"learning_rate": 1.0, "beta1": 0.9, "beta2": 0.99, "tau": 0.1}
    strategy = ServerOptimizer(strategy, "adam", options) if around else strategy
    with pytest.raises(UsageError, match=r"federation\.strategy: Own trained no client in round 1"):
        rounds(strategy)


def test_nothing_sent_is_nothing_received():
    state = RunState({"w": torch.zeros(10)})
    alone = TrainRequest(1, ("a", "b"), state.shared, sent=frozenset())
    assert bytes_down(state, alone) == 0
    assert bytes_down(state, replace(alone, sent=None, trained=frozenset())) == 0
    assert bytes_down(state, replace(alone, sent=None)) == 2 * 40


def test_a_server_optimizer_steps_what_the_strategy_inside_has_sent():
    """FedSA's B stays with the clients: the server has no way to step it along."""
    options = {"learning_rate": 1.0, "beta1": 0.9, "beta2": 0.99, "tau": 0.1}
    inner = create_strategy("fedsa", setting())
    (result,), _ = rounds(ServerOptimizer(inner, "adam", options))
    stepped = {name.split("/")[1] for name in result.state.server}
    assert stepped == {names(layer)[0] for layer in SIDES}


def test_scaffold_asks_the_same_of_the_optimizer_around_it(tmp_path):
    name = own(tmp_path, "class Own(FedAvg):\n    pass\n")
    federation = {"strategy": name, "scaffold": True}
    config_from_dict({"federation": federation, "optimizer": {"name": "sgd"}})
    with pytest.raises(UsageError, match=r"federation\.scaffold.*set optimizer\.name: sgd"):
        config_from_dict({"federation": federation})
    pattern = {"name": "sgd", "rate_pattern": {"lora_B": 2}}
    with pytest.raises(UsageError, match=r"leave out optimizer\.rate_pattern"):
        config_from_dict({"federation": federation, "optimizer": pattern})


@pytest.mark.parametrize("key", ["client_memory_mb", "client_ranks"])
def test_ranks_by_client_do_not_go_with_dora(tmp_path, key):
    name = own(tmp_path, "class Own(FedAvg):\n    pass\n")
    lora = {"lora": {"use_dora": True}}
    config = {"model": lora, "federation": {"strategy": name, key: {"default": 8}}}
    with pytest.raises(UsageError, match=rf"federation\.{key}.*model\.lora\.use_dora"):
        config_from_dict(config)


@pytest.mark.parametrize("strategy", ["fedit", "fedavg"])
def test_dynamic_ranks_do_not_go_with_dora(strategy):
    federation = {"strategy": strategy, "dynamic_ranks": {"enabled": True}}
    config = {"model": {"lora": {"use_dora": True}}, "federation": federation}
    with pytest.raises(UsageError, match=r"federation\.dynamic_ranks.*model\.lora\.use_dora"):
        config_from_dict(config)
