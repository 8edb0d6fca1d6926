"""Several processes on one run: each client once, one sum, and the adapter of a single process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fedclip
from fedclip.device import resolve_device
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.folder import RunFolder
from fedclip.federated.engines import memory
from fedclip.federated.engines.sequential import SequentialEngine
from fedclip.federated.engines.sharded import Processes, ShardedEngine
from fedclip.federated.local_steps import LocalSettings
from fedclip.federated.rounds import run_rounds
from fedclip.federated.running_mean import RunningMean
from fedclip.federated.strategies import create_strategy
from fedclip.records import RunState
from tests.support.runs import StopAfter, with_
from tests.support.toys import CPU, Toy, toy_data

TOLERANCE = 1e-6
CLIENTS = {"a": np.arange(0, 10), "b": np.arange(10, 40), "c": np.arange(40, 60)}


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    count=st.integers(1, 8),
)
def test_every_client_has_one_process_and_no_process_far_more_than_its_share(sizes, count):
    clients = {f"c{i}": size for i, size in enumerate(sizes)}
    ids = sorted(clients, key=lambda c: (-clients[c], c))
    shares = [Processes(rank, count).share(ids, clients) for rank in range(count)]
    assert sorted(c for share in shares for c in share) == sorted(ids)
    assert shares == [Processes(rank, count).share(tuple(ids), clients) for rank in range(count)]
    for share in shares:
        assert list(share) == [c for c in ids if c in share]  # in the order given
    # Graham's bound for a greedy assignment
    heaviest = max(sum(clients[c] for c in share) for share in shares)
    assert heaviest <= sum(sizes) / count + max(sizes)


def test_one_process_has_all_clients_and_exchanges_nothing():
    alone = Processes()
    assert alone.share(["b", "a"], {"a": 1, "b": 2}) == ("b", "a")
    assert alone.combine is None
    assert alone.first_numbers([3, 4]) == [3, 4]


def test_added_sums_of_two_means_are_one_mean():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(5, 4, 2, generator=generator),
        "a": torch.randn(5, 3, generator=generator),
    }
    weights = torch.tensor([5, 4, 3, 2, 1])
    whole, *halves = (RunningMean() for _ in range(3))
    whole.add(tensors, weights)
    for half, rows in zip(halves, (slice(0, 2), slice(2, 5)), strict=True):
        half.add({n: t[rows] for n, t in tensors.items()}, weights[rows])
    assert_means_equal(combined(halves, like={n: t[0] for n, t in tensors.items()}), whole)


def test_a_mean_without_clients_adds_nothing():
    like = {"w": torch.ones(2, 3)}
    full, empty = RunningMean(), RunningMean()
    full.add({"w": torch.arange(6.0).reshape(1, 2, 3)}, torch.tensor([7]))
    expected = full.result()
    for mean in combined([full, empty], like):
        assert torch.equal(mean.result()["w"], expected["w"])
        assert mean.result()["w"].dtype == torch.float32


def combined(means, like):
    """The means after what several processes do: each hands over its sums, and all are added."""
    handed = []
    for mean in means:
        mean.combine(like, lambda tensors: handed.append([t.clone() for t in tensors]))
    sums = [sum(column) for column in zip(*handed, strict=True)]
    for mean in means:
        mean.combine(
            like, lambda own: [t.copy_(s) for t, s in zip(own, sums, strict=True)] and None
        )
    return means


def assert_means_equal(means, whole):
    for mean in means:
        for name, tensor in whole.result().items():
            torch.testing.assert_close(mean.result()[name], tensor, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("strategy", ["fedavg", "local"])  # a mean, and all updates stacked
@pytest.mark.parametrize("count", [2, 4])  # four processes, three clients: one has none
def test_shares_trained_apart_and_summed_are_the_round(count, strategy):
    """The processes of a round one after another, with a sum that is taken by hand."""
    sizes = {c: len(indices) for c, indices in CLIENTS.items()}
    whole = next(loop(Processes(), strategy=strategy))
    handed = []
    for rank in range(count):
        heard = []
        with pytest.raises(Handed):
            next(loop(Processes(rank, count), hand_over_to(handed), heard.append, strategy))
        assert {r.client_id for r in heard} == set(
            Processes(rank, count).share(tuple(sizes), sizes)
        )
    sums = [sum(column) for column in zip(*handed, strict=True)]

    def take(tensors):
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total)

    for rank in range(count):
        result = next(loop(Processes(rank, count), take, strategy=strategy))
        found = result.state.flat()
        for name, tensor in whole.state.flat().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-15)
        assert result.bytes_up == whole.bytes_up
        for ours, theirs in zip(result.reports, whole.reports, strict=True):
            assert (ours.client_id, ours.num_examples, ours.steps, ours.loss) == (
                theirs.client_id,
                theirs.num_examples,
                theirs.steps,
                theirs.loss,
            )


class Handed(Exception):
    """The process has reached the sum."""


def hand_over_to(handed):
    def combine(tensors):
        handed.append([tensor.clone() for tensor in tensors])
        raise Handed

    return combine


def loop(processes, combine=None, on_client=lambda report: None, strategy="fedavg"):
    pixels, labels = toy_data(60)
    model = Toy()
    sizes = {c: len(indices) for c, indices in CLIENTS.items()}
    local = LocalSettings(optimizer="adamw", learning_rate=0.05, batch_size=8)
    engine = SequentialEngine(model, pixels, labels, CLIENTS, local, seed=5, device=CPU)
    state = {n: p.detach().clone() for n, p in model.trainable().items()}
    return run_rounds(
        RunState(state),
        ShardedEngine(engine, processes, sizes),
        create_strategy(strategy),
        clients=sizes,
        rounds=2,
        clients_per_round=3,
        seed=5,
        on_client=on_client,
        combine=combine,
    )


def test_a_processor_s_memory_is_divided_by_the_processes_on_it(monkeypatch):
    whole = memory.memory_budget(None, CPU)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.memory_budget(None, CPU) == whole / 2
    assert memory.memory_budget(3.0, CPU) == 1.5e9
    assert memory.memory_budget(3.0, torch.device("cuda")) == 3e9


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("auto", "cuda", "cuda:1"):
        assert resolve_device(name) == torch.device("cuda:1")
    assert resolve_device("cpu") == CPU
    with pytest.raises(UsageError, match="one GPU for several processes"):
        resolve_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="--nproc-per-node 2"):
        resolve_device("auto")


def test_a_half_made_environment_is_explained(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, but RANK.*torchrun"):
        Processes.join(CPU)


def torchrun(*arguments, count=2, of=("-m", "fedclip", "run")):
    """A command in several processes: exit code, standard output and standard error."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node", str(count), *of, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    return done.returncode, done.stdout, done.stderr


