"""Masked sums: sums that are right, clients that drop out, and everything that is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from fedclip.federated.secure.ciphers import add_stream, packed
from fedclip.federated.secure.fixed_point import DoesNotFit, FixedPoint
from fedclip.federated.secure.payload import LARGEST_LOSS, Terms, mean_of, vector_of
from fedclip.federated.secure.session import Advert, Broken, Session, threshold
from fedclip.federated.secure.shamir import PRIME, SHARE_BYTES, combine, split
from tests.support.masks import BINDING, Signers, Sum


def names(count: int) -> list[str]:
    return [f"site-{number:03}" for number in range(count)]


# --- shares ---


def test_shares_of_a_line_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secret 7 and slope 5: 12, 17 and 22 at 1, 2 and 3; any two give the 7 back."""
    monkeypatch.setattr("secrets.randbelow", lambda bound: 5)
    shares = split((7).to_bytes(32, "big"), [1, 2, 3], 2)
    assert [int.from_bytes(share, "big") for share in shares] == [12, 17, 22]
    assert all(len(share) == SHARE_BYTES for share in shares)
    for two in itertools.combinations([1, 2, 3], 2):
        (found,) = combine([{place: shares[place - 1] for place in two}])
        assert int.from_bytes(found, "big") == 7


def test_fewer_shares_than_the_threshold_give_something_else() -> None:
    secret = bytes(range(32))
    shares = dict(enumerate(split(secret, range(1, 8), 5), start=1))
    assert combine([{place: shares[place] for place in (1, 2, 4, 6, 7)}]) == [secret]
    few = {place: shares[place] for place in (1, 2, 4, 6)}
    with suppress(ValueError):  # of a number above 2^256, one time in 2^256 / 297
        assert combine([few]) != [secret]


def test_one_share_fewer_is_uniform() -> None:
    """The share at a place is a uniform number, whatever the secret: its top bit is a fair coin."""
    tops = sum(split(bytes(32), [1, 2, 3], 2)[0][1] >> 7 for _ in range(2000))
    assert 880 < tops < 1120  # 5 standard deviations


def test_shares_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        split(b"short", [1, 2], 2)
    for places, needed in (([1, 2], 3), ([1, 1], 2), ([0, 1], 2)):
        with pytest.raises(ValueError, match="shares, at places"):
            split(bytes(32), places, needed)
    shares = dict(enumerate(split(bytes(32), [1, 2], 2), start=1))
    for other in ({1: shares[1]}, {**shares, 2: b"\xff" * SHARE_BYTES}):
        with pytest.raises(ValueError, match="none that can be"):
            combine([shares, other])
    assert pow(3, PRIME - 1, PRIME) == pow(65537, PRIME - 1, PRIME) == 1  # passes for a prime


# --- fixed point, and what a vector holds ---


@pytest.mark.parametrize("clients", [3, 10, 30, 100, 1000])
@pytest.mark.parametrize("largest", [1e-3, 1.0, 256.0])
def test_the_largest_numbers_of_all_clients_do_not_wrap_around(
    clients: int, largest: float
) -> None:
    form = FixedPoint(clients, largest)
    for sign in (1, -1):
        word = form.encode(np.array([sign * largest]))
        total = (word.astype(np.uint64) * clients).astype(np.uint32)
        np.testing.assert_allclose(form.decode(total), [sign * largest * clients], rtol=1e-3)
        assert np.sign(form.decode(total)) == sign
    with pytest.raises(DoesNotFit, match="the most that fits"):
        form.encode(np.array([0.0, largest * 1.001]))
    with pytest.raises(DoesNotFit):
        form.encode(np.array([np.nan]))


def test_fixed_point_by_hand() -> None:
    """4 clients up to 1: 28 bits, as 4 * 2^28 = 2^30 is below 2^31 and 4 * 2^29 is not."""
    form = FixedPoint(4, 1.0)
    assert form.bits == 28
    assert form.encode(np.array([0.5, -0.5, 2.0**-28])).tolist() == [2**27, 2**32 - 2**27, 1]


