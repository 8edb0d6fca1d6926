"""The audits: their statistics by hand, what they plant, runs of them, and a build that leaks."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

import fedclip.federated.privacy.client_level as client_level
import fedclip.federated.privacy.dp_sgd as dp_sgd
from fedclip.config.loading import config_from_dict
from fedclip.errors import UsageError
from fedclip.experiment.audit.canaries import example_audit, plant
from fedclip.experiment.audit.command import attack
from fedclip.experiment.audit.directions import Directions, direction_audit
from fedclip.experiment.audit.figures import Scores, judged
from fedclip.experiment.audit.membership import divide, membership_audit
from fedclip.experiment.build import load_data
from fedclip.federated.privacy.audit import (
    gaussian_epsilon,
    lower_bound,
    right_guesses,
    separation,
    stratified_auc,
)
from fedclip.reports.listener import Listener
from tests.experiment.test_privacy import CONFIG, with_

SCORES = np.array([0.9, 0.1, 0.8, 0.3, 0.5, 0.2])
INSIDE = np.array([True, False, False, True, True, False])
ONE = np.zeros(6, np.int64)
PLAIN = dict.fromkeys(CONFIG["privacy"])


def test_auc_and_guesses_by_hand():
    # Pairs (in, out): 0.9 beats all three, 0.5 and 0.3 beat two each: 7 of 9.
    assert stratified_auc(SCORES, INSIDE, ONE).auc == pytest.approx(7 / 9)
    assert stratified_auc(np.zeros(6), INSIDE, ONE).auc == 0.5
    # Highest two: 0.9 is in, 0.8 is not; lowest two: 0.1 and 0.2, both out.
    assert right_guesses(SCORES, INSIDE, 2) == 3


def test_strata_are_compared_within_themselves():
    """Shifts of whole strata change nothing; the error is DeLong's, as for one stratum."""
    strata = np.repeat([0, 1], 6)
    shifted = np.concatenate([SCORES, SCORES + 100])
    found = stratified_auc(shifted, np.tile(INSIDE, 2), strata)
    alone = stratified_auc(SCORES, INSIDE, ONE)
    assert found.auc == pytest.approx(7 / 9)
    assert found.worst == pytest.approx(7 / 9)
    assert found.error == pytest.approx(alone.error / np.sqrt(2))
    # Shares of pairs won: of those in 1, 2/3, 2/3; of those out 1/3, 1, 1.
    by_hand = np.var([1, 2 / 3, 2 / 3], ddof=1) / 3 + np.var([1 / 3, 1, 1], ddof=1) / 3
    assert alone.error == pytest.approx(np.sqrt(by_hand))


def test_an_interval_of_the_auc_has_its_coverage():
    """0.95 of the intervals hold the true AUC of two normals, Phi(d' / sqrt 2)."""
    rng, true, held = np.random.default_rng(0), norm.cdf(0.5 / np.sqrt(2)), 0
    for _ in range(400):
        inside = rng.random(200) < 0.5
        found = stratified_auc(rng.normal(size=200) + 0.5 * inside, inside, np.zeros(200, int))
        held += abs(found.auc - true) <= 1.96 * found.error
    assert 0.92 <= held / 400 <= 0.98


def test_the_distance_of_two_normals_and_its_error():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        inside = np.arange(200) < 80
        found.append(separation(3 * (rng.normal(size=200) + 0.7 * inside) - 5, inside))
    distances, errors = np.array(found).T
    assert distances.mean() == pytest.approx(0.7, abs=0.03)
    assert errors.mean() == pytest.approx(distances.std(), rel=0.15)


@pytest.mark.parametrize(("mu", "delta"), [(0.5, 1e-4), (1.0, 1e-5), (4.0, 1e-3), (12.0, 1e-5)])
def test_epsilon_of_a_distance_is_the_gaussian_mechanisms(mu, delta):
    """At the found epsilon delta is the asked one, by quadrature over the likelihood ratio."""
    found = gaussian_epsilon(mu, delta)
    x = np.linspace(-12, mu + 12, 400_001)
    above = np.clip(norm.pdf(x - mu) - np.exp(found) * norm.pdf(x), 0, None)
    assert np.trapezoid(above, x) == pytest.approx(delta, rel=1e-3)


def test_no_distance_is_no_epsilon():
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(-1.0, 1e-5) == 0.0
    assert gaussian_epsilon(1e-3, 1e-2) == 0.0


def test_without_delta_the_bound_is_the_binomials():
    found = lower_bound(90, 100, 400, 0.0)
    right = lambda epsilon: binom.sf(89, 100, 1 / (1 + np.exp(-epsilon)))  # noqa: E731
    assert right(found) < 0.05 <= right(found + 1e-3)
    assert found == pytest.approx(1.68, abs=0.05)


