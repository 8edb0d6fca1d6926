"""The pieces of private training: draws from a secret, batches, clipping, noise, the ledger."""

import hashlib
import hmac
import math
import os
import stat
from dataclasses import replace

import hypothesis as h
import numpy as np
import pytest
import torch
from Crypto.Cipher import ChaCha20
from hypothesis import strategies as st
from scipy import stats

from fedclip.errors import FedclipError, UsageError
from fedclip.federated.privacy.adaptive_clip import ClipNorm, noise_of_sum
from fedclip.federated.privacy.charging import ChargedEngine, Refused, with_digest
from fedclip.federated.privacy.client_level import ClientMechanism, PrivateMean
from fedclip.federated.privacy.dp_sgd import DpSgd, clip_rows, steps_of
from fedclip.federated.privacy.ledger import (
    Books,
    BudgetSpent,
    Entry,
    Ledger,
    Mechanism,
    request_sha256,
)
from fedclip.federated.privacy.secret import (
    Draws,
    create_key,
    fingerprint,
    read_key,
    reproducible_key,
)
from fedclip.federated.strategies import FedAvg
from fedclip.federated.strategies.averaging import FFA, FedSA, RoLoRA
from fedclip.federated.strategies.base import guarded
from fedclip.federated.strategies.wrappers import NORM, AdaptiveClip
from fedclip.federated.updates import Updates
from fedclip.records import ClientReport, Cohort, RunState, TrainRequest

KEY = bytes(range(32))
ZERO_NONCE = bytes(12)
REQUEST = TrainRequest(1, ("a", "b"), {"w.lora_B.weight": torch.zeros(2, 3)})


# --- draws ---


def test_draws_are_chacha20s_of_another_library():
    draws = Draws(KEY, "run")
    key = draws._key
    assert key == hmac.new(KEY, b"3:run", hashlib.sha256).digest()
    of_name = hmac.new(key, b"4:name/1:7", hashlib.sha256).digest()
    stream = ChaCha20.new(key=of_name, nonce=ZERO_NONCE).encrypt(bytes(8 * 100))
    expected = [(word >> 11) / 2**53 for word in np.frombuffer(stream, dtype="<u8").tolist()]
    assert draws.uniforms(100, "name", 7).tolist() == expected


def test_normals_are_normal_and_uniforms_uniform():
    for key in (KEY, bytes(32), b"x" * 32):
        assert stats.kstest(Draws(key).normals(20_001, "n"), "norm").pvalue > 1e-3
        assert stats.kstest(Draws(key).uniforms(20_001, "u"), "uniform").pvalue > 1e-3


def test_draws_differ_by_key_and_by_name_and_repeat_otherwise():
    draws = Draws(KEY, "run")
    assert (draws.normals(5, "a") == Draws(KEY, "run").normals(5, "a")).all()
    others = [
        draws.normals(5, "b"),
        draws.normals(5, "a", 0),
        Draws(KEY, "other run").normals(5, "a"),
        Draws(reproducible_key(0), "run").normals(5, "a"),
    ]
    first = draws.normals(5, "a")
    assert all(not np.isin(first, other).any() for other in others)
    assert not (draws.normals(5, "ab", "c") == draws.normals(5, "a", "bc")).any()


def test_a_key_is_its_owners_alone_and_read_back(tmp_path):
    key = create_key(tmp_path / "key")
    assert len(key) == 32
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert read_key(tmp_path / "key") == key != create_key(tmp_path / "other")
    assert len({fingerprint(key), fingerprint(KEY), key.hex()}) == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: path.write_bytes(b"short"), "is no key of 32 bytes"),
        (lambda path: path.write_bytes(bytes(33)), "is no key of 32 bytes"),
        (lambda path: path.chmod(0o640), "can be read by others .*chmod 600"),
    ],
)
def test_a_key_that_is_none_is_refused(tmp_path, damage, words):
    create_key(tmp_path / "key")
    damage(tmp_path / "key")
    with pytest.raises(UsageError, match=words):
        read_key(tmp_path / "key")


# --- batches, clipping, noise ---


def dp_sgd(multiplier=1.0, clip_norm=1.0, batch_size=10, key=KEY):
    return DpSgd(clip_norm, {"a": multiplier, "b": multiplier}, Draws(key), batch_size)


