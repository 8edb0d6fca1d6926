"""The rounds of masked sums by mail: who drops out, who lies, and what sites refuse."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fuzz_messages import _bytes, _header, _tensors
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.keys.peers import PEERS, own_peers, read_peers, write_peers
from fedclip.deploy.messages.envelope import Envelope, read_header
from fedclip.deploy.messages.masks import MASKS
from fedclip.deploy.messages.replies import WORDS
from fedclip.deploy.remote.last_sum import LAST_SUM
from fedclip.errors import TrainingFailed, UsageError
from fedclip.records import Cohort
from tests.support.machines import Clock, FakeMail, clock_by_hand
from tests.support.masked_sites import (
    EXAMPLES,
    STATE,
    LightSite,
    ask,
    light_sites,
    masked_engine,
)

Answer = Callable[[bytes], bytes | None]


@pytest.fixture(autouse=True)
def _clock() -> Iterator[Clock]:
    with clock_by_hand() as clock:
        yield clock


@pytest.fixture(scope="module")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    keys.init(folder, ["localhost"])
    for name in EXAMPLES:
        keys.site(folder, name)
    write_peers(folder)
    return folder


def step_of(data: bytes) -> str:
    header = read_header(data)
    return str(header.get("step", header["kind"]))


def silent_at(site: Answer, *steps: str) -> Answer:
    return lambda data: None if step_of(data) in steps else site(data)


def changed(
    data: bytes, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
) -> bytes:
    """A message with another header, or other tensors."""
    envelope = Envelope.unpack(data)
    header, tensors = dict(envelope.header), dict(envelope.tensors)
    change(header, tensors)
    return Envelope({k: v for k, v in header.items() if k != "version"}, tensors).pack()


def lies(site: Answer, step: str, change: Callable[[dict[str, Any], Any], None]) -> Answer:
    """A site whose answers to one step are changed."""

    def answer(data: bytes) -> bytes | None:
        found = site(data)
        return changed(found, change) if found and step_of(data) == step else found

    return answer


def told(site: Answer, step: str, change: Callable[[dict[str, Any], Any], None]) -> Answer:
    """A site that is told something else than the coordinator's code would."""
    return lambda data: site(changed(data, change) if step_of(data) == step else data)


def asked(mail: FakeMail, name: str) -> list[str]:
    return [step_of(data) for receiver, data in mail.sent if receiver == name]


def only(found: Any) -> Cohort:
    (cohort,) = found
    return cohort


def mean_moved(cohort: Cohort) -> float:
    assert cohort.total is not None
    change = cohort.total.mean["w"] - STATE["w"]
    assert float(change.max() - change.min()) < 1e-6
    return float(change.mean())


def test_rounds_go_on_with_keys_made_ahead(key_folder: Path, tmp_path: Path) -> None:
    mail = FakeMail(light_sites(key_folder, tmp_path))
    engine, _ = masked_engine(key_folder, mail)
    for server_round in (1, 2, 3):
        cohort = only(engine.train(ask(server_round)))
        assert mean_moved(cohort) == pytest.approx(0.3, abs=1e-6)
        assert cohort.total is not None
        assert cohort.total.loss == pytest.approx(0.5, abs=1e-5)
        assert [r.client_id for r in cohort.reports] == list(EXAMPLES)
        assert all(r.loss != r.loss for r in cohort.reports)  # nan
        assert not cohort.left_out
    assert asked(mail, "west") == ["hello", "keys", "shares", *["train", "open"] * 3]


def test_keys_are_not_made_ahead_where_other_clients_may_come(
    key_folder: Path, tmp_path: Path
) -> None:
    mail = FakeMail(light_sites(key_folder, tmp_path))
    engine, _ = masked_engine(key_folder, mail, ahead=False)
    for server_round in (1, 2):
        only(engine.train(ask(server_round)))
    assert asked(mail, "west")[1:] == ["keys", "shares", "train", "open"] * 2


