"""What may be aggregated: checks of updates in every engine, and guards around `train`."""

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from fedclip.errors import TrainingFailed, UsageError
from fedclip.federated.local_steps import LocalSettings
from fedclip.federated.rounds import RoundPlan, run_rounds
from fedclip.federated.strategies import Setting, Strategy, create_strategy
from fedclip.federated.strategies.averaging import FedAvg
from fedclip.federated.strategies.base import guarded
from fedclip.federated.strategies.groups import Clustered, Grouped
from fedclip.federated.strategies.wrappers import Ditto, Scaffold, ServerOptimizer
from fedclip.federated.update_checks import check, outliers
from fedclip.federated.updates import Guarded, Kept, Quorum, Updates
from fedclip.records import ClientReport, ClientUpdate, Cohort, RunState, TrainRequest

LAYER = "base_model.model.layer"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
STATE = {A: torch.ones(2, 4), B: torch.zeros(3, 2), "head": torch.zeros(3)}
CLIENTS = {"a": 10, "b": 30, "c": 20, "d": 5}
REQUEST = TrainRequest(4, ("a", "b"), STATE)
REPORT = ClientReport("a", 10, loss=0.5, steps=3, seconds=0.1, rate_sum=0.3, start_loss=0.7)


def changed(name, tensor):
    return {**STATE, name: tensor}


ASKED_OFFSETS = replace(REQUEST, offsets={"a": STATE})
ASKED_START_LOSS = replace(REQUEST, start_loss=True)
WRONG = {
    "NaN": (changed(B, torch.full((3, 2), math.nan)), REPORT, REQUEST, "finite", B),
    "infinity": (changed(B, torch.full((3, 2), -math.inf)), REPORT, REQUEST, "finite", B),
    "loss": (
        STATE,
        replace(REPORT, loss=math.inf),
        REQUEST,
        "finite",
        "a loss that is not finite: inf",
    ),
    "start loss": (
        STATE,
        replace(REPORT, start_loss=math.nan),
        ASKED_START_LOSS,
        "finite",
        "start_loss that is not finite: nan",
    ),
    "rates": (STATE, replace(REPORT, rate_sum=math.nan), ASKED_OFFSETS, "finite", "rate_sum"),
    "shape": (changed(A, torch.ones(1, 4)), REPORT, REQUEST, "shape", r"\[1, 4\], \[2, 4\] was"),
    "broadcast": (changed("head", torch.zeros(1)), REPORT, REQUEST, "shape", r"\[1\], \[3\] was"),
    "format": (changed(A, torch.ones(2, 4).half()), REPORT, REQUEST, "dtype", "float16, float32"),
    "missing": ({A: STATE[A], B: STATE[B]}, REPORT, REQUEST, "names", "does not send head"),
    "unknown": (changed("x", torch.ones(1)), REPORT, REQUEST, "names", "sends .x., which was not"),
    "untrained": (STATE, REPORT, replace(REQUEST, trained=frozenset({B})), "names", "not asked"),
}


@pytest.mark.parametrize(
    ("tensors", "report", "request_", "kind", "words"), WRONG.values(), ids=WRONG
)
def test_what_must_not_be_aggregated_has_a_reason(tensors, report, request_, kind, words):
    reason = check(ClientUpdate(report, tensors), request_)
    assert reason is not None
    assert reason.kind == kind
    assert re.search(words, reason.words)


def test_what_was_asked_for_is_taken():
    assert check(ClientUpdate(REPORT, STATE), REQUEST) is None
    assert check(ClientUpdate(REPORT, STATE), ASKED_OFFSETS) is None
    assert check(ClientUpdate(REPORT, STATE), ASKED_START_LOSS) is None
    # What a client keeps may come along in simulation, and stays away over a network.
    sends_b = replace(REQUEST, sent=frozenset({B}))
    assert check(ClientUpdate(REPORT, STATE), sends_b) is None
    assert check(ClientUpdate(REPORT, {B: STATE[B]}), sends_b) is None
    # Numbers that nobody asked for may be unknown.
    unknown = replace(REPORT, rate_sum=math.nan, start_loss=math.nan)
    assert check(ClientUpdate(unknown, STATE), REQUEST) is None


