"""Epsilon: Opacus' own, the table of figures, targets met from below."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.stats import norm

from fedclip.errors import UsageError
from fedclip.federated.privacy.accounting import Epsilon, Spent, epsilon, largest, noise_for

# Sampling rate, steps, delta, noise; epsilon by RDP, PRV, and dp-accounting's PLD (0.6.0).
TABLE = [
    (0.1, 100, 1e-3, 1.0, 5.641, 4.795, 4.784),
    (0.01, 100, 1e-4, 0.8, 1.688, 1.054, 1.044),
    (1.0, 50, 1e-2, 2.0, 15.461, 13.724, 13.713),
    (0.1, 100, 1e-3, 2.0, 1.799, 1.554, 1.544),
    (0.032, 500, 1e-5, 1.0, 5.131, 4.616, 4.606),
    (0.254, 64, 1e-3, 1.5, 6.294, 5.501, 5.490),
    (0.970, 32, 1e-2, 1.5, 16.362, 14.516, 14.505),
    (0.0512, 800, 1e-5, 0.8, 17.474, 15.932, 15.921),
]


@pytest.mark.parametrize(("q", "steps", "delta", "noise", "rdp", "prv", "pld"), TABLE)
def test_epsilon_is_the_tables(q, steps, delta, noise, rdp, prv, pld):
    found = epsilon(Spent(q, noise, steps), delta)
    assert found.rdp == pytest.approx(rdp, rel=1e-3)
    assert found.least == pytest.approx(prv, rel=1e-3)
    assert found.least == pytest.approx(pld, rel=0.02)
    assert found.least >= pld - 1e-3  # an upper bound


@pytest.mark.parametrize(("q", "steps", "delta", "noise"), [row[:4] for row in TABLE if row[0] < 1])
def test_epsilon_is_opacus_own(q, steps, delta, noise):
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(noise, q, steps)]
    found = epsilon(Spent(q, noise, steps), delta)
    assert found.least == pytest.approx(prv.get_epsilon(delta=delta), abs=1e-6)
    assert found.rdp == pytest.approx(rdp.get_epsilon(delta=delta), abs=1e-6)


def test_epsilon_is_within_two_percent_of_dp_accounting():
    """Google's accountant by privacy loss distributions, in its own environment."""
    python = os.environ.get("FEDCLIP_DP_ACCOUNTING")
    if not python:
        pytest.skip("dp-accounting does not go with our pins: make accountant installs it apart")
    program = Path(__file__).parents[1] / "support" / "dp_accounting_rows.py"
    rows = [row[:4] for row in TABLE]
    done = subprocess.run(
        [python, str(program)], input=json.dumps(rows), capture_output=True, text=True, check=True
    )
    theirs = json.loads(done.stdout)
    ours = [epsilon(Spent(q, noise, steps), delta).least for q, steps, delta, noise in rows]
    assert ours == pytest.approx(theirs, rel=0.02)
    assert theirs == pytest.approx([row[-1] for row in TABLE], rel=1e-3)


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_one_step_on_all_examples_is_the_gaussian_mechanism(noise):
    """Balle & Wang 2018 (arXiv:1805.06530): delta of an epsilon in closed form."""
    found = epsilon(Spent(1.0, noise, 1), 1e-3).least
    exact = norm.cdf(0.5 / noise - found * noise) - math.exp(found) * norm.cdf(
        -0.5 / noise - found * noise
    )
    assert exact <= 1e-3
    looser = found - 0.03
    assert (
        norm.cdf(0.5 / noise - looser * noise)
        - math.exp(looser) * norm.cdf(-0.5 / noise - looser * noise)
        > 1e-3
    )


@settings(max_examples=8, deadline=None)
@given(
    target=st.floats(0.3, 20),
    delta=st.sampled_from([1e-3, 1e-5]),
    q=st.sampled_from([0.02, 0.2, 0.97, 1.0]),
    steps=st.integers(1, 300),
)
def test_a_target_is_met_from_below(target, delta, q, steps):
    found = epsilon(Spent(q, noise_for(target, delta, q, steps), steps), delta).least
    assert 0.98 * target <= found <= target


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(UsageError, match=r"privacy.target_epsilon: 1e-05 .* fewer rounds"):
        noise_for(1e-5, 1e-9, 1.0, 1000)


def test_without_steps_nothing_is_spent_and_the_largest_counts():
    few, many = Spent(0.1, 1.0, 10), Spent(0.1, 1.0, 100)
    assert largest([], 1e-3) == Epsilon(0.0, 0.0) == epsilon(Spent(0.1, 1.0, 0), 1e-3)
    assert largest([few, many, few], 1e-3) == epsilon(many, 1e-3)


def test_hardly_any_noise_is_answered_at_once_and_promises_nothing():
    found = epsilon(Spent(0.9, 0.05, 10_000), 1e-5)
    assert found.least == found.rdp > 1000