def test_a_vector_holds_weighted_changes_a_loss_and_the_weight() -> None:
    terms = Terms(clients=4, unit=8, largest_change=1.0)
    start = {"w": torch.tensor([1.0, 2.0])}
    words = vector_of({"w": torch.tensor([1.5, 1.75])}, start, ["w"], 4, 3.0, terms)
    assert terms.length(start, ["w"]) == len(words) == 4
    assert terms.changes.decode(words[:2]).tolist() == [0.25, -0.125]  # half of the changes
    assert terms.losses.decode(words[2:3]).tolist() == [1.5]
    assert terms.weights.decode(words[3:]).tolist() == [0.5]
    found = mean_of(words, start, ["w"], [4], terms)
    assert found.mean["w"].tolist() == [1.5, 1.75]
    assert found.loss == 3.0
    with pytest.raises(Broken, match="do not add up"):
        mean_of(words, start, ["w"], [5], terms)
    loud = vector_of(start, start, ["w"], 99, 1e6, terms)  # more than the unit weighs as the unit
    assert mean_of(loud, start, ["w"], [8], terms).loss == LARGEST_LOSS


# --- the sum ---


def plain(words: dict[str, np.ndarray]) -> np.ndarray:
    return sum(words.values(), np.zeros(16, np.uint32))


def random_words(cohort: list[str], length: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 2**32, length, dtype=np.uint32) for name in cohort}


def total_of(cohort: list[str], *gone: int) -> tuple[np.ndarray, np.ndarray]:
    """A masked sum and the plain one, with so many gone before keys, shares, vector and shares."""
    at = list(itertools.accumulate(gone, initial=0))
    away = [set(cohort[first:last]) for first, last in itertools.pairwise(at)]
    words = random_words(cohort)
    one = Sum.of(cohort)
    one.keys(away[0])
    one.shares(away[1])
    summed = {n: w for n, w in words.items() if n not in away[0] | away[1] | away[2]}
    one.vectors(summed)
    return one.unmask(away[3]), plain(summed)


CASES = [
    *((3, gone) for gone in [(0, 0, 0, 0)]),
    *((10, gone) for gone in [(0, 0, 0, 0), (3, 0, 0, 0), (0, 3, 0, 0), (0, 0, 3, 0)]),
    *((10, gone) for gone in [(0, 0, 0, 3), (1, 1, 1, 0), (0, 1, 1, 1)]),
    (30, (2, 2, 3, 2)),
]


@pytest.mark.parametrize(("count", "gone"), CASES)
def test_the_sum_is_the_survivors_whoever_drops_out_where(
    count: int, gone: tuple[int, ...]
) -> None:
    found, expected = total_of(names(count), *gone)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("phase", range(4))
@pytest.mark.parametrize("count", [3, 10])
def test_with_one_more_there_is_no_sum(count: int, phase: int) -> None:
    gone = [0, 0, 0, 0]
    gone[phase] = count - threshold(count) + 1
    with pytest.raises(Broken, match=f"a masked sum needs {threshold(count)}"):
        total_of(names(count), *gone)


def test_the_threshold_is_more_than_two_thirds() -> None:
    assert [threshold(n) for n in (3, 4, 10, 30, 100)] == [3, 3, 7, 21, 67]
    assert all(3 * threshold(n) > 2 * n and 3 * (threshold(n) - 1) <= 2 * n for n in range(3, 200))


