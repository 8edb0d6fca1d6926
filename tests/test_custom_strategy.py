"""The example of a strategy of one's own does what it says, also in a run."""

from pathlib import Path

import pytest
import torch
from scipy.stats import trim_mean

import fedclip
from fedclip.errors import UsageError
from fedclip.experiment import resume
from fedclip.federated.strategies import create_strategy
from fedclip.federated.updates import Updates
from fedclip.records import ClientReport, Cohort, RunState, TrainRequest
from tests.runs_help import StopAfter, contents, with_
from tests.strategies_help import SIDES, SIZES, names, rounds, start

FILE = Path(__file__).parent.parent / "examples" / "custom_strategy.py"
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