def test_sizes_are_compared_with_the_median_of_the_others():
    found = outliers({"a": 1.0, "b": 2.0, "c": 90.0}, limit=20, usual=None)
    assert list(found) == ["c"]  # the others' median is 1.5
    assert found["c"].times == 60
    assert not outliers({"a": 90.0}, limit=20, usual=None)
    assert outliers({"a": 90.0}, limit=20, usual=1.0)["a"].times == 90


class Engine:
    """Clients that move by a step of their own; two of them at a time."""

    def __init__(self, poison=None):
        self.poison = poison or {}

    def train(self, request):
        ids = request.client_ids
        for group in (ids[:2], ids[2:]):
            if not group:
                continue
            names = request.state if request.trained is None else request.trained
            steps = torch.tensor([0.1 + 0.2 * ("abcd".index(c) % 2) for c in group])
            tensors = {
                n: request.state[n] + steps.view(-1, *[1] * request.state[n].dim()) for n in names
            }
            for row, client_id in enumerate(group):
                if client_id in self.poison:
                    tensors[B][row, 0, 0] = self.poison[client_id]
            reports = tuple(
                ClientReport(c, CLIENTS[c], 0.5, 4, 0.1, rate_sum=0.4, start_loss=0.6)
                for c in group
            )
            yield Cohort(reports, tensors)


def played(strategy, rounds=2, engine=None, **keys):
    return list(
        run_rounds(
            RunState(STATE),
            engine or Engine(),
            strategy,
            clients=CLIENTS,
            rounds=rounds,
            clients_per_round=4,
            seed=0,
            **keys,
        )
    )


def test_no_engine_gets_numbers_into_the_state_that_are_not_finite():
    engine = Engine({"c": math.nan, "a": math.inf})
    # The largest client comes first, so of a and c it is c; the loss itself is a number.
    with pytest.raises(TrainingFailed, match=rf"client c, round 1: .*not finite .*{B}.*rate"):
        played(FedAvg(), engine=engine)


class Around(Strategy):
    """What privacy and robust rules will be: a strategy inside, and a guard around `train`."""

    def __init__(self, inner, guard):
        super().__init__(inner.setting)
        self._inner = inner
        self._guard = guard

    def round(self, state, request, train):
        return self._inner.round(state, request, guarded(train, self._guard))