def test_batches_are_poisson():
    indices = np.arange(100, 140)
    private = dp_sgd().of("a", with_digest(REQUEST))
    plan = private.plan(indices, 500)
    assert len(plan) == 500 * steps_of(40, 10) == 2000
    batches = [batch for (batch,) in plan]
    counts = np.bincount(np.concatenate(batches), minlength=140)[100:]
    chi2 = ((counts - 500) ** 2 / (2000 * 0.25 * 0.75)).sum()
    assert 0.001 < stats.chi2.cdf(chi2, 40) < 0.999
    sizes = np.array([len(batch) for batch in batches])  # binomial, not fixed
    assert sizes.mean() == pytest.approx(10, abs=0.25)
    assert sizes.var() == pytest.approx(7.5, rel=0.12)
    first, second = (np.isin(indices, b) for b in batches[:2])
    assert (first != second).any()


def test_with_a_batch_of_all_every_step_takes_all():
    plan = dp_sgd(batch_size=7).of("a", with_digest(REQUEST)).plan(np.arange(7), 3)
    assert [batch.tolist() for (batch,) in plan] == [list(range(7))] * 3


@h.given(
    rows=st.lists(
        st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    ),
    clip=st.floats(1e-6, 1e6),
)
def test_clipped_rows_are_within_the_norm_and_small_ones_stay(rows, clip):
    flat = torch.tensor(rows, dtype=torch.float32)
    found = clip_rows(flat, clip)
    assert (found.double().norm(dim=1) <= clip).all()
    small = flat.double().norm(dim=1) <= clip * 0.999
    assert torch.equal(found[small], flat[small])


def test_a_gradient_that_is_not_finite_changes_nothing():
    flat = torch.tensor([[math.nan, 1.0], [math.inf, 0.0], [3.0, 4.0]])
    assert torch.allclose(clip_rows(flat, 1.0), torch.tensor([[0, 0], [0, 0], [0.6, 0.8]]))


@pytest.mark.parametrize("key", [KEY, bytes(32), b"k" * 32])
def test_noise_has_its_stated_deviation(key):
    private = dp_sgd(multiplier=2.0, clip_norm=0.5, batch_size=10, key=key)
    gradient = private.of("a", with_digest(REQUEST)).private({"w": torch.zeros(100, 200)}, 3)["w"]
    square = (gradient.double() * 10 / (2.0 * 0.5)).square().sum().item()
    assert 0.001 < stats.chi2.cdf(square, 20_000) < 0.999


def test_noise_repeats_for_the_same_request_alone():
    private = dp_sgd()

    def noise(request, client="a", step=0):
        return private.of(client, with_digest(request)).noise(step, 50)

    first = noise(REQUEST)
    assert torch.equal(first, noise(replace(REQUEST, client_ids=("a",))))  # whoever else is asked
    changed = REQUEST.state["w.lora_B.weight"] + 1e-7
    others = [
        noise(replace(REQUEST, state={"w.lora_B.weight": changed})),
        noise(replace(REQUEST, server_round=2)),
        noise(replace(REQUEST, purpose="personal")),
        noise(replace(REQUEST, shift={"w": torch.ones(1)})),
        noise(replace(REQUEST, progress=0.5)),
        noise(REQUEST, client="b"),
        noise(REQUEST, step=1),
    ]
    assert all((first != other).all() for other in others)


def test_each_number_of_a_step_has_noise_of_its_own_whatever_the_order_of_tensors():
    own = dp_sgd().of("a", with_digest(REQUEST))
    found = own.private({"w": torch.zeros(5, 4), "b": torch.zeros(6)}, 0)
    numbers = torch.cat([found["w"].flatten(), found["b"]])
    assert len(numbers.unique()) == 26
    other = own.private({"b": torch.ones(6), "w": torch.zeros(5, 4)}, 0)
    assert torch.equal(other["w"], found["w"])
    assert torch.allclose(other["b"] - found["b"], torch.full((6,), 0.1))


def test_a_digest_tells_requests_apart():
    one = torch.tensor([1.0, 2.0])
    requests = [
        TrainRequest(1, (), {"a": one}),
        TrainRequest(1, (), {"b": one}),
        TrainRequest(1, (), {"a": one.double()}),
        TrainRequest(1, (), {"a": one[None]}),
        TrainRequest(1, (), {"a": one}, trained=frozenset({"a"})),
        TrainRequest(1, (), {"a": one}, trained=frozenset()),
        TrainRequest(1, (), {"a": one}, starts={"c": {"a": one}}),
        TrainRequest(1, (), {"a": one}, frames={"a": one}),
    ]
    assert len({request_sha256(request) for request in requests}) == len(requests)


# --- the ledger ---