@pytest.mark.parametrize("step", ["keys", "shares", "train", "open"])
def test_one_of_four_may_drop_out_at_each_step(key_folder: Path, tmp_path: Path, step: str) -> None:
    sites = light_sites(key_folder, tmp_path)
    sites["west"] = silent_at(sites["west"], step)
    mail = FakeMail(sites)
    engine, said = masked_engine(key_folder, mail)
    cohort = only(engine.train(ask()))
    gone = step != "open"  # whose vector is in the sum all the same
    assert mean_moved(cohort) == pytest.approx(14 / 60 if gone else 0.3, abs=1e-6)
    assert [one.client_id for one in cohort.left_out] == ["west"]
    assert any("west has not answered within" in line for line in said)
    assert ("confirm" in asked(mail, "north")) == (step == "train")
    sites["west"] = LightSite(
        "west", key_folder, tmp_path, 0.4
    )  # it is back, with no memory of keys
    again = only(engine.train(ask(2)))
    assert mean_moved(again) == pytest.approx(0.3, abs=1e-6)
    assert asked(mail, "north").count("keys") == 2


@pytest.mark.parametrize("step", ["keys", "shares", "train", "confirm"])
def test_with_two_of_four_gone_there_is_no_sum(key_folder: Path, tmp_path: Path, step: str) -> None:
    sites = light_sites(key_folder, tmp_path)
    steps = {"west": (step,), "south": (step,)}
    if step == "confirm":
        steps["south"] = ("train",)
    for name, gone in steps.items():
        sites[name] = silent_at(sites[name], *gone)
    mail = FakeMail(sites)
    engine, _ = masked_engine(key_folder, mail)
    with pytest.raises(TrainingFailed, match=r"2 of 4 .*a masked sum needs 3.*round is kept"):
        only(engine.train(ask()))
    assert "open" not in asked(mail, "north")


def test_a_round_is_repeated_with_new_keys_as_long_as_nobody_has_unmasked(
    key_folder: Path,
    tmp_path: Path,
) -> None:
    sites = light_sites(key_folder, tmp_path)
    times = {"west": 0, "south": 0}

    def once(name: str) -> Answer:
        inner = sites[name]

        def answer(data: bytes) -> bytes | None:
            times[name] += step_of(data) == "train"
            return None if step_of(data) == "train" and times[name] == 1 else inner(data)

        return answer

    sites |= {name: once(name) for name in times}
    mail = FakeMail(sites)
    engine, said = masked_engine(key_folder, mail, attempts=2)
    assert mean_moved(only(engine.train(ask()))) == pytest.approx(0.3, abs=1e-6)
    assert asked(mail, "north")[1:] == [
        "keys",
        "shares",
        "train",
        *["keys", "shares", "train", "open"],
    ]
    assert any("asked again, with new keys" in line for line in said)


def test_a_round_that_was_unmasked_is_never_summed_again(key_folder: Path, tmp_path: Path) -> None:
    """Not in the next attempt, and not by a coordinator that says it has lost the sum."""
    sites = light_sites(key_folder, tmp_path)
    for name in ("west", "south"):
        sites[name] = silent_at(sites[name], "open")
    mail = FakeMail(sites)
    engine, _ = masked_engine(key_folder, mail, attempts=3)
    with pytest.raises(TrainingFailed, match="do not repeat it"):
        only(engine.train(ask()))
    assert asked(mail, "north").count("train") == 1
    again, said = masked_engine(key_folder, mail)
    with pytest.raises(TrainingFailed, match="2 of 4 clients have sent keys"):
        only(again.train(ask()))
    assert sum("has helped to unmask round 1 already" in line for line in said) == 2
    mail = FakeMail(light_sites(key_folder, tmp_path / "other"))
    only(masked_engine(key_folder, mail)[0].train(ask()))
    restarted = FakeMail(light_sites(key_folder, tmp_path / "other"))
    for again in (mail, restarted):
        with pytest.raises(TrainingFailed, match="0 of 4 clients have sent keys"):
            only(masked_engine(key_folder, again)[0].train(ask()))
    assert mean_moved(only(masked_engine(key_folder, restarted)[0].train(ask(2))))