def test_the_bound_grows_with_what_is_right_and_shrinks_with_delta():
    bounds = [lower_bound(v, 100, 400, 1e-5) for v in (50, 58, 65, 80, 100)]
    assert bounds[0] == bounds[1] == 0.0
    assert bounds[2:] == sorted(bounds[2:])
    assert 0 < bounds[2] < bounds[4] < 3.5
    assert lower_bound(100, 100, 400, 1e-3) < bounds[4]


def test_guessing_at_random_is_hardly_ever_taken_for_a_leak():
    rng = np.random.default_rng(0)
    rights = rng.binomial(100, 0.5, 2000)
    table = {v: lower_bound(int(v), 100, 400, 1e-5) for v in set(rights.tolist())}
    assert np.mean([table[v] > 0 for v in rights.tolist()]) <= 0.06


def test_a_promise_is_broken_only_where_the_estimate_is_surely_above_it():
    rng = np.random.default_rng(0)
    inside = rng.random(400) < 0.5
    noise, strata = rng.normal(size=400), np.zeros(400, np.int64)
    honest = judged(Scores(noise + 0.7 * inside, inside, strata), (4.0, 1e-4)).figures
    assert 0 < honest["epsilon_gaussian_at_least"] < honest["epsilon_gaussian"] < 4.0
    assert not honest["broken"]
    leaking = judged(Scores(noise + 7 * inside, inside, strata), (4.0, 1e-4)).figures
    assert leaking["broken"]
    assert leaking["epsilon_at_least"] < 4.0 < leaking["epsilon_gaussian_at_least"]
    assert not judged(Scores(noise + 7 * inside, inside, strata), None).figures["broken"]


def test_what_is_planted_has_wrong_labels_and_is_half_left_out():
    data = load_data(config_from_dict(CONFIG), Listener())
    found, rows, inside = plant(data, 30, seed=1)
    assert len(set(rows.tolist())) == 30
    assert 5 < inside.sum() < 25
    assert (found.labels[rows] != data.labels[rows]).all()
    assert (np.delete(found.labels, rows) == np.delete(data.labels, rows)).all()
    after = np.concatenate([c.train for c in found.clients])
    before = np.concatenate([c.train for c in data.clients])
    assert set(before.tolist()) - set(after.tolist()) == set(rows[~inside].tolist())
    with pytest.raises(UsageError, match="more than half of the"):
        plant(data, 60, seed=1)


def test_members_and_others_are_told_apart_by_coins_alone():
    data = load_data(config_from_dict(CONFIG), Listener())
    divided, candidates, inside = divide(data, seed=1)
    for before, after in zip(data.clients, divided.clients, strict=True):
        own = inside[before.client_id]
        assert candidates[before.client_id].tolist() == before.train.tolist()
        assert after.train.tolist() == before.train[own].tolist()
        assert 0 < own.sum() < len(own)
    assert (divided.labels == data.labels).all()


def test_directions_are_orthonormal_and_of_the_length_that_is_asked():
    like = {"b": torch.zeros(10, 4), "a": torch.zeros(20)}
    planted = Directions(20, seed=3)
    rows = planted.rows(np.arange(20) < 5, like, 0.5)
    assert {n: tuple(t.shape) for n, t in rows.items()} == {"a": (5, 20), "b": (5, 10, 4)}
    flat = torch.cat([rows["a"], rows["b"].flatten(1)], dim=1)
    assert torch.allclose(flat @ flat.T, 25 * torch.eye(5), atol=1e-4)
    planted.see({n: t[3] for n, t in rows.items()})
    assert planted.scores == pytest.approx(5.0 * (np.arange(20) == 3), abs=1e-5)
    with pytest.raises(UsageError, match="of 60 trained numbers an audit takes at most 60"):
        Directions(61, seed=3).see(like)


SMALL = with_(data={"batch_size": 4}, federation={"rounds": 1, "clients_per_round": None})


@pytest.mark.parametrize("private", [True, False])
def test_an_audit_stands_beside_the_promise(private):
    config = SMALL | ({} if private else {"privacy": PLAIN})
    found = example_audit(config_from_dict(config), 24, 2 - private).figures
    assert (found["canaries"], found["guesses"]) == ((24, 6) if private else (48, 12))
    assert 0 <= found["auc_at_least"] <= found["auc"] <= found["auc_at_most"] <= 1
    assert 0 <= found["right"] <= found["guesses"]
    assert (found["epsilon_promised"] is not None) == private
    assert found["epsilon_at_least"] <= (found["epsilon_promised"] or 20)
    assert not found["broken"]


