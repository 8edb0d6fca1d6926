"""Robust rules around strategies: what they make of a round, and what they do not go with."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from fedclip.config.loading import config_from_dict, load_config
from fedclip.errors import FedclipWarning, TrainingFailed, UsageError
from fedclip.experiment import run as experiment
from fedclip.experiment.identity import code_sha256
from fedclip.federated.robust import Robust, RobustPlan
from fedclip.federated.rounds import run_rounds
from fedclip.federated.strategies import Setting, create_strategy
from fedclip.federated.updates import Quorum
from fedclip.lora.names import pair_of
from fedclip.lora.robust_rules import RULES, Rule
from fedclip.lora.robust_rules import mixing as nearest
from fedclip.records import ClientReport, Cohort, RunState

A, B = pair_of("layer")
CLIENTS = {c: 10 * (1 + i) for i, c in enumerate("abcde")}
ORTHONORMAL = torch.eye(2, 4)  # so that distances of B are those of B A
STATE = {A: ORTHONORMAL, B: torch.zeros(3, 2), "head": torch.zeros(3)}
SETTING = Setting(scalings={"layer": 2.0})


def steps(seed=1):
    """What each client adds to B; the first is hostile."""
    draw = torch.Generator().manual_seed(seed)
    moved = 0.3 + 0.1 * torch.randn(len(CLIENTS), 3, 2, generator=draw)
    moved[0] *= -6
    return dict(zip(CLIENTS, moved, strict=True))


class Engine:
    """Clients that add their step to B, and to a head; one may write its product otherwise."""

    def __init__(self, moved=None, gauge=1.0):
        self.moved, self.gauge = moved or steps(), gauge

    def train(self, request):
        names = request.state if request.trained is None else request.trained
        for c in request.client_ids:
            g = self.gauge if c == "a" else 1.0
            sent = {
                A: request.state[A] / g,
                B: (request.state[B] + self.moved[c][: request.state[B].shape[0]]) * g,
                "head": request.state["head"] + self.moved[c][:, 0],
            }
            report = ClientReport(c, CLIENTS[c], 0.5, 4, 0.1, rate_sum=0.4)
            yield Cohort((report,), {n: sent[n][None] for n in sorted(names)})


def plan(name, f=1, **keys):
    return RobustPlan(name, RULES[name], f, **keys)


def played(strategy, rounds=1, engine=None, **keys):
    return list(
        run_rounds(
            RunState(STATE),
            engine or Engine(),
            strategy,
            clients=CLIENTS,
            rounds=rounds,
            clients_per_round=len(CLIENTS),
            seed=0,
            **keys,
        )
    )


def changes():
    """The changes as vectors of B A at their scaling, and the head."""
    order = sorted(CLIENTS, key=lambda c: -CLIENTS[c])
    moved = [steps()[c].double() for c in order]
    return order, torch.stack([torch.cat([2.0 * m.flatten(), m[:, 0]]) for m in moved])


@pytest.mark.parametrize("mixing", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("strategy", ["ffa", "fedsvd", "rolora"])
def test_the_mean_is_the_rules_and_ignores_examples(strategy, name, mixing):
    inner = create_strategy(strategy, SETTING)
    (result,) = played(Robust(inner, plan(name, mixing=mixing)))
    order, x = changes()
    gram, rule = (x @ x.T).numpy(), RULES[name]
    mixed = torch.from_numpy(nearest(gram, 1)) if mixing else torch.eye(5, dtype=torch.float64)
    moved = torch.stack([steps()[c].double() for c in order]).flatten(1)
    if rule.coordinates:
        expected = torch.from_numpy(rule.apply((mixed @ moved).numpy(), 1))
    else:
        weights = rule.apply((mixed @ x @ x.T @ mixed.T).numpy(), 1)
        expected = torch.from_numpy(weights) @ mixed @ moved
        told = torch.from_numpy(weights) @ mixed
        assert [result.weights[c] for c in order] == pytest.approx(told.tolist(), abs=1e-9)
    after = result.state.shared
    product = (after[B] @ after[A]).double()
    torch.testing.assert_close(product, expected.view(3, 2) @ ORTHONORMAL.double(),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert [r.client_id for r in result.reports] == order
    assert result.bytes_up == 5 * 4 * (6 + 3)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.coordinates])
@pytest.mark.parametrize("gauge", [1.0, 1000.0])
def test_products_are_weighed_however_a_client_writes_its_factors(name, gauge):
    """(B t, A / t) changes neither the distances nor the sum of products."""
    inner = create_strategy("flora", SETTING)
    (result,) = played(Robust(inner, plan(name)), engine=Engine(gauge=gauge))
    order, x = changes()
    weights = torch.from_numpy(RULES[name].apply((x @ x.T).numpy(), 1))
    products = torch.stack([2.0 * steps()[c].double() @ ORTHONORMAL.double() for c in order])
    expected = torch.tensordot(weights, products, dims=1)
    torch.testing.assert_close(result.state.shift["layer"].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_mean_of_factors_is_ruined_by_such_a_client_and_no_rule_goes_with_it():
    plain = played(create_strategy("fedit", SETTING))[0].state.shared
    ruined = played(create_strategy("fedit", SETTING), engine=Engine(gauge=1000.0))[0].state.shared
    assert (ruined[B] @ ruined[A]).norm() > 100 * (plain[B] @ plain[A]).norm()


@pytest.mark.parametrize("name", ["multi_krum", "median"])
def test_fed_sb_has_cores_from_the_second_round_on(name):
    """The first round needs products, for which a coordinate rule takes the geometric median."""

    class Cores(Engine):
        def train(self, request):
            for cohort in super().train(replace(request, trained=None)):
                tensors = dict(cohort.tensors)
                if request.frames:
                    tensors = {B: (request.state[B] + 0.1)[None], "head": tensors["head"]}
                yield replace(cohort, tensors=tensors)

    first, second = played(
        Robust(create_strategy("fed_sb", SETTING), plan(name)), 2, engine=Cores()
    )
    before, after = first.state.server["core/layer"], second.state.server["core/layer"]
    torch.testing.assert_close(after, before + 0.1)


def test_an_update_far_too_large_is_left_out_before_the_rule():
    moved = steps()
    moved["a"] = moved["a"] * 30
    inner = create_strategy("ffa", SETTING)
    (result,) = played(Robust(inner, plan("trimmed_mean")), engine=Engine(moved))
    (fault,) = result.left_out
    assert (fault.client_id, fault.kind) == ("a", "size")
    honest = torch.stack([moved[c] for c in "bcde"])  # nobody is trimmed: the hostile one is out
    torch.testing.assert_close(result.state.shared[B], honest.mean(dim=0))


def test_too_few_updates_end_the_round():
    class Fewer(Engine):
        def train(self, request):
            for cohort in super().train(request):
                if cohort.reports[0].client_id in "ab":
                    cohort.tensors[B][:] = math.nan
                yield cohort

    strategy = Robust(create_strategy("ffa", SETTING), plan("multi_krum"))
    with pytest.raises(TrainingFailed, match=r"round 1: .*multi_krum needs 5 to bear 1 hostile"):
        played(strategy, engine=Fewer(), quorum=Quorum(0.5))


@pytest.mark.parametrize(
    "weights", [[1.0], [math.nan] * 5, [0.5] * 5, [-0.1] * 5, [0.0] * 5], ids=str
)
def test_a_users_rule_must_give_weights(weights):
    own = RobustPlan("own.py:rule", Rule(lambda gram, f: weights), 1)
    with pytest.raises(UsageError, match=r"robust.rule: .*own.py:rule"):
        played(Robust(create_strategy("ffa", SETTING), own))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("def rule(gram, f): return [1 / len(gram)] * len(gram)", None),
        ("def rule(gram): return gram", r"own.py:rule: TypeError: "),
        ("rule = 3", r"own.py:rule must be a function \(gram, f\) of weights"),
        ("import nothing_there", "own.py cannot be loaded"),
    ],
)
def test_a_rule_in_a_users_file(tmp_path, monkeypatch, code, why):
    """It is kept by its full path, and its digest is part of what a run is."""
    (tmp_path / "own.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    values = {
        "model": {"model_name": "tiny", "lora": {"r": 2, "last_layers": 1}},
        "data": {"name": "digits", "max_train_examples": 60, "partition": {"name": "iid"}},
        "federation": {"strategy": "ffa", "num_clients": 3, "rounds": 1},
        "evaluation": {"max_examples": 5},
        "robust": {"rule": "own.py:rule", "attackers": 1},
        "device": "cpu",
    }
    config = config_from_dict(values)
    if why is not None:
        with pytest.raises(UsageError, match=f"robust.rule: .*{why}"):
            experiment.run(config, output="run")
        return
    done = experiment.run(config, output="run")
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert kept.robust.rule == f"{tmp_path / 'own.py'}:rule"
    assert list(code_sha256(kept)) == [str(tmp_path / "own.py")]
    weights = json.loads((done.folder / "metrics.jsonl").read_text().splitlines()[-1])["weights"]
    assert list(weights.values()) == pytest.approx([1 / 3] * 3)


def test_a_cap_is_on_the_weight_and_says_so():
    """Of 10 to 50 examples, two are above a quarter: t = 0.25 (2 t + 60) = 30."""
    with pytest.warns(FedclipWarning, match=r"robust.largest_share: 0.25") as caught:
        first, second = played(Robust(create_strategy("ffa", SETTING), 0.25), rounds=2)
    told = sorted(str(warning.message).partition(" (")[0] for warning in caught)
    assert told == [  # once, though there are two rounds
        "d has 40 examples, 26.7% of the round's, and weighs 25.0%",
        "e has 50 examples, 33.3% of the round's, and weighs 25.0%",
    ]
    assert first.weights == {"e": pytest.approx(0.25), "d": pytest.approx(0.25)}
    assert {r.client_id: r.num_examples for r in first.reports} == CLIENTS
    weights = {"a": 10, "b": 20, "c": 30, "d": 30, "e": 30}
    expected = sum(weights[c] * steps()[c] for c in weights) / 120
    torch.testing.assert_close(first.state.shared[B], expected)
    assert second.weights == first.weights


FFA = {"strategy": "ffa", "num_clients": 5}
BAD = {
    "half of them": (
        {"attackers": 3},
        FFA,
        r"needs 9 clients a round for 3 .*\.num_clients gives 5",
    ),
    "krum of four": ({"attackers": 1}, {**FFA, "num_clients": 4}, r"needs 5 .* 4.*2 f \+ 3"),
    "rfa of two": (
        {"rule": "rfa", "attackers": 1},
        {**FFA, "num_clients": 2},
        "needs 3 clients a round .*3 clients bear one at best",
    ),
    "one": ({"rule": "median", "attackers": 1}, {**FFA, "num_clients": 1}, "needs 3 clients"),
    "drawn": ({"attackers": 1}, {**FFA, "clients_per_round": 3}, "clients_per_round gives 3"),
    "how many": ({"rule": "rfa"}, FFA, "robust.attackers must say how many"),
    "none": ({"attackers": 0}, FFA, "robust.attackers must be .*>= 1"),
    "unknown": ({"rule": "multikrum", "attackers": 1}, FFA, "did you mean multi_krum"),
    "mixing alone": ({"mixing": True}, FFA, "goes before a rule: set robust.rule"),
    "both": ({"attackers": 1, "largest_share": 0.5}, FFA, "caps weights by examples, by which"),
    "share": ({"largest_share": 1.0}, FFA, "largest_share must be"),
    "means of factors": ({"attackers": 1}, {"strategy": "fedit"}, r"\(B t, A / t\) .*; use fed_sb"),
    "fedavg": ({"attackers": 1}, {}, r"does not go with federation.strategy: fedavg: a client"),
    "numbers of products": (
        {"rule": "median", "attackers": 1},
        {"strategy": "flora"},
        "needs one factor that all clients share; use fed_sb, fedsvd, ffa, rolora",
    ),
    "alone": ({"attackers": 1}, {"strategy": "local"}, "does not go with .*local"),
    "scaffold": ({"attackers": 1}, {**FFA, "scaffold": True}, "federation.scaffold reads each"),
    "cap of losses": ({"largest_share": 0.5}, {"strategy": "qfedavg"}, "by which qfedavg does not"),
    "groups": ({"attackers": 1}, {**FFA, "sharing": {"mode": "clusters"}}, "sharing.mode reads"),
}


@pytest.mark.parametrize(("robust", "federation", "why"), BAD.values(), ids=BAD)
def test_what_does_not_go_together_is_said(robust, federation, why):
    values = {"robust": robust, "federation": federation, "optimizer": {"name": "sgd"}}
    with pytest.raises(UsageError, match=why):
        config_from_dict({**values, "data": {"partition": {"name": "iid"}}})


@pytest.mark.parametrize(
    ("robust", "more"),
    [
        ({"attackers": 1}, {"federation": FFA}),
        ({"rule": "rfa", "attackers": 2}, {"federation": {**FFA, "strategy": "flexlora"}}),
        ({"rule": "median", "attackers": 1}, {"federation": {**FFA, "strategy": "fed_sb"}}),
        ({"rule": "median", "attackers": 1}, {"federation": {**FFA, "ditto_mu": 0.1}}),
        (
            {"rule": "median", "attackers": 1},
            {"model": {"head": "linear", "lora": {"enabled": False}}, "federation": {}},
        ),
        ({"largest_share": 0.4}, {"federation": {}}),
    ],
)
def test_what_goes_together_is_taken(robust, more):
    assert config_from_dict({"robust": robust, **more}).robust.least >= 1


def test_one_of_five_that_flips_its_sign_is_borne(tmp_path):
    """Minus eight times its step from one of five turns the mean round; not multi-Krum's."""
    values = {
        "model": {"model_name": "tiny", "lora": {"r": 4, "last_layers": 1}},
        "data": {"name": "digits", "max_train_examples": 300, "partition": {"name": "iid"}},
        "federation": {"strategy": "ffa", "num_clients": 5, "rounds": 4},
        "client": {"learning_rate": 2e-2, "local_epochs": 2},
        "evaluation": {"max_examples": 200, "every": 4},
        "attack": {"name": "sign_flip", "clients": 1, "strength": 8.0},
        "device": "cpu",
    }
    found = {}
    for name, robust in {"mean": {}, "multi_krum": {"attackers": 1}}.items():
        done = experiment.run({**values, "robust": robust}, output=tmp_path / name)
        found[name] = done.summary
        lines = (done.folder / "metrics.jsonl").read_text().splitlines()
    last, (hostile,) = json.loads(lines[-1]), found["mean"]["attack"]["clients"]
    assert last["weights"][hostile] == 0
    assert sum(last["weights"].values()) == pytest.approx(1)
    before = found["mean"]["zero_shot_accuracy"]
    assert found["mean"]["accuracy"] < before - 0.3
    assert found["multi_krum"]["accuracy"] > before + 0.1