@pytest.mark.parametrize("clients", [3, 10])
def test_means_are_the_plain_ones(clients: int) -> None:
    rng = np.random.default_rng(clients)
    start = {"w": torch.from_numpy(rng.normal(0, 0.02, 5000)).float()}
    counts = {name: int(rng.integers(30, 250)) for name in names(clients)}
    updates = {
        n: {"w": start["w"] + torch.from_numpy(rng.normal(0, 0.01, 5000)).float()} for n in counts
    }
    terms = Terms(clients, max(counts.values()), 1.0)
    words = {n: vector_of(updates[n], start, ["w"], counts[n], 2.0, terms) for n in counts}
    one = Sum.of(list(counts), length=5002)
    one.keys()
    one.shares()
    one.vectors(words)
    found = mean_of(one.unmask(), start, ["w"], list(counts.values()), terms)
    pairs = ((n, updates[n]["w"].double()) for n in counts)
    mean = sum(counts[n] * w for n, w in pairs) / sum(counts.values())
    change = mean - start["w"].double()
    error = found.mean["w"].double() - start["w"].double() - change
    assert float(error.norm() / change.norm()) < 5e-6
    assert found.loss == pytest.approx(2.0, rel=1e-4)


def test_a_masked_vector_looks_like_noise() -> None:
    """Also one of zeros: its bytes pass a chi-square test, and half of its bits are set."""
    one = Sum.of(names(3), length=65536)
    one.keys()
    one.shares()
    one.vectors(dict.fromkeys(names(3), np.zeros(65536, np.uint32)))
    for vector in one.masked.values():
        data = np.frombuffer(vector.tobytes(), np.uint8)
        counts = np.bincount(data, minlength=256)
        statistic = float(((counts - len(data) / 256) ** 2).sum() / (len(data) / 256))
        assert chi2.sf(statistic, 255) > 1e-6
        assert abs(np.unpackbits(data).mean() - 0.5) < 0.002
    vectors = np.stack(list(one.masked.values()))
    assert not np.array_equal(vectors[0], vectors[1])
    assert np.array_equal(one.unmask(), np.zeros(65536, np.uint32))


def test_keystreams_are_those_of_rfc_8439() -> None:
    """The first block of ChaCha20 with key, nonce and counter of zeros (RFC 8439, A.1)."""
    words = np.zeros(3, np.uint32)
    add_stream(words, bytes(32))
    assert words.tobytes().hex() == "76b8e0ada0f13d90405d6ae5"
    add_stream(words, bytes(32), subtract=True)
    assert words.tolist() == [0, 0, 0]
    long = np.zeros(200_000, np.uint32)  # more than one block of the loop
    add_stream(long, bytes(32))
    assert long[:3].tobytes().hex() == "76b8e0ada0f13d90405d6ae5"
    assert len(np.unique(long)) > 199_900