@pytest.mark.parametrize("private", [True, False])
def test_a_coordinator_guesses_who_was_in_each_clients_data(private):
    config = SMALL | ({} if private else {"privacy": PLAIN})
    found = membership_audit(config_from_dict(config), 1).figures
    assert 80 < found["canaries"] < 100
    assert 0 <= found["auc"] <= found["auc_worst"] <= 1
    assert (found["epsilon_promised"] is not None) == private


def test_clients_that_nobody_asked_are_no_evidence():
    config = with_(federation={"rounds": 1, "clients_per_round": 1}, privacy=PLAIN)
    found = membership_audit(config_from_dict(config)).figures
    assert found["canaries"] < 40  # of 90 images at three clients
    assert found["auc"] == found["auc_worst"]


def test_scores_that_are_all_the_same_tell_nothing():
    assert separation(np.zeros(6), INSIDE)[0] == 0.0
    found = judged(Scores(np.zeros(40), np.arange(40) < 20, np.zeros(40, np.int64)), (1.0, 1e-4))
    assert (found.figures["auc"], found.figures["epsilon_gaussian"]) == (0.5, 0.0)


def client_config(noise):
    # The same noise each time: an estimate by chance too high would fail a test.
    privacy = {"unit": "client", "noise_multiplier": noise, "delta": 1e-2, "reproducible": True}
    return with_(
        privacy=privacy,
        data={"max_train_examples": 60},
        federation={"num_clients": 12, "clients_per_round": 6, "rounds": 2},
    )


@pytest.mark.filterwarnings("ignore:privacy.unit. client")
@pytest.mark.parametrize("unit", ["example", "client"])
def test_noise_that_is_a_tenth_of_what_it_should_be_is_caught(unit, monkeypatch):
    """As built nothing speaks against the promise, which the estimate comes close to."""
    if unit == "example":
        config = with_(
            data={"batch_size": 30, "partition": {"name": "iid"}},
            privacy={"noise_multiplier": 3.0, "reproducible": True},
            federation={"rounds": 6, "clients_per_round": None, "num_clients": 3},
        )
        where = dp_sgd.ClientDpSgd
    else:
        config, where = client_config(2.0), client_level.ClientMechanism
    found = direction_audit(config_from_dict(config), 200).figures
    assert not found["broken"]
    assert 0 < found["epsilon_gaussian"] < 1.5 * found["epsilon_promised"]
    noise = where.noise
    monkeypatch.setattr(where, "noise", lambda *args: noise(*args) / 10)
    found = direction_audit(config_from_dict(config), 200).figures
    assert found["broken"]
    assert found["epsilon_gaussian_at_least"] > found["epsilon_promised"]


@pytest.mark.filterwarnings("ignore:privacy.unit. client")
def test_updates_that_are_not_clipped_are_caught(monkeypatch):
    monkeypatch.setattr(client_level, "clip_rows", lambda flat, norm: flat)
    assert direction_audit(config_from_dict(client_config(2.0)), 200).figures["broken"]


def test_an_audit_of_a_finished_run_takes_its_configuration_and_draws_a_picture(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(SMALL))
    picture = tmp_path / "audit.svg"
    found = attack(tmp_path / "run", [], "membership", 400, 1, picture, Listener())
    assert 80 < found["canaries"] < 100
    drawn = picture.read_text("latin-1")  # what was drawn, which tests take down in place of pixels
    assert "'format': 'svg'" in drawn
    assert "Scores of those in and out" in drawn
    with pytest.raises(UsageError, match=r"must end in .png or .svg"):
        attack(tmp_path / "run", [], "membership", 400, 1, tmp_path / "a.pdf", Listener())


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (example_audit, {"data": {"train_classes": 0.5}, "privacy": PLAIN}, "one adap"),
        (example_audit, {"privacy": {"unit": "client"}}, "privacy.unit: client: examples"),
        (direction_audit, {"privacy": PLAIN}, "has no privacy.unit"),
    ],
    ids=["one adapter", "clients", "no promise"],
)
def test_what_cannot_be_audited_is_refused(kind, change, words):
    with pytest.raises(UsageError, match=words):
        kind(config_from_dict(with_(**change)), 100)
    with pytest.raises(UsageError, match=r"--canaries must be at least 20"):
        example_audit(config_from_dict(CONFIG), 5)


@pytest.mark.filterwarnings("ignore:.*classes have no training image")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"privacy": {"unit": "client"}}, "sees every update as it is"),
        ({"federation": {"strategy": "centralised"}, "privacy": PLAIN}, "there is no coordinator"),
        ({"data": {"max_train_examples": 6}, "privacy": PLAIN}, "too few to leave out half"),
    ],
    ids=str,
)
def test_what_no_coordinator_can_attack_is_refused(change, words):
    with pytest.raises(UsageError, match=words):
        membership_audit(config_from_dict(with_(**change)))
