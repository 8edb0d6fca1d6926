"""The audit: its statistics by hand, what it plants, and a run of it."""

import numpy as np
import pytest
from scipy.stats import binom

from fedclip.config.loading import config_from_dict
from fedclip.errors import UsageError
from fedclip.experiment.audit import audit, plant
from fedclip.experiment.build import load_data
from fedclip.federated.privacy.audit import auc, lower_bound, right_guesses
from fedclip.reports.listener import Listener
from tests.experiment.test_privacy import CONFIG, with_

SCORES = np.array([0.9, 0.1, 0.8, 0.3, 0.5, 0.2])
INSIDE = np.array([True, False, False, True, True, False])


def test_auc_and_guesses_by_hand():
    # Pairs (in, out): 0.9 beats all three, 0.5 and 0.3 beat two each: 7 of 9.
    assert auc(SCORES, INSIDE) == pytest.approx(7 / 9)
    assert auc(np.zeros(6), INSIDE) == 0.5
    # Highest two: 0.9 is in, 0.8 is not; lowest two: 0.1 and 0.2, both out.
    assert right_guesses(SCORES, INSIDE, 2) == 3


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


@pytest.mark.parametrize("private", [True, False])
def test_an_audit_stands_beside_the_promise(private):
    config = with_(
        data={"batch_size": 4},
        federation={"rounds": 1, "clients_per_round": None},
        privacy={} if private else dict.fromkeys(CONFIG["privacy"]),
    )
    found = audit(config_from_dict(config), 24)
    assert (found["canaries"], found["guesses"]) == (24, 6)
    assert 0 <= found["auc"] <= 1
    assert 0 <= found["right"] <= 6
    assert (found["epsilon_promised"] is not None) == private
    assert found["epsilon_at_least"] <= (found["epsilon_promised"] or 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"privacy": {"unit": "client"}}, "privacy.unit: client: an audit plants"),
        ({"data": {"train_classes": 0.5}, "privacy": dict.fromkeys(CONFIG["privacy"])}, "one adap"),
    ],
    ids=str,
)
def test_what_cannot_be_audited_is_refused(change, words):
    with pytest.raises(UsageError, match=words):
        audit(config_from_dict(with_(**change)), 100)
    with pytest.raises(UsageError, match="--canaries must be at least 20"):
        audit(config_from_dict(CONFIG), 5)
