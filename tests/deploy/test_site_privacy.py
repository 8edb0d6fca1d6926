"""Private runs over machines: every site has its own noise and books, and tells no losses."""

import json
import math
import shutil
from pathlib import Path

import pytest

from fedclip.config.loading import config_from_dict
from fedclip.deploy.messages.envelope import Envelope, read_header
from fedclip.errors import UsageError
from fedclip.federated.privacy.accounting import Spent, epsilon
from fedclip.federated.privacy.ledger import Books, Ledger
from fedclip.federated.privacy.secret import create_key, fingerprint
from tests.support.machines import (
    MAY_LEAVE,
    NAMES,
    SIZES,
    FakeMail,
    coordinate_here,
    trainer,
    tree,
    write_images,
)

PRIVACY = {"unit": "example", "target_epsilon": 4.0, "delta": 1e-3}
QUICK = {"unit": "example", "noise_multiplier": 1.5, "delta": 1e-3}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def config_of(images, **sections):
    sections = {"privacy": PRIVACY, "federation": {"strategy": "ffa"}} | sections
    values = tree(images, **sections)
    values["data"] |= {"batch_size": 4}
    values["model"]["lora"] |= {"last_layers": 1, "lora_dropout": 0.0}
    return config_from_dict(values)


def sites(images, state, **keys):
    return {name: trainer(images, state, name, **keys).answer for name in NAMES}


def books_of(state, name="north"):
    (path,) = (state / name / "privacy").glob("*/ledger.json")
    return json.loads(path.read_text())


def lines_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A private run of three sites in this process: the run, its messages, the sites' states."""
    state = tmp_path_factory.mktemp("private")
    mail = FakeMail(sites(images, state))
    run, _ = coordinate_here(config_of(images), state / "run", mail)
    return run, mail, state


def test_every_site_counts_by_its_own_numbers_and_stays_below_its_target(finished):
    run, _, state = finished
    spent, noises = [], []
    for name in NAMES:
        books = books_of(state, name)
        (own,) = books["mechanisms"].values()
        examples = round(4 / own["sampling_rate"])
        assert 0 < examples <= SIZES[name]
        steps = [list(entry["steps"].values()) for entry in books["entries"]]
        assert steps == [[round(examples / 4)]] * 2
        told = epsilon(
            Spent(own["sampling_rate"], own["noise_multiplier"], 2 * round(examples / 4)), 1e-3
        ).least
        assert 4.0 * 0.98 <= told <= 4.0
        spent.append(told)
        noises.append(own["noise_multiplier"])
    promise = run.summary["privacy"]
    assert promise["epsilon"] == pytest.approx(max(spent))
    assert (promise["guarantee"], promise["unit"], promise["delta"]) == (True, "example", 1e-3)
    assert promise["noise_multiplier"] == pytest.approx([min(noises), max(noises)])


def test_no_loss_and_nothing_of_single_sites_is_told(finished):
    run, mail, _ = finished
    for _, data in mail.received:
        header = Envelope.unpack(data).header
        assert set(header) <= MAY_LEAVE[header["kind"]] | {"epsilon"}
        if header["kind"] == "update":
            assert (header["loss"], header["start_loss"]) == (None, None)
            assert 0 < header["epsilon"] <= 4.0
        if header["kind"] == "tested":
            assert (header["tests"], header["correct"]) == (0, 0)
    lines = lines_of(run)
    assert not any({"loss", "clients", "num_examples", "client_accuracy"} & set(x) for x in lines)
    told = [line["epsilon"] for line in lines]
    assert told[0] == 0 < told[1] < told[2] == run.summary["privacy"]["epsilon"]


def test_the_key_of_a_run_that_has_ended_is_gone(finished):
    state = finished[2]
    assert not list(state.glob("*/privacy/*/noise.key"))
    assert len(list(state.glob("*/privacy/*/ledger.json"))) == 3


def requests_of(mail, name):
    return [data for to, data in mail.sent if to == name and read_header(data)["kind"] == "train"]


def test_what_is_asked_again_is_answered_alike_and_counted_once(images, tmp_path):
    """Also by a new process; another request of the same round costs again."""
    kept = {}

    def kill(data):
        if read_header(data)["kind"] == "train":
            kept["request"], kept["answer"] = data, north(data)
            raise KeyboardInterrupt
        return north(data)

    north = trainer(images, tmp_path, "north").answer
    mail = FakeMail(sites(images, tmp_path) | {"north": kill})
    with pytest.raises(KeyboardInterrupt):
        coordinate_here(config_of(images, privacy=QUICK), tmp_path / "run", mail)
    once = books_of(tmp_path)
    again = trainer(images, tmp_path, "north").answer(kept["request"])
    first, second = (Envelope.unpack(data) for data in (kept["answer"], again))
    assert first.tensors.keys() == second.tensors.keys()
    assert all((first.tensors[n] == second.tensors[n]).all() for n in first.tensors)
    assert books_of(tmp_path) == once
    asked = Envelope.unpack(kept["request"])
    other = Envelope(dict(asked.header), {n: t + 0.5 for n, t in asked.tensors.items()}).pack()
    trainer(images, tmp_path, "north").answer(other)
    after = books_of(tmp_path)["entries"]
    assert len(after) == 2
    assert [entry["server_round"] for entry in after] == [1, 1]
    # The first one once more: its own epsilon, not that of what came after it.
    third = Envelope.unpack(trainer(images, tmp_path, "north").answer(kept["request"]))
    assert third.header["epsilon"] == first.header["epsilon"]
    assert books_of(tmp_path)["entries"] == after