STEPS = {"learning_rate": 0.5, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
SETTING = Setting(scalings={"layer": 1.0})
STRATEGIES = {
    "fedavg": lambda: FedAvg(SETTING),
    "flora": lambda: create_strategy("flora", SETTING),
    "scaffold": lambda: Scaffold(FedAvg(SETTING), 4),
    "ditto": lambda: Ditto(FedAvg(SETTING), 0.1),
    "server optimizer": lambda: ServerOptimizer(FedAvg(SETTING), "adam", STEPS),
    "groups": lambda: Grouped(FedAvg(SETTING), {"a": "x", "b": "y", "c": "x", "d": "y"}),
    "clusters": lambda: Clustered(FedAvg(SETTING), CLIENTS, 1, 2),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_guard_that_lets_all_through_changes_nothing_not_even_the_books(strategy):
    plain, around = played(strategy()), played(Around(Around(strategy(), Guarded), Guarded))
    for one, other in zip(plain, around, strict=True):
        assert one.reports == other.reports
        assert one.bytes_up == other.bytes_up
        assert one.bytes_down == other.bytes_down
        flat, same = one.state.flat(), other.state.flat()
        assert flat.keys() == same.keys()
        assert all(torch.equal(flat[n], same[n]) for n in flat)


class Secret(Guarded):
    """Refuses single updates; its mean is that of updates clipped to steps of a tenth."""

    def __init__(self, inner):
        super().__init__(inner)
        self.apply(self.clipped)

    def clipped(self, cohort):
        start = self.request.state
        tensors = {n: start[n] + (t - start[n]).clamp(max=0.1) for n, t in cohort.tensors.items()}
        return Cohort(cohort.reports, tensors)

    def mean(self, weigh=None):
        return super().mean(lambda report: 1.0)

    def stacked(self):
        raise UsageError("single updates are not to be seen")


def test_a_guard_decides_what_a_mean_gives():
    (result,) = played(Around(FedAvg(SETTING), Secret), rounds=1)
    assert torch.allclose(result.state.shared[B], STATE[B] + 0.1)  # steps were 0.1 and 0.3
    assert result.bytes_up == 4 * 4 * (8 + 6 + 3)  # four clients, fp32


@pytest.mark.parametrize("name", ["flora", "scaffold", "ditto", "clusters"])
def test_a_guard_refuses_a_strategy_that_looks_at_single_updates(name):
    with pytest.raises(UsageError, match="not to be seen"):
        played(Around(STRATEGIES[name](), Secret), rounds=1)


def test_kept_updates_can_be_taken_again_and_in_parts():
    request = TrainRequest(1, ("a", "b", "c"), STATE)
    kept = Kept(Updates(request, Engine().train(request)))
    assert kept.stacked() is kept.stacked()
    mean = kept.mean()[B]  # steps 0.1, 0.3, 0.1 with 10, 30 and 20 examples
    assert torch.allclose(mean, torch.full((3, 2), (10 * 0.1 + 30 * 0.3 + 20 * 0.1) / 60))
    part = kept.of(replace(request, client_ids=("c", "b"))).stacked()
    assert [report.client_id for report in part.reports] == ["c", "b"]
    assert torch.allclose(part.tensors["head"][:, 0], torch.tensor([0.1, 0.3]))


class Spoils(FedAvg):
    """Fine in the first round; then it divides by nothing."""

    def round(self, state, request, train):
        after = super().round(state, request, train)
        bad = after.shared[B] / (0 if request.server_round > 1 else 1)
        return replace(after, shared={**after.shared, B: bad})


def test_what_an_aggregation_gives_is_checked_and_the_rounds_before_are_kept():
    kept = []
    with pytest.raises(UsageError, match=rf"round 2: Spoils gives .* not finite .*{B}.* kept"):
        kept.extend(
            run_rounds(RunState(STATE), Engine(), Spoils(), clients=CLIENTS, rounds=3,
                       clients_per_round=4, seed=0)
        )  # fmt: skip
    # A product of finite numbers may be none.
    huge = Engine(dict.fromkeys("abcd", 3.3e38))
    with pytest.raises(UsageError, match=r"round 1: FLoRA (gives|cannot combine)"):
        played(create_strategy("flora", SETTING), rounds=2, engine=huge)


def test_several_processes_agree_on_who_is_left_out():
    """Each has half of the clients; a client of either is left out by both."""
    barrier, sums = threading.Barrier(2), {}

    def combine(rank):
        def sum_(tensors):
            sums[rank] = [t.clone() for t in tensors]
            barrier.wait(60)
            for own, other in zip(tensors, sums[1 - rank], strict=True):
                own += other
            barrier.wait(60)

        return sum_

    ids = ("b", "c", "a", "d")
    request = TrainRequest(1, ids, STATE)

    def process(rank, take):
        engine = Engine({"c": math.nan, "d": math.inf})
        shares = engine.train(replace(request, client_ids=ids[2 * rank : 2 * rank + 2]))
        updates = Updates(request, shares, combine(rank), quorum=Quorum(0.5))
        return getattr(updates, take)(), updates

    for take in ("mean", "stacked"):
        with ThreadPoolExecutor(2) as pool:
            both = [f.result(60) for f in [pool.submit(process, r, take) for r in (0, 1)]]
        for found, updates in both:
            assert [r.client_id for r in updates.reports] == ["b", "a"]
            assert [one.client_id for one in updates.left_out] == ["c", "d"]
            assert {one.kind for one in updates.left_out} == {"finite"}
            got = found[B] if take == "mean" else found.tensors[B][:, 0, 0]
            b, a = 0.3, 0.1
            expected = torch.tensor([b, a]) if take == "stacked" else (30 * b + 10 * a) / 40
            assert torch.allclose(got, torch.as_tensor(expected), atol=1e-6)


def test_a_quorum_is_a_number_or_a_share_and_never_less_than_a_rule_needs():
    assert Quorum(0.5).needed(5) == 3
    assert Quorum(2).needed(5) == 2
    assert Quorum(9).needed(5) == 5
    assert Quorum(0.01).needed(5) == 1
    assert Quorum(0.5, least=5).needed(4) == 5
    request = TrainRequest(1, ("a", "b", "c", "d"), STATE)
    for quorum, fails in ((Quorum(0.75), False), (Quorum(1.0), True)):
        updates = Updates(request, Engine({"c": math.nan}).train(request), quorum=quorum)
        if fails:
            with pytest.raises(TrainingFailed, match=r"3 of 4 .* 4 are needed .*client c, round 1"):
                updates.mean()
        else:
            updates.mean()
            assert [r.client_id for r in updates.reports] == ["a", "b", "d"]


def test_steps_and_their_rates_are_held_to_the_plan():
    """20 examples in batches of 8 over 2 epochs: 6 steps of 0.1, which fp16 may leave out."""
    plan = RoundPlan(LocalSettings(local_epochs=2, batch_size=8, learning_rate=0.1), 0.0, 0.5)
    assert plan.most_steps(20) == 6
    assert replace(plan, settings=replace(plan.settings, accumulation_steps=2)).most_steps(20) == 4
    request = replace(ASKED_OFFSETS, plan=plan)
    for steps, rates, fits in (
        (6, 0.6, True), (6, 0.1, True), (6, 0.0, True), (5, 0.5, True),
        (7, 0.6, False), (6, 0.61, False), (6, 0.09, False), (6, 1e-300, False),
    ):  # fmt: skip
        report = replace(REPORT, num_examples=20, steps=steps, rate_sum=rates)
        assert (check(ClientUpdate(report, STATE), request) is None) == fits, (steps, rates)
    falling = replace(plan, settings=replace(plan.settings, schedule="linear"))
    # From 0 to a half of the run: the last of 6 steps has 0.1 (1 - 0.5 * 5 / 6).
    assert falling.rate(5 / 6) == pytest.approx(0.1 * (1 - 2.5 / 6))


def test_a_client_that_was_left_out_when_clusters_were_found_joins_the_largest():
    strategy = Clustered(FedAvg(SETTING), CLIENTS, 1, 2)
    (first, second) = played(strategy, engine=Engine({"d": math.nan}), quorum=Quorum(0.5))
    assert set(first.state.member_of) == set(CLIENTS)
    (fault,) = second.left_out
    assert fault.client_id == "d"


def test_the_largest_start_loss_that_is_taken_is_no_end_of_q_fedavg():
    """1e6 to the power of 100 is no number of float64; a share of it is."""

    class Louder(Engine):
        def train(self, request):
            for cohort in super().train(request):
                loud = [replace(r, start_loss=1e6 if r.client_id == "b" else 0.5)
                        for r in cohort.reports]  # fmt: skip
                yield replace(cohort, reports=tuple(loud))

    strategy = create_strategy("qfedavg", Setting(options={"q": 100.0}))
    (result,) = played(strategy, rounds=1, engine=Louder())
    # b has all the weight: w - F^q D / (q F^(q-1) |D|^2 + L F^q), |D|^2 = 17 (0.3 / 0.1)^2, L = 10
    share = 3.0 / (100 * 17 * 9 / 1e6 + 10)
    assert torch.allclose(result.state.shared[B], torch.full((3, 2), share), rtol=1e-5)