def books(limit=None, noise=2.0):
    mechanism = Mechanism(sampling_rate=0.25, noise_multiplier=noise)
    return Books(
        format=1,
        run="this",
        key_sha256=fingerprint(KEY),
        delta=1e-3,
        largest_epsilon=limit,
        mechanisms={"a": mechanism, "b": mechanism},
        entries=[],
    )


def test_a_request_is_counted_once_and_another_one_again(tmp_path):
    ledger = Ledger.create(tmp_path / "books", books())
    request = with_digest(REQUEST)
    ledger.charge(request, {"a": 4})
    ledger.charge(request, {"a": 4, "b": 4})  # b is new
    ledger.charge(request, {"a": 4, "b": 4})
    again = Ledger.read(tmp_path / "books", run="this", key_sha256=fingerprint(KEY))
    again.charge(request, {"a": 4, "b": 4})
    assert (again.steps("a"), again.steps("b")) == (4, 4)
    before = again.epsilon()
    again.charge(with_digest(replace(REQUEST, progress=0.5)), {"a": 4})
    assert (again.steps("a"), again.steps("b")) == (8, 4)
    assert again.epsilon().least > before.least > 0


def test_books_are_on_disk_before_anything_is_trained(tmp_path):
    ledger = Ledger.create(tmp_path / "books", books())
    seen = []

    def train(request):
        on_disk = Ledger.read(tmp_path / "books", run="this", key_sha256=fingerprint(KEY))
        seen.append((on_disk.steps("a"), request.digest))
        yield from ()

    list(ChargedEngine(train, ledger, {"a": 3, "b": 5}).train(REQUEST))
    assert seen == [(3, request_sha256(REQUEST))]


def test_a_budget_is_never_exceeded(tmp_path):
    ledger = Ledger.create(tmp_path / "books", books(limit=1.0))
    requests = [with_digest(replace(REQUEST, server_round=r)) for r in range(1, 100)]
    with pytest.raises(BudgetSpent, match=r"target_epsilon from .* above 1"):
        [ledger.charge(request, {"a": 4}) for request in requests]
    on_disk = Ledger.read(tmp_path / "books", run="this", key_sha256=fingerprint(KEY))
    assert 0.5 < on_disk.epsilon().least <= 1.0
    assert on_disk.steps("a") == ledger.steps("a") > 0


def test_damaged_books_count_as_spent(tmp_path):
    path = tmp_path / "books"
    Ledger.create(path, books()).charge(with_digest(REQUEST), {"a": 4})
    whole = path.read_bytes()
    damages = [whole[:-40], b"", b"{}", whole.replace(b'"a": 4', b'"a": 1')]
    damages += [whole.replace(b"0.25", b"0.20"), whole.replace(b'"a"', b'"c"', 1)]
    damages += [whole[:place] + b"\x00" + whole[place + 1 :] for place in range(5, 700, 90)]
    for damaged in damages:
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(UsageError):
            Ledger.read(path, run="this", key_sha256=fingerprint(KEY))


def test_steps_of_a_mechanism_that_is_not_in_the_books_are_refused(tmp_path):
    """They would count for nothing, also where the file's digest is right."""
    strange = Entry(server_round=1, purpose="client", request_sha256="0", steps={"z": 4})
    Ledger.create(tmp_path / "books", books().model_copy(update={"entries": [strange]}))
    with pytest.raises(UsageError, match="steps of 'z', whose noise they do not say"):
        Ledger.read(tmp_path / "books", run="this")


def test_books_of_another_run_or_key_are_refused(tmp_path):
    Ledger.create(tmp_path / "books", books())
    with pytest.raises(UsageError, match="another run"):
        Ledger.read(tmp_path / "books", run="other", key_sha256=fingerprint(KEY))
    with pytest.raises(UsageError, match=r"noise\.key is not the one"):
        Ledger.read(tmp_path / "books", run="this", key_sha256=fingerprint(bytes(32)))


def test_where_the_books_cannot_be_written_nothing_is_trained(tmp_path, monkeypatch):
    ledger = Ledger.create(tmp_path / "books", books())

    def full(*args, **kw):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("fedclip.federated.privacy.ledger.replace_file", full)
    engine = ChargedEngine(lambda request: pytest.fail("trained"), ledger, {"a": 3, "b": 5})
    with pytest.raises(FedclipError, match=r"books cannot be written: No space left.*nothing"):
        list(engine.train(REQUEST))
    assert ledger.steps("a") == 0


