"""The engine some of whose clients are hostile: whose rows it changes, and what it leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedclip.config import AttackConfig
from fedclip.errors import FedclipWarning, UsageError
from fedclip.federated.hostile import Attacked, claimed, hostile_clients
from fedclip.lora.attacks import ATTACKS
from fedclip.lora.names import pair_of
from fedclip.records import ClientReport, Cohort, LeftOut, TrainRequest

A, B = pair_of("layer")
STATE = {A: torch.ones(2, 4), B: torch.full((3, 2), 0.5), "head": torch.zeros(3)}
EXAMPLES = {"a": 10, "b": 40, "c": 20, "d": 30}


class Engine:
    """Clients that add their place in the alphabet to every number, two in a cohort."""

    def __init__(self, **moved):
        self.moved = {c: float(place + 1) for place, c in enumerate("abcd")} | moved
        self.asked = None

    def train(self, request):
        self.asked = request.client_ids
        names = sorted(request.state if request.trained is None else request.trained)
        for pair in (request.client_ids[:2], request.client_ids[2:]):
            reports = tuple(ClientReport(c, EXAMPLES[c], 0.5, 4, 0.1) for c in pair)
            start = [request.start(c) for c in pair]
            tensors = {
                n: torch.stack([s[n] + self.moved[c] for c, s in zip(pair, start, strict=True)])
                for n in names
            }
            yield Cohort(reports, tensors, (LeftOut("e", "finite", "is ill"),) * (pair[0] == "b"))


def played(name, hostile=("a", "d"), engine=None, strength=None, **request):
    row, ids = ATTACKS[name], tuple(sorted(EXAMPLES, key=lambda c: -EXAMPLES[c]))
    strength = row.strength if strength is None else strength
    whole = Attacked(engine or Engine(), row, strength or 0.0, frozenset(hostile), EXAMPLES, 0)
    asked = {"server_round": 1, "client_ids": ids, "state": STATE} | request
    (cohort,) = whole.train(TrainRequest(**asked))
    return cohort


def row(cohort, client):
    place = [r.client_id for r in cohort.reports].index(client)
    return {name: tensor[place] for name, tensor in cohort.tensors.items()}


def test_hostile_clients_send_the_attack_and_honest_ones_what_they_trained():
    cohort = played("sign_flip", strength=5)
    for client, moved in {"a": -5.0, "b": 2.0, "c": 3.0, "d": -20.0}.items():
        for name, tensor in row(cohort, client).items():
            torch.testing.assert_close(tensor, STATE[name] + moved)
    assert [one.client_id for one in cohort.left_out] == ["e"]


def test_changes_are_those_from_each_clients_own_start():
    starts = {"a": {"head": torch.full((3,), 7.0)}}
    found = row(played("scaling", strength=2, starts=starts), "a")
    torch.testing.assert_close(found["head"], torch.full((3,), 7.0 + 2.0))


def test_what_stays_at_a_client_is_not_attacked():
    found = row(played("scaling", strength=2, sent=frozenset({A})), "a")
    torch.testing.assert_close(found[A], STATE[A] + 2)
    torch.testing.assert_close(found[B], STATE[B] + 1)


def test_attackers_know_the_finite_updates_of_the_honest_alone():
    """Of b, c and d, c has diverged: the mean is that of 2 and 4."""
    found = played("ipm", hostile="a", strength=1, engine=Engine(c=math.nan))
    torch.testing.assert_close(row(found, "a")["head"], torch.full((3,), -3.0))
    assert row(found, "c")["head"].isnan().all()


def test_a_gauge_leaves_the_product_as_it_is():
    honest, found = row(played("scaling", hostile=""), "a"), row(played("gauge"), "a")
    torch.testing.assert_close(found[B], 1000 * honest[B])
    torch.testing.assert_close(found[B] @ found[A], honest[B] @ honest[A], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["head"], honest["head"])
    with pytest.warns(FedclipWarning, match="needs both factors to travel"):
        found = played("gauge", trained=frozenset({B}))
    torch.testing.assert_close(row(found, "a")[B], honest[B])


def test_examples_are_claimed_and_trained_on_as_they_are():
    engine = Engine()
    ids = ("a", "d", "b", "c")  # as they claim
    cohort = played("inflation", engine=engine, client_ids=ids)
    assert engine.asked == ("b", "d", "c", "a")
    told = {r.client_id: r.num_examples for r in cohort.reports}
    assert told == {"a": 1000, "b": 40, "c": 20, "d": 3000}
    assert told == claimed(EXAMPLES, {"a", "d"}, 100)
    assert claimed({"a": 10**8}, {"a"}, 1e4) == {"a": 10**9}


def test_a_round_in_which_nobody_is_heard_is_left_as_it_is():
    class Nobody:
        def train(self, request):
            yield Cohort((), {}, (LeftOut("a", "finite", "is ill"),))

    cohort = played("sign_flip", engine=Nobody())
    assert cohort.reports == ()
    assert [one.client_id for one in cohort.left_out] == ["a"]


def test_hostile_clients_follow_from_the_seed_and_their_number():
    ids = [f"client-{number:02}" for number in range(20)]
    attack = AttackConfig(name="alie", clients=6)
    found = hostile_clients(attack, ids, 3)
    assert found == hostile_clients(AttackConfig(name="ipm", clients=6), list(reversed(ids)), 3)
    assert len(found) == 6
    assert found != hostile_clients(attack, ids, 4)
    assert not hostile_clients(AttackConfig(name="alie", clients=0), ids, 3)
    assert not hostile_clients(AttackConfig(clients=6), ids, 3)
    with pytest.raises(UsageError, match="6 hostile clients leave none"):
        hostile_clients(attack, ids[:6], 3)


def test_noise_is_the_same_at_every_attempt_at_a_round():
    again = [row(played("gaussian", server_round=n), "a")["head"].numpy() for n in (2, 2, 3)]
    assert (again[0] == again[1]).all()
    assert not np.allclose(again[0], again[2])