def assert_same_run(folder, expected):
    """Adapter and figures agree; every round is there once."""
    ours, theirs = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        away = (ours[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert away <= TOLERANCE, f"{name}: {away}"
    metrics, others = (RunFolder(f).read_metrics() for f in (folder, expected))
    assert [r["server_round"] for r in metrics] == [r["server_round"] for r in others]
    for record, other in zip(metrics[1:], others[1:], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
        assert record["num_examples"] == other["num_examples"]
        assert list(record["clients"]) == list(other["clients"])
        for client_id, report in record["clients"].items():
            assert report["steps"] == other["clients"][client_id]["steps"]
            expected_loss = other["clients"][client_id]["loss"]
            assert report["loss"] == pytest.approx(expected_loss, rel=TOLERANCE)


def test_two_processes_go_on_with_a_run_to_the_adapter_of_one(tmp_path):
    config = with_(federation={"rounds": 3, "clients_per_round": 3}, evaluation={"every": 3})
    expected = fedclip.run(config, output=tmp_path / "one").folder
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(config, output=tmp_path / "two", listener=StopAfter(1))
    code, out, err = torchrun("--resume", tmp_path / "two")
    assert code == 0, err
    assert out.count("run folder:") == 1
    assert [err.count(f"round {n}/3") for n in (1, 2, 3)] == [0, 1, 1]
    assert_same_run(tmp_path / "two", expected)


ENDED = """
import sys, fedclip

class End(fedclip.Listener):
    def stop(self):
        return "enough"

fedclip.run(sys.argv[1], output=sys.argv[2], listener=End())
"""


def test_a_listener_ends_a_run_of_two_processes_which_one_goes_on_with(tmp_path):
    """The second process has no listener, and would wait for the next round's sum for ever.

    With one client a round it adds nothing, so the bytes are those of one process.
    """
    config = with_(federation={"rounds": 2, "clients_per_round": 1}, evaluation={"every": 2})
    config["engine"] = {"name": "batched"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "ended.py").write_text(ENDED)
    folder = tmp_path / "two"
    code, _, err = torchrun(tmp_path / "ended.py", tmp_path / "small.yaml", folder, of=())
    assert code == 0, err
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["stopped_by"], summary["rounds"]) == ("enough", 1)
    expected = fedclip.run(config, output=tmp_path / "one")
    with pytest.warns(FedclipWarning, match="processes 2, now 1"):
        resumed = fedclip.resume(folder)
    assert resumed.summary["state_sha256"] == expected.summary["state_sha256"]


def test_what_all_processes_meet_with_is_said_once(tmp_path):
    (tmp_path / "small.yaml").write_text("federation:\n  roundss: 2\n")
    code, _, err = torchrun(tmp_path / "small.yaml")
    assert code != 0
    assert err.count("error: ") == 1
    assert "federation.roundss" in err