@pytest.mark.parametrize(
    "ask",
    [
        {"start_loss": True},
        {"offsets": {"a": {}}},
        {"ranks": {"a": 1}},
        {"cut": {"w.lora_B.weight": 1}},
    ],
)
def test_what_noise_does_not_hide_is_refused(tmp_path, ask):
    ledger = Ledger.create(tmp_path / "books", books())
    engine = ChargedEngine(lambda request: pytest.fail("trained"), ledger, {"a": 3, "b": 5})
    with pytest.raises(Refused, match=f"{next(iter(ask))}.*privacy.unit: example"):
        list(engine.train(replace(REQUEST, **ask)))
    assert ledger.steps("a") == 0


# --- the private mean ---

STATE = {"l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.zeros(3, 1)}


def private_train(updates, *, clip=1.0, multiplier=1e-9, clients=4, expected=2, charges=None):
    """`train` for clients whose updates are given, behind the guard."""
    mechanism = ClientMechanism(clip, multiplier, clients, expected, Draws(KEY))
    charges = [] if charges is None else charges

    def train(request):
        names = sorted(request.names_sent)
        cohorts = [
            Cohort(
                (ClientReport(c, 10 * i + 1, 1.0, 1, 0.0),),
                {n: (request.state[n] + updates[c][n])[None] for n in names},
            )
            for i, c in enumerate(request.client_ids)
        ]
        return PrivateMean(Updates(request, cohorts), mechanism, charges.append)

    return train


def test_the_private_mean_is_the_clipped_sum_over_those_expected():
    updates = {
        "a": {"l.lora_A.weight": torch.tensor([[3.0, 0.0]]), "l.lora_B.weight": torch.zeros(3, 1)},
        "b": {
            "l.lora_A.weight": torch.tensor([[0.0, 0.1]]),
            "l.lora_B.weight": torch.tensor([[0.2], [0.0], [0.0]]),
        },
    }
    charges = []
    request = TrainRequest(1, ("a", "b"), STATE)
    asked = private_train(updates, charges=charges)(request)
    found = asked.mean()
    assert len(charges) == 1
    # a has norm 3 and is cut to 1, b stays; both weigh the same, and 2 of 4 are expected.
    assert torch.allclose(found["l.lora_A.weight"], torch.tensor([[1.5, 1.05]]), atol=1e-5)
    assert torch.allclose(found["l.lora_B.weight"], torch.tensor([[0.1], [0], [0]]), atol=1e-5)
    alone = private_train(updates)(replace(request, client_ids=("b",))).mean()
    assert torch.allclose(alone["l.lora_A.weight"], torch.tensor([[1.0, 1.05]]), atol=1e-5)
    assert asked.bytes_up == 2 * 4 * 5  # of two expected clients


def test_a_round_of_nobody_is_a_round_of_noise():
    request = TrainRequest(1, (), STATE)
    found = private_train({}, multiplier=1.0)(request).mean()
    moved = torch.cat([(found[n] - STATE[n]).flatten() for n in sorted(STATE)])
    assert (moved != 0).all()
    assert moved.norm() < 5


def test_noise_of_the_mean_has_its_deviation():
    state = {"w": torch.zeros(200, 100)}
    train = private_train({}, multiplier=3.0, clip=0.5, expected=2)
    found = train(TrainRequest(1, (), state)).mean()["w"].double()
    assert 0.001 < stats.chi2.cdf((found * 2 / 1.5).square().sum().item(), 20_000) < 0.999


@pytest.mark.parametrize("strategy", [FedAvg, FFA, RoLoRA])
@h.settings(max_examples=350, deadline=None)  # of each strategy: 1,050 pairs
@h.given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), present=st.integers(0, 3))
def test_one_client_more_changes_the_sum_by_the_norm_at_most(strategy, seed, scale, present):
    generator = torch.Generator().manual_seed(seed)
    updates = {
        c: {n: scale * torch.randn(t.shape, generator=generator) for n, t in STATE.items()}
        for c in "abcd"
    }
    ids = tuple("abcd"[: present + 1])
    train, means = private_train(updates, clip=0.3, expected=1), []

    def watched(request):
        means.append(train(request).mean())
        return train(request)

    for those in (ids, ids[:-1]):
        strategy().round(RunState(STATE), TrainRequest(2, those, STATE), watched)
    assert len(means) == 2
    moved = torch.cat([(means[0][n] - means[1][n]).flatten() for n in sorted(means[0])]).double()
    assert moved.norm() <= 0.3 * (1 + 1e-5)


def test_single_updates_are_not_shown():
    request = TrainRequest(1, ("a",), STATE)
    train = private_train({"a": {n: torch.zeros_like(t) for n, t in STATE.items()}})
    with pytest.raises(Refused, match="it reads single updates"):
        FedSA().round(RunState(STATE), request, guarded(train, lambda updates: updates))