def test_a_site_spends_no_more_than_its_total_over_all_runs(images, finished):
    state = finished[2]
    total = {"policy": {"total_epsilon": 4.1}}
    answers = sites(images, state) | {"north": trainer(images, state, "north", **total).answer}
    config = config_of(images, privacy=QUICK, deploy={"quorum": 2, "round_deadline": 1.0}, seed=1)
    run, said = coordinate_here(config, state / "second", FakeMail(answers))
    assert any("north" in line and "refuse" in line for line in said)
    assert run.summary["rounds"] == 2
    books = [json.loads(p.read_text()) for p in (state / "north" / "privacy").glob("*/ledger.json")]
    assert sorted(len(own["entries"]) for own in books) == [0, 2]


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_books_that_cannot_be_read_count_as_spent(images, tmp_path, damage):
    north = trainer(images, tmp_path, "north")
    mail = FakeMail(sites(images, tmp_path) | {"north": north.answer})
    config = config_of(images, privacy=QUICK, federation={"strategy": "ffa", "rounds": 1})
    coordinate_here(config, tmp_path / "run", mail)
    (request,) = requests_of(mail, "north")
    (path,) = (tmp_path / "north" / "privacy").glob("*/ledger.json")
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text().replace('"server_round": 1', '"server_round": 2'))
    said = []
    site = trainer(images, tmp_path, "north")
    site._say = said.append
    header = read_header(site.answer(request))
    assert header["kind"] == "refusal"
    assert any("ledger.json" in line or "noise.key" in line for line in said)


def asked_once(images, tmp_path):
    """A request of a run of one round that the site north has answered."""
    mail = FakeMail(sites(images, tmp_path))
    config = config_of(images, privacy=QUICK, federation={"strategy": "ffa", "rounds": 1})
    coordinate_here(config, tmp_path / "run", mail)
    return requests_of(mail, "north")[0]


@pytest.mark.parametrize("what", ["another site's", "no room"])
def test_a_site_says_what_is_wrong_with_the_place_of_its_books(images, tmp_path, what):
    request = asked_once(images, tmp_path)
    own, other = (tmp_path / name / "privacy" for name in ("north", "south"))
    shutil.rmtree(own)
    if what == "no room":
        own.write_text("a file where the folder should be")
    else:
        shutil.copytree(other, own)
        (run,) = own.iterdir()
        create_key(run / "noise.key")
        books = Books.model_validate(
            {k: v for k, v in books_of(tmp_path, "south").items() if k != "sha256"}
        )
        key = fingerprint((run / "noise.key").read_bytes())
        Ledger.create(run / "ledger.json", books.model_copy(update={"key_sha256": key}))
    site, said = trainer(images, tmp_path, "north"), []
    site._say = said.append
    assert read_header(site.answer(request))["kind"] == "refusal"
    words = {"no room": "cannot be made", "another site's": "books of another site"}[what]
    assert any(words in line for line in said)


@pytest.mark.parametrize(
    ("privacy", "text"),
    [
        ({"unit": "client"}, "privacy.unit: client"),
        ({"reproducible": True}, "privacy.reproducible"),
        ({"tell": True}, "privacy.tell"),
    ],
)
def test_what_sites_cannot_promise_is_refused_at_the_coordinator(images, tmp_path, privacy, text):
    config = config_of(images, privacy=QUICK | privacy)
    with pytest.raises(UsageError, match=text):
        coordinate_here(config, tmp_path / "run", FakeMail(sites(images, tmp_path)))


@pytest.mark.parametrize(
    ("privacy", "data", "text"),
    [({"delta": 0.5}, {}, "privacy.delta"), ({}, {"batch_size": 64}, "data.batch_size")],
)
def test_a_site_refuses_what_does_not_fit_its_images(images, tmp_path, privacy, data, text):
    said = []
    answers = sites(images, tmp_path)
    north = trainer(images, tmp_path, "north")
    north._say = said.append
    config = config_of(images, privacy=QUICK | privacy, deploy={"join_deadline": 1.0})
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    with pytest.raises(Exception, match=r"sites|joined"):
        coordinate_here(config, tmp_path / "run", FakeMail(answers | {"north": north.answer}))
    assert any(text in line for line in said)


def test_a_site_that_tells_an_epsilon_or_none_where_it_should_not_is_left_out(images, tmp_path):
    def silent(data):
        answer = honest(data)
        envelope = Envelope.unpack(answer)
        if envelope.kind != "update":
            return answer
        header = {k: v for k, v in envelope.header.items() if k != "epsilon"} | {"loss": 0.5}
        return Envelope(header, dict(envelope.tensors)).pack()

    honest = trainer(images, tmp_path, "north").answer
    config = config_of(images, privacy=QUICK, deploy={"quorum": 2, "round_deadline": 1.0})
    mail = FakeMail(sites(images, tmp_path) | {"north": silent})
    run, said = coordinate_here(config, tmp_path / "run", mail)
    assert any("no epsilon" in line for line in said)
    assert math.isfinite(run.summary["privacy"]["epsilon"])