def test_packed_parts_are_told_apart() -> None:
    forms = [("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), (["ab", "c"],), (["abc"],), (1, "1")]
    assert len({packed(*parts) for parts in forms}) == len(forms)


# --- what is refused ---


def ready(count: int = 4, **keys: object) -> Sum:
    one = Sum.of(names(count), **keys)  # type: ignore[arg-type]
    one.keys()
    one.shares()
    return one


def summed(count: int = 4, gone: int = 0) -> Sum:
    one = ready(count)
    words = random_words(names(count))
    one.vectors({n: words[n] for n in names(count)[gone:]})
    return one


def test_two_clients_have_no_masked_sum() -> None:
    with pytest.raises(Broken, match="of two, each learns the other's"):
        Session("run", 1, "1", ("a", "b"))


@pytest.mark.parametrize("cohort", [("b", "a", "c"), ("a", "a", "b")])
def test_a_cohort_is_in_order_and_names_nobody_twice(cohort: tuple[str, ...]) -> None:
    with pytest.raises(Broken, match="not in order"):
        Session("run", 1, "1", cohort)


FORGERIES: dict[str, tuple[Callable[[Advert, Advert], Advert], str]] = {
    "unsigned": (lambda own, other: replace(own, signature=b""), "not signed"),
    "other keys": (lambda own, other: replace(own, mask_key=other.mask_key), "not signed|twice"),
    "other's signature": (lambda own, o: replace(own, signature=o.signature), "not signed"),
    "cut key": (lambda own, other: replace(own, share_key=own.share_key[:31]), "another length"),
    "no key": (lambda own, other: replace(own, mask_key=None), "another length"),  # type: ignore[arg-type]
    "unknown": (lambda own, other: replace(own, site="mallory"), "none of the session's"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_keys_that_are_not_a_pinned_clients_are_refused_by_all(name: str) -> None:
    forge, text = FORGERIES[name]
    one = Sum.of(names(4))
    adverts = [client.keys() for client in one.clients.values()]
    forged = forge(adverts[1], adverts[2])
    with pytest.raises(Broken, match=text):
        one.clients["site-000"].shares([adverts[0], forged, *adverts[2:]])

    def gather() -> None:
        for advert in (adverts[0], adverts[2], forged):
            one.coordinator.add_keys(advert)
        one.coordinator.keys()

    with pytest.raises(Broken, match=text):
        gather()


@pytest.mark.parametrize("other", [{"run": "other"}, {"server_round": 2}, {"nonce": "2"}])
def test_keys_of_another_run_round_or_session_are_refused(other: dict[str, object]) -> None:
    signers = Signers()
    old = Sum.of(names(4), signers=signers, **other)  # type: ignore[arg-type]
    old.keys()
    one = Sum.of(names(4), signers=signers)
    own = one.clients["site-000"].keys()
    with pytest.raises(Broken, match="not signed, for this round of this run"):
        one.clients["site-000"].shares([own, *old.adverts[1:]])
    with pytest.raises(Broken, match="not signed"):
        one.coordinator.add_keys(old.adverts[1])


def test_keys_with_which_all_secrets_are_known_are_refused() -> None:
    """Points of low order, signed all the same: of zeros the secret is zeros, with anybody."""
    signers = Signers()
    one = Sum.of(names(4), signers=signers)
    session, bad = one.coordinator.session, bytes(32)
    own = one.clients["site-000"].keys()
    message = Advert.message(session, "site-001", bad, own.share_key[::-1])
    signature = signers.of("site-001").sign(message)
    with pytest.raises(Broken, match="the keys of site-001 are none that can be"):
        one.coordinator.add_keys(Advert("site-001", bad, own.share_key[::-1], signature))


def test_a_client_wants_its_own_keys_and_enough_of_them() -> None:
    one = Sum.of(names(4))
    adverts = [client.keys() for client in one.clients.values()]
    with pytest.raises(Broken, match="a masked sum needs 3"):
        one.clients["site-000"].shares(adverts[:2])
    with pytest.raises(Broken, match="do not hold this client's own"):
        one.clients["site-001"].shares([adverts[0], *adverts[2:]])
    with pytest.raises(Broken, match="a client or a key twice"):
        one.clients["site-002"].shares([*adverts, adverts[0]])


def test_replayed_shares_are_refused() -> None:
    """Shares sealed in another session, for another client, by another, or with a changed bit."""
    signers = Signers()
    old, one = ready(signers=signers, nonce="0"), ready(signers=signers)
    own, words = one.coordinator.shares_for("site-000"), random_words(names(4))["site-000"]
    peer = "site-001"
    wrong = {
        "old": old.coordinator.shares_for("site-000")[peer],
        "another's": one.coordinator.shares_for("site-002")[peer],
        "by another": own["site-002"],
        "bit": own[peer][:-1] + bytes([own[peer][-1] ^ 1]),
    }
    for data in wrong.values():
        again = ready(signers=signers)
        sealed = {**again.coordinator.shares_for("site-000"), peer: data}
        with pytest.raises(Broken, match="were not sealed for this session"):
            again.clients["site-000"].masked(words, sealed, BINDING)
        with pytest.raises(Broken, match="this session has failed"):  # and nothing after it
            again.clients["site-000"].reveal(again.members, {})
    for data in (b"", own[peer][:-1], None):
        again = ready(signers=signers)
        with pytest.raises(Broken, match="another length"):
            again.clients["site-000"].masked(words, {**own, peer: data}, BINDING)  # type: ignore[dict-item]
    stranger = ready(signers=signers)
    with pytest.raises(Broken, match="which has sent no keys"):
        stranger.clients["site-000"].masked(words, {**own, "mallory": own[peer]}, BINDING)
    few = ready(signers=signers)
    sealed = dict(itertools.islice(few.coordinator.shares_for("site-000").items(), 1))
    with pytest.raises(Broken, match="a masked sum needs 3"):
        few.clients["site-000"].masked(words, sealed, BINDING)


def test_every_step_is_taken_once_and_in_order() -> None:
    one = summed()
    client = one.clients["site-000"]
    with pytest.raises(Broken, match="a second time"):
        client.masked(random_words(names(4))["site-000"], {}, BINDING)
    with pytest.raises(Broken, match="a second time"):
        client.keys()
    client.reveal(one.survivors, {})
    with pytest.raises(Broken, match="a second time"):  # unmasking asked twice
        client.reveal(one.survivors, {})
    with pytest.raises(Broken, match="out of turn"):
        client.confirm(one.survivors)
    early = Sum.of(names(4)).clients["site-000"]
    with pytest.raises(Broken, match="out of turn"):
        early.reveal(names(4), {})
    with pytest.raises(Broken, match="out of turn"):
        early.confirm(names(4))


def test_a_client_unmasks_one_list_of_survivors_that_enough_have_signed() -> None:
    one = summed(count=7, gone=1)
    client, survivors = one.clients["site-003"], one.survivors
    signatures = {n: one.clients[n].confirm(survivors) for n in survivors}
    assert client.confirm(survivors) == signatures["site-003"]  # the same, asked again
    with pytest.raises(Broken, match="another list of survivors"):
        client.confirm(survivors[1:])
    few = dict(itertools.islice(signatures.items(), threshold(7) - 1))
    with pytest.raises(Broken, match="have signed the list"):
        one.clients["site-001"].reveal(survivors, few)
    others = {**signatures, "site-002": signatures["site-004"]}
    with pytest.raises(Broken, match="has not signed this list"):
        one.clients["site-002"].reveal(survivors, others)
    assert len(one.clients["site-006"].reveal(survivors, signatures)) == 7


def test_both_shares_of_a_peer_are_never_given() -> None:
    """All alive first, then one dead: the second list is another one, whoever has signed it."""
    one = summed(count=7)
    client = one.clients["site-003"]
    shares = client.reveal(one.survivors, {})
    assert len(shares) == 7
    for names_ in (one.survivors[1:], one.survivors):
        with pytest.raises(Broken):
            client.reveal(names_, {})
        with pytest.raises(Broken):
            client.confirm(names_)


@pytest.mark.parametrize(
    ("survivors", "text"),
    [
        (["site-001", "site-000", "site-002"], "not all members"),
        (["site-000", "site-000", "site-001"], "not all members"),
        (["mallory", "site-000", "site-001"], "not all members"),
        (["site-001", "site-002", "site-003"], "not in the sum"),
        (["site-000", "site-001"], "a masked sum needs 3"),
    ],
)
def test_lists_of_survivors_that_cannot_be(survivors: list[str], text: str) -> None:
    with pytest.raises(Broken, match=text):
        summed().clients["site-000"].confirm(survivors)


@pytest.mark.parametrize("what", ["binding", "members"])
def test_masks_of_clients_who_were_told_otherwise_do_not_cancel(what: str) -> None:
    """One client is given another model, or other members: the sum is noise, and is refused."""
    start, terms = {"w": torch.zeros(14)}, Terms(4, 1, 1.0)
    words = vector_of(start, start, ["w"], 1, 1.0, terms)
    one = ready()
    for name in one.members:
        sealed = one.coordinator.shares_for(name)
        odd = name == "site-000"
        if odd and what == "members":
            del sealed["site-003"]
        binding = b"another model" if odd and what == "binding" else BINDING
        masked = one.clients[name].masked(words, sealed, binding)
        one.coordinator.add_masked(name, masked, 16)
    one.survivors = one.coordinator.survivors()
    shares = {n: one.clients[n].reveal(one.survivors, {}) for n in one.members[1:]}
    for name, own in shares.items():
        one.coordinator.add_revealed(name, own)
    total = one.coordinator.total()
    assert total[:14].any()
    with pytest.raises(Broken, match="do not add up"):
        mean_of(total, start, ["w"], [1, 1, 1, 1], terms)


def test_the_coordinator_leaves_out_who_sends_what_was_not_asked_for() -> None:
    one = ready()
    coordinator, own = one.coordinator, np.zeros(16, np.uint32)
    blamed: list[tuple[Callable[[], object], str]] = [
        (lambda: coordinator.add_masked("site-000", own[:15], 16), "a vector of 15 words, not of"),
        (lambda: coordinator.add_masked("site-000", own.astype(np.int64), 16), "a vector of"),
        (lambda: coordinator.add_masked("mallory", own, 16), "not among those"),
        (lambda: coordinator.add_shares("site-000", {}), "too late"),
        (lambda: coordinator.add_keys(one.adverts[0]), "too late"),
    ]
    for act, text in blamed:
        with pytest.raises(Broken, match=text) as caught:
            act()
        assert caught.value.site
    words = random_words(names(4))
    one.vectors(words)
    with pytest.raises(Broken, match="twice"):
        coordinator.add_masked("site-000", own, 16)
    shares = one.clients["site-000"].reveal(one.survivors, {})
    for wrong in ({}, {**shares, "mallory": b""}, {**shares, "site-001": b"\xff" * SHARE_BYTES}):
        with pytest.raises(Broken, match="one share of each"):
            coordinator.add_revealed("site-000", wrong)
    coordinator.add_revealed("site-000", shares)
    with pytest.raises(Broken, match="twice"):
        coordinator.add_revealed("site-000", shares)
    for name in names(4)[1:]:
        coordinator.add_revealed(name, one.clients[name].reveal(one.survivors, {}))
    assert np.array_equal(coordinator.total(), plain(words))


def test_shares_for_a_client_must_be_one_for_each_other() -> None:
    one = Sum.of(names(4))
    one.keys()
    sealed = one.clients["site-000"].shares(one.adverts)
    short = {**sealed, "site-001": b"x"}
    wrong = [({}, "for each"), ({**sealed, "site-000": b""}, "for each"), (short, "length")]
    for mapping, text in wrong:
        with pytest.raises(Broken, match=text):
            one.coordinator.add_shares("site-000", mapping)


def test_a_lying_share_gives_no_sum() -> None:
    """Of one who is gone the key is compared; of others the weights tell."""
    start, terms = {"w": torch.zeros(14)}, Terms(4, 1, 1.0)
    words = vector_of(start, start, ["w"], 1, 1.0, terms)
    one = ready()
    one.vectors(dict.fromkeys(names(4)[1:], words))
    signatures = {n: one.clients[n].confirm(one.survivors) for n in one.survivors}
    for name in one.survivors:
        shares = one.clients[name].reveal(one.survivors, signatures)
        if name == "site-002":
            shares["site-000"] = bytes(SHARE_BYTES)
        one.coordinator.add_revealed(name, shares)
    with pytest.raises(Broken, match="cannot be unmasked"):
        one.coordinator.total()


def test_choices_of_shares_do_not_matter() -> None:
    """Any 3 of 4 give the same sum; there are as many such choices as there should be."""
    words = random_words(names(4))
    found = []
    for away in names(4):
        one = ready()
        one.vectors(words)
        found.append(one.unmask({away}))
    assert len(found) == comb(4, 3)
    assert all(np.array_equal(total, plain(words)) for total in found)