def test_clients_are_drawn_one_by_one():
    mechanism = ClientMechanism(1.0, 1.0, 50, 20, Draws(KEY))
    ids = tuple(f"c{i}" for i in range(50))
    drawn = [mechanism.sample(ids, server_round) for server_round in range(400)]
    counts = np.array([sum(c in round_ for round_ in drawn) for c in ids])
    chi2 = ((counts - 160) ** 2 / (400 * 0.4 * 0.6)).sum()
    assert 0.001 < stats.chi2.cdf(chi2, 50) < 0.999
    assert np.var([len(round_) for round_ in drawn]) == pytest.approx(12, rel=0.25)
    assert drawn[3] == mechanism.sample(ids, 3)


# --- adaptive clipping ---


def test_the_clip_norm_moves_by_the_noisy_share_of_short_updates():
    """By hand: 3 of 4 updates are no longer than C = 1, of 10 expected; gamma 0.5, eta 0.2."""
    lengths = {"a": 3.0, "b": 1.0, "c": 0.5, "d": 0.1}
    updates = {c: {"w": torch.tensor([length])} for c, length in lengths.items()}
    mechanism = ClientMechanism(1.0, 1e-9, 40, 10, Draws(KEY))
    clip = ClipNorm(1.0, 0.5)

    def train(request):
        reports = tuple(ClientReport(c, 1, 1.0, 1, 0.0) for c in request.client_ids)
        tensors = {"w": torch.stack([updates[c]["w"] for c in request.client_ids])}
        cohorts = [Cohort(reports, tensors)]
        return PrivateMean(Updates(request, cohorts), mechanism, lambda request: None, clip)

    strategy = AdaptiveClip(FedAvg(), clip)
    request = TrainRequest(1, tuple("abcd"), {"w": torch.zeros(1)})
    after = strategy.round(RunState(request.state), request, train)
    assert after.shared["w"].item() == pytest.approx((1 + 1 + 0.5 + 0.1) / 10, abs=1e-5)
    named = with_digest(request)
    noise = mechanism.draws.normals(1, "share", "client", 1, named.digest)[0] * 10 / 20
    share = 0.5 + ((3 - 4 / 2) + noise) / 10
    assert after.server[NORM].item() == pytest.approx(np.exp(-0.2 * (share - 0.5)))
    assert clip.norm == after.server[NORM].item()
    resumed = ClipNorm(7.0, 0.5)  # as made anew: the state's norm counts
    AdaptiveClip(FedAvg(), resumed).round(replace(after, shared=request.state), request, train)
    assert resumed.norm == after.server[NORM].item()


def test_one_client_moves_the_counted_share_by_half_a_client_at_most():
    """Absent, short or long: what a client adds to the sum is 0, 1/2 or -1/2."""
    mechanism = ClientMechanism(1.0, 1.0, 40, 10, Draws(KEY))
    request = with_digest(TrainRequest(1, (), {"w": torch.zeros(1)}))
    shares = [mechanism.share(request, *counts) * 10 for counts in ((2, 5), (2, 4), (1, 4))]
    assert shares[0] - shares[1] == pytest.approx(-0.5)  # a long one more
    assert mechanism.share(request, 3, 5) * 10 - shares[1] == pytest.approx(0.5)  # a short one
    assert shares[1] - shares[2] == pytest.approx(1.0)


def test_the_count_is_paid_for_by_the_noise_of_the_sum():
    """Two Gaussian queries of sensitivity over noise 1/z_D and 1/(2 sigma_b) make one of 1/z."""
    found = noise_of_sum(2.0, 100)
    assert 1 / found**2 + 1 / (2 * 100 / 20) ** 2 == pytest.approx(1 / 2.0**2)
    assert found == pytest.approx(2.0412, abs=1e-4)
    with pytest.raises(UsageError, match="needs more than 20 clients a round"):
        noise_of_sum(2.0, 20)


def test_the_norm_comes_to_the_quantile():
    """Norms uniform in [0, 1]: the median is 0.5, wherever the norm begins."""
    mechanism = ClientMechanism(1.0, 1.0, 100, 100, Draws(KEY))
    clip, norms = ClipNorm(8.0, 0.5), np.linspace(0, 1, 100)
    for server_round in range(1, 80):
        request = with_digest(TrainRequest(server_round, (), {"w": torch.zeros(1)}))
        clip.hear(mechanism.share(request, int((norms <= clip.norm).sum()), 100))
    assert clip.norm == pytest.approx(0.5, abs=0.05)