def test_a_coordinator_that_is_started_again_has_the_last_sum(
    key_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / LAST_SUM
    mail = FakeMail(light_sites(key_folder, tmp_path))
    first = only(masked_engine(key_folder, mail, last=path)[0].train(ask()))
    sent = len(mail.sent)
    engine, said = masked_engine(key_folder, mail, last=path)
    again = only(engine.train(ask()))
    assert len(mail.sent) == sent + 4  # greetings
    assert any("was unmasked before the restart" in line for line in said)
    assert first.total is not None
    assert again.total is not None
    assert torch.equal(first.total.mean["w"], again.total.mean["w"])
    assert again.total.loss == first.total.loss
    assert [r.client_id for r in again.reports] == [r.client_id for r in first.reports]
    only(engine.train(ask(2)))  # another round is another request
    path.write_bytes(b"damaged")
    only(engine.train(ask(3)))


# --- sites that lie ---


def other_words(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors[WORDS] = tensors[WORDS][:-1].clone()


LIES: dict[str, tuple[str, Callable[[dict[str, Any], Any], None], str]] = {
    "short vector": ("train", other_words, "a vector of 7 words, not of 8"),
    "float vector": ("train", lambda h, t: t.update({WORDS: t[WORDS].float()}), "no vector of"),
    "no vector": ("train", lambda h, t: t.clear(), "no vector of"),
    "more": ("train", lambda h, t: t.update({"w": torch.ones(1)}), "that nobody asked for"),
    "other round": ("train", lambda h, t: h.update(round=2), "a stale answer"),
    "other nonce": ("train", lambda h, t: h.update(nonce="x"), "an old one, replayed"),
    "count": ("train", lambda h, t: h.update(num_examples=41), "now has 41 examples"),
    "huge count": ("train", lambda h, t: h.update(num_examples=10**400), "num_examples must be"),
    "loss": ("train", lambda h, t: h.update(loss=0.5), "sends 'loss', which no answer holds"),
    "keys": ("keys", lambda h, t: h.update(keys=[["west", "a", "b"]]), "cannot be read"),
    "no keys": ("keys", lambda h, t: h.update(keys=None), "cannot be read"),
    "shares": ("shares", lambda h, t: h.update(shares={}), "has not sent a share for each"),
    "key text": ("keys", lambda h, t: h.update(keys=[["west", "ä", "", ""]]), "cannot be read"),
    "opened": ("open", lambda h, t: h.update(opened={"west": ""}), "has not sent one share"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_site_that_answers_nonsense_is_left_out_by_name(
    key_folder: Path, tmp_path: Path, name: str
) -> None:
    step, lie, text = LIES[name]
    sites = light_sites(key_folder, tmp_path)
    sites["west"] = lies(sites["west"], step, lie)
    engine, _ = masked_engine(key_folder, FakeMail(sites))
    cohort = only(engine.train(ask()))
    moved = 0.3 if step == "open" else 14 / 60
    assert mean_moved(cohort) == pytest.approx(moved, abs=1e-6)
    (left_out,) = cohort.left_out
    assert left_out.client_id == "west"
    assert text in left_out.reason


def test_a_site_cannot_send_keys_in_the_name_of_another(key_folder: Path, tmp_path: Path) -> None:
    sites, seen = light_sites(key_folder, tmp_path), dict[str, Any]()
    sites["east"] = lies(sites["east"], "keys", lambda h, t: seen.update(keys=h["keys"]))
    sites["west"] = lies(sites["west"], "keys", lambda h, t: h.update(seen))
    engine, _ = masked_engine(key_folder, FakeMail(sites))
    cohort = only(engine.train(ask()))
    assert "sends keys in the name of east" in cohort.left_out[0].reason


def test_a_change_that_is_too_large_is_the_sites_own_to_say(
    key_folder: Path, tmp_path: Path
) -> None:
    sites = light_sites(key_folder, tmp_path)
    sites["west"] = LightSite("west", key_folder, tmp_path, 4.0)
    engine, _ = masked_engine(key_folder, FakeMail(sites))
    cohort = only(engine.train(ask()))
    assert "changes a number by too much for a masked sum" in cohort.left_out[0].reason


# --- a coordinator that lies ---


def without_masks(header: dict[str, Any], tensors: Any) -> None:
    del header[MASKS]


def fewer(header: dict[str, Any], tensors: Any) -> None:
    header["session"] = {**header["session"], "cohort": ["east", "north", "west"]}


def stranger(header: dict[str, Any], tensors: Any) -> None:
    cohort = sorted([*header["session"]["cohort"], "mallory"])
    header["session"] = {**header["session"], "cohort": cohort}


def in_masks(**keys: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header.update({MASKS: {**header[MASKS], **keys}})


DOCTORED: dict[str, tuple[str, Callable[[dict[str, Any], Any], None], str]] = {
    "no masks": ("train", without_masks, "an update without masks, and this run was agreed"),
    "fewer sites": ("keys", fewer, "are not signed, for this round"),
    "a key not on the list": ("keys", stranger, "has no key of mallory"),
    "unit": ("train", in_masks(unit=0), "the unit of the weights cannot be 0"),
    "unit text": ("train", in_masks(unit="9" * 500), "the unit of the weights cannot be"),
    "no shares": ("train", in_masks(sealed={}), "a masked sum needs 3"),
    "bad shares": ("train", in_masks(sealed={"east": "!"}), "cannot be read"),
    "session": ("train", in_masks(session=None), "session of a masked sum cannot be read"),
    "offsets": ("train", lambda h, t: h.update(start_loss=True), "asks for more than a masked sum"),
    "step": ("open", lambda h, t: h.update(step="all"), "an unknown step"),
    "survivors": ("open", lambda h, t: h.update(survivors=["west"]), "a masked sum needs 3"),
    "unsigned": ("open", lambda h, t: h["survivors"].remove("east"), "have signed the list"),
    "nonce": (
        "shares",
        lambda h, t: h.update(session={**h["session"], "nonce": "0" * 32}),
        "an old one, replayed",
    ),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_a_site_refuses_what_a_lying_coordinator_asks(
    key_folder: Path, tmp_path: Path, name: str
) -> None:
    step, lie, text = DOCTORED[name]
    sites = light_sites(key_folder, tmp_path)
    sites["west"] = told(sites["west"], step, lie)
    engine, _ = masked_engine(key_folder, FakeMail(sites))
    cohort = only(engine.train(ask()))
    assert [one.client_id for one in cohort.left_out] == ["west"]
    assert text in cohort.left_out[0].reason


def test_a_site_takes_part_in_large_sums_only(key_folder: Path, tmp_path: Path) -> None:
    """Three of four: more than two thirds of the list, which is three, cannot be below that."""
    sites = light_sites(key_folder, tmp_path, policy={"least_masked": 4})
    engine, said = masked_engine(key_folder, FakeMail(sites))
    with pytest.raises(TrainingFailed):
        only(engine.train(ask()))
    assert sum("sums over 4 at least (policy.least_masked)" in line for line in said) == 4


@pytest.mark.parametrize("what", ["model", "rates", "unit"])
def test_a_site_that_is_given_another_model_than_the_rest_spoils_the_sum(
    key_folder: Path, tmp_path: Path, what: str
) -> None:
    """Its masks are bound to what it was asked: the coordinator gets noise, and says so."""

    def other(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        if what == "model":
            tensors |= {n: t + 1 for n, t in tensors.items()}
        elif what == "rates":
            header["progress"] = 0.99
        else:
            in_masks(unit=10)(header, tensors)

    sites = light_sites(key_folder, tmp_path)
    sites["west"] = told(sites["west"], "train", other)
    engine, _ = masked_engine(key_folder, FakeMail(sites))
    with pytest.raises(TrainingFailed, match="do not add up"):
        only(engine.train(ask()))


def test_a_replayed_message_gets_a_site_to_nothing(key_folder: Path, tmp_path: Path) -> None:
    mail = FakeMail(light_sites(key_folder, tmp_path))
    engine, _ = masked_engine(key_folder, mail)
    only(engine.train(ask()))
    only(engine.train(ask(2)))
    sent = [data for receiver, data in mail.sent if receiver == "north"]
    for data in sent[1:]:
        answer = mail.sites["north"](data)
        assert answer is not None
        assert read_header(answer)["kind"] == "refusal", step_of(data)


@pytest.mark.parametrize("way", ["asked", "answered"])
@pytest.mark.parametrize("step", ["keys", "shares", "train", "confirm", "open"])
def test_mutated_messages_cost_one_site_its_part_and_nothing_else(
    key_folder: Path, tmp_path: Path, way: str, step: str
) -> None:
    """Whatever is changed in them, nothing but fedclip's own errors comes of it."""
    draw, mutations = random.Random(f"{way} {step}"), (_bytes, _header, _header, _tensors)
    for case in range(1):

        def mutated(data: bytes) -> bytes:
            for _ in range(draw.randint(1, 2)):
                with suppress(Exception):  # no longer a message that this change could read
                    data = draw.choice(mutations)(draw, data)
            return data

        def odd(data: bytes, mutated: Answer = mutated, site: Answer | None = None) -> bytes | None:
            assert site is not None
            if read_header(data).get("step", read_header(data)["kind"]) != step:
                return site(data)
            return site(mutated(data) or b"") if way == "asked" else mutated(site(data) or b"")

        sites = light_sites(key_folder, tmp_path / str(case))
        sites["west"] = partial(odd, mutated=mutated, site=sites["west"])
        if step == "confirm":  # which is asked where somebody is missing
            sites["east"] = silent_at(sites["east"], "train")
        engine, _ = masked_engine(key_folder, FakeMail(sites))
        try:
            cohort = only(engine.train(ask()))
        except TrainingFailed:
            continue
        assert cohort.total is not None
        assert bool(cohort.total.mean["w"].isfinite().all())
        out = {one.client_id for one in cohort.left_out}
        # A site whose shares cannot be opened by another costs that one its part.
        assert out <= {"west", "east"} or (step, way) == ("shares", "answered")


# --- the list of peers ---


def test_the_list_of_peers_is_written_and_read(key_folder: Path) -> None:
    found = own_peers(keys.site_folder(key_folder, "north"), "north")
    assert sorted(found) == sorted(EXAMPLES)
    rows = write_peers(key_folder)
    assert [row["site"] for row in rows] == sorted(EXAMPLES)
    assert all(row["fingerprint"].startswith("SHA256:") for row in rows)


def test_a_list_of_peers_that_is_damaged_or_anothers_is_refused(
    key_folder: Path, tmp_path: Path
) -> None:
    place = keys.site_folder(key_folder, "north")
    whole = (place / PEERS).read_text().splitlines()
    path = tmp_path / PEERS
    other = whole[1].rpartition(" ")[0]
    for lines, text in (
        ([*whole, whole[0]], "line 5 is not one site's"),
        (["ssh-ed25519 AAAA east"], "line 1 is not"),
        ([whole[0][:40] + " east"], "line 1 is not"),
        (["x" * 100], "line 1 is not"),
        ([f"{other} ../x"], "line 1 is not"),
        ([*whole, f"{other} south-2"], "one key for two sites"),
        ([*whole[:1], f"{other} EAST"], "but for case"),
    ):
        path.write_text("\n".join(lines))
        with pytest.raises(UsageError, match=text):
            read_peers(path)
    path.write_bytes(b"\xff" * 10)
    with pytest.raises(UsageError, match="line 1 is not"):
        read_peers(path)
    with pytest.raises(UsageError, match="is missing: the list of the sites' keys; `fedclip keys"):
        read_peers(tmp_path / "none")
    with pytest.raises(UsageError, match="does not have this site's own key under its name, south"):
        own_peers(place, "south")
