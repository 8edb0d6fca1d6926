"""Runs on one machine whose updates are masked: equal to plain ones, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedclip.config.loading import config_from_dict
from fedclip.errors import TrainingFailed, UsageError
from fedclip.experiment.run import Run, resume, run
from fedclip.federated.rounds import run_rounds
from fedclip.federated.secure.simulated import MaskedEngine
from fedclip.federated.secure.updates import SummedUpdates
from fedclip.federated.strategies import create_strategy
from fedclip.federated.updates import Quorum
from fedclip.models.adapter_folder import read_adapter
from fedclip.records import ClientReport, Cohort, RunState, SecureSum, TrainRequest
from fedclip.reports.listener import Listener
from tests.support.runs import StopAfter

CONFIG: dict[str, Any] = {
    "model": {"model_name": "random:tiny", "lora": {"r": 2, "last_layers": 1}},
    "client": {"learning_rate": 0.01},
    "data": {"name": "digits", "max_train_examples": 90},
    "federation": {"rounds": 2, "num_clients": 3, "strategy": "ffa"},
    "evaluation": {"max_examples": 10},
}
MASKED = {"secure": {"aggregation": "masked"}}


def laid_over(**sections: Any) -> dict[str, Any]:
    values = {**CONFIG, **MASKED}
    for name, section in sections.items():
        old = values.get(name)
        values[name] = {**old, **section} if isinstance(old, dict) else section
    return values


class Heard(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.clients = 0

    def message(self, text: str) -> None:
        self.said.append(text)

    def client(self, report: ClientReport) -> None:
        self.clients += 1


def metrics(done: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Heard]:
    heard = Heard()
    return run(
        laid_over(), output=tmp_path_factory.mktemp("runs") / "masked", listener=heard
    ), heard


def test_the_adapter_is_that_of_plain_sums(masked: tuple[Run, Heard], tmp_path: Path) -> None:
    done, heard = masked
    plain = run(CONFIG, output=tmp_path / "plain")
    (ours, _, _), (theirs, _, _) = map(read_adapter, (done.adapter, plain.adapter))
    assert ours.keys() == theirs.keys()
    moved = 0.0
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
        moved = max(moved, float(tensor.abs().max()) if "lora_B" in name else 0.0)
    assert moved > 1e-3  # or nothing would have been compared
    for own, other in zip(metrics(done)[1:], metrics(plain)[1:], strict=True):
        assert own["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert own["num_examples"] == other["num_examples"]
        assert own["bytes_up"] == other["bytes_up"] + 3 * 8  # two more words of each client
        assert {c["loss"] for c in own["clients"].values()} == {None}  # which nobody has seen
    assert any("3 must stay to its end" in text for text in heard.said)
    assert any("deploy.largest_update" in text for text in heard.said)
    assert heard.clients == 0
    assert done.summary["secure"] == {"aggregation": "masked", "threshold": 3}


def test_a_resumed_run_is_an_uninterrupted_one(masked: tuple[Run, Heard], tmp_path: Path) -> None:
    """Masks are drawn anew, and cancel."""
    with pytest.raises(KeyboardInterrupt):
        run(laid_over(), output=tmp_path / "run", listener=StopAfter(1))
    done = resume(tmp_path / "run")
    for name in ("metrics.jsonl", "checkpoint.safetensors"):
        assert (done.folder / name).read_bytes() == (masked[0].folder / name).read_bytes()


def test_examples_may_be_private_behind_masks(tmp_path: Path) -> None:
    private = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3}
    sections: dict[str, Any] = {"data": {"batch_size": 8}, "federation": {"rounds": 1}}
    done = run(laid_over(privacy=private, **sections), output=tmp_path / "run")
    assert done.summary["privacy"]["guarantee"]
    assert done.summary["secure"]["aggregation"] == "masked"
    tensors, _, _ = read_adapter(done.adapter)
    assert any(float(t.abs().max()) > 0 for n, t in tensors.items() if "lora_B" in n)


# --- the round loop, with clients that cannot be used ---

STATE = {"w": torch.zeros(4)}


class Steps:
    """Clients that add a number to all of `w`; one may add what is no number."""

    def __init__(self, **moved: float) -> None:
        self.moved = moved

    def train(self, request: TrainRequest) -> Any:
        for c in request.client_ids:
            report = ClientReport(c, 10, 0.5, 1, 0.1, rate_sum=0.1)
            yield Cohort((report,), {"w": request.state["w"][None] + self.moved[c]})


def rounds(engine: Steps, largest: float = 1.0) -> Any:
    strategy = create_strategy("fedavg")
    clients = dict.fromkeys(engine.moved, 10)
    masked_ = MaskedEngine(engine.train, 10, largest)
    return run_rounds(
        RunState(STATE), masked_, strategy, clients=clients, rounds=1,
        clients_per_round=len(clients), seed=0, quorum=Quorum(0.5), masked=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("odd", "kind", "words"),
    [(float("nan"), "finite", "not finite"), (3.0, "range", "changes a number by too much")],
)
def test_a_client_that_cannot_be_summed_is_left_out(odd: float, kind: str, words: str) -> None:
    (result,) = rounds(Steps(a=0.25, b=0.5, c=0.75, d=odd))
    assert result.state.shared["w"].tolist() == [0.5] * 4
    assert [r.client_id for r in result.reports] == ["a", "b", "c"]
    (left_out,) = result.left_out
    assert (left_out.client_id, left_out.kind) == ("d", kind)
    assert words in left_out.reason
    assert result.loss == pytest.approx(0.5, abs=1e-6)


def test_with_too_few_left_a_round_ends_without_a_sum() -> None:
    with pytest.raises(TrainingFailed, match=r"2 of 3 clients .* a masked sum needs 3.*is kept"):
        list(rounds(Steps(a=0.25, b=0.5, c=float("nan"))))


def test_changes_up_to_the_largest_are_summed() -> None:
    (result,) = rounds(Steps(a=3.0, b=-3.0, c=1.5), largest=3.0)
    assert result.state.shared["w"].tolist() == [0.5] * 4


# --- what does not go with masks ---


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"deploy": {"up": "fp16"}}, "deploy.up does not go with .*; use fp32"),
        ({"deploy": {"up": "int8"}}, "deploy.up does not go with .*; use fp32"),
        ({"deploy": {"largest_update": 10.0}}, "deploy.largest_update does not go with .*leave it"),
        ({"robust": {"attackers": 1}}, "robust.attackers does not go with .*leave it out"),
        ({"robust": {"largest_share": 0.5}}, "robust.largest_share .*use secure.most_examples"),
        ({"federation": {"strategy": "flexlora", "client_ranks": [2, 1, 1]}}, "client_ranks does"),
        ({"federation": {"ditto_mu": 0.1}}, "ditto_mu does not go with"),
        (
            {"federation": {"strategy": "fedavg", "scaffold": True}, "optimizer": {"name": "sgd"}},
            "scaffold does not go with",
        ),
        ({"privacy": {"unit": "client", "noise_multiplier": 1, "delta": 1e-3}}, "use privacy.unit"),
        ({"federation": {"num_clients": 2}}, "federation.num_clients: .* needs 3 clients a round"),
        ({"federation": {"clients_per_round": 2}}, "clients_per_round: .* needs 3 clients a round"),
        ({"deploy": {"sites": ["a", "b"]}}, "deploy.sites: .* needs 3 clients a round"),
        *(
            ({"federation": {"strategy": name}}, f"{name} reads more than that; use it with fedavg")
            for name in ("fedsa", "flora", "flexlora", "fedex", "fed_sb", "qfedavg", "local")
        ),
        ({"secure": {"aggregation": "plain"}}, "secure.aggregation must be"),
        ({"secure": {"aggregation": None, "largest_change": 0.5}}, "set secure.aggregation"),
        ({"secure": {"aggregation": None, "most_examples": 5}}, "set secure.aggregation"),
        ({"secure": {"largest_change": 0.0}}, "secure.largest_change must be"),
    ],
)
def test_what_does_not_go_with_masks_is_refused(sections: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        config_from_dict(laid_over(**sections))


def test_a_strategy_that_says_it_takes_the_mean_alone_and_does_not_is_found_out(
    tmp_path: Path,
) -> None:
    """Before the first round, and before a folder is made."""
    file = tmp_path / "own.py"
    file.write_text(
        "from fedclip.federated.strategies import Strategy\nclass Own(Strategy):\n"
        "    masks = True\n    def round(self, state, request, train):\n"
        "        train(request).stacked()\n        return state\n"
    )
    values = laid_over(federation={"strategy": f"{file}:Own"})
    with pytest.raises(UsageError, match="single updates"):
        run(values, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_masked_updates_give_the_mean_by_examples_and_nothing_else() -> None:
    report = ClientReport("a", 1, 1.0, 1, 0.0)
    cohort = Cohort((report,), {}, (), SecureSum({"w": torch.ones(4)}, 0.5))
    updates = SummedUpdates(TrainRequest(1, ("a",), STATE), [cohort])
    for take in (
        updates.stacked,
        lambda: updates.mean(lambda report: 1.0),
        lambda: updates.apply(lambda cohort: cohort),
    ):
        with pytest.raises(UsageError, match=r"secure.aggregation: masked"):
            take()
    assert updates.mean()["w"].tolist() == [1.0] * 4
    assert updates.loss == 0.5
    with pytest.raises(TrainingFailed, match="no masked sum"):
        SummedUpdates(TrainRequest(1, ("a",), STATE), []).mean()


def test_a_share_of_the_clients_must_be_three(tmp_path: Path) -> None:
    """Their number is known when the data are."""
    values = laid_over(federation={"num_clients": 4, "clients_per_round": 0.5})
    with pytest.raises(UsageError, match="needs 3 clients a round at least"):
        run(values, output=tmp_path / "run")
