"""Answers that no honest client gives: each is refused by name, and the round goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from fedclip.config.loading import config_from_dict
from fedclip.deploy.messages import replies
from fedclip.deploy.messages.envelope import Envelope, pack_header
from fedclip.deploy.remote.roster import Answer
from fedclip.errors import TrainingFailed
from fedclip.experiment import run as experiment
from fedclip.records import Cohort, LeftOut
from tests.support.machines import NAMES, FakeMail, coordinate_here, sequential, trainer, tree
from tests.support.machines import write_images as images_in

Header = dict[str, Any]
Tensors = dict[str, torch.Tensor]
HUGE = 10**400
TEXT = "\x1b[2J\nround 9: south has answered\n" + "y" * 900_000


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images_in(tmp_path_factory.mktemp("images"))


def raw(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A message with any header at all: NaN, numbers of 400 digits, missing keys."""
    text = json.dumps(header)
    return bytes(save(dict(tensors), {"header": text})) if tensors else pack_header(text)


class Asked:
    """A request to a site, its honest answer, and the answers before."""

    def __init__(self, request: bytes, answer: bytes, before: list[bytes]) -> None:
        self.request, self.answer, self.before = Envelope.unpack(request), answer, before
        whole = Envelope.unpack(answer)
        self.header: Header = dict(whole.header)
        self.tensors: Tensors = dict(whole.tensors)

    def telling(self, **header: Any) -> bytes:
        return raw(self.header | header, self.tensors)

    def without(self, key: str) -> bytes:
        return raw({k: v for k, v in self.header.items() if k != key}, self.tensors)

    def sending(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> bytes:
        return raw(self.header, {n: change(n, t.clone()) for n, t in self.tensors.items()})

    def times(self, factor: float) -> bytes:
        start = {n: self.request.tensors[n.replace("update", "state")] for n in self.tensors}
        return self.sending(lambda n, t: start[n] + factor * (t - start[n]))


def one_number(value: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor[7] = value
        return tensor

    return change


Attack = Callable[[Asked], bytes]


def telling(**header: Any) -> Attack:
    return lambda asked: asked.telling(**header)


NUMBERS: dict[str, Attack] = {
    f"{key} {str(value)[:9]}": telling(**{key: value})
    for key, values in {
        "loss": (HUGE, -HUGE, math.nan, math.inf, -math.inf, None, "0.5", True, [], {}, -1, 1e7),
        "seconds": (HUGE, math.nan, None, -1.0, 1e300, "1"),
        "steps": (HUGE, 0, -1, 1.5, True, None, math.nan, 10**6),
        "num_examples": (HUGE, 2**39, 23, 0, -24, 24.0, None, "24", math.nan),
        "rate_sum": (HUGE, "0", -1, math.inf),
        "start_loss": (HUGE, "0", -1, math.inf),
    }.items()
    for value in values
}
TENSORS: dict[str, tuple[Attack, str]] = {
    "NaN": (lambda a: a.sending(one_number(math.nan)), "finite"),
    "infinity": (lambda a: a.sending(one_number(math.inf)), "finite"),
    "minus infinity": (lambda a: a.sending(one_number(-math.inf)), "finite"),
    "largest number": (lambda a: a.sending(one_number(3e38)), "size"),
    "19 times": (lambda a: a.times(19), "size"),
    "-19 times": (lambda a: a.times(-19), "size"),
    "gauge": (lambda a: a.sending(lambda n, t: t * (1000 if "B" in n else 0.001)), "size"),
    "shorter": (lambda a: a.sending(lambda n, t: t[:-1]), "message"),
    "longer": (lambda a: a.sending(lambda n, t: torch.cat([t, t])), "message"),
    "empty": (lambda a: a.sending(lambda n, t: t[:0]), "message"),
    "a matrix": (lambda a: a.sending(lambda n, t: t[None]), "message"),
    "float64": (lambda a: a.sending(lambda n, t: t.double()), "message"),
    "int8": (lambda a: a.sending(lambda n, t: t.to(torch.int8)), "message"),
    "no tensors": (lambda a: raw(a.header, {}), "message"),
    "half of them": (lambda a: raw(a.header, {"update/A": a.tensors["update/A"]}), "message"),
    "more": (lambda a: raw(a.header, a.tensors | {"state/A": torch.ones(2)}), "message"),
}
HEADERS: dict[str, tuple[Attack, str]] = {
    "unknown key": (telling(root=True), "keys"),
    "unknown long key": (telling(**{"k" * 10_000: 1}), "keys"),
    "stale": (telling(round=0), "round"),
    "round as text": (telling(round="1"), "round"),
    "no round": (lambda a: a.without("round"), "round"),
    "replay": (lambda a: a.before[0], "round"),
    "nonce": (telling(nonce="used"), "nonce"),
    "base": (telling(base="x" * 900_000), "base"),
    "no base": (lambda a: a.without("base"), "base"),
    "run": (telling(run="other"), "run"),
    "job": (telling(job=None), "run"),
    "name": (telling(site="south"), "message"),
    "long name": (telling(site="s" * 900_000), "message"),
    "kind": (telling(kind=TEXT), "message"),
    "ready": (lambda a: raw(_ready(a), {}), "message"),
    "version": (telling(version=[2] * 1000), "message"),
    "ranks": (telling(ranks={str(n): n for n in range(10_000)}), "ranks"),
    "ranks as list": (telling(ranks=[4]), "ranks"),
    "layout": (telling(layout="0" * 16), "names"),
    "form": (telling(form="int8"), "dtype"),
    "form as list": (telling(form=[HUGE]), "dtype"),
    "refusal": (lambda a: raw(_refusal(a, TEXT), {}), "refuses"),
    "refusal in lists": (lambda a: raw(_refusal(a, [[TEXT]]), {}), "refuses"),
    "no bytes": (lambda a: b"", "message"),
    "noise": (lambda a: b"\x80\x04\x95noise" * 100, "message"),
    "cut": (lambda a: a.answer[:-100], "message"),
    "length": (lambda a: (2**62).to_bytes(8, "little") + a.answer[8:], "message"),
    "too large": (lambda a: a.answer + b" " * 10**6, "message"),
    "deep": (lambda a: pack_header("[" * 90_000), "message"),
    "long digits": (lambda a: pack_header('{"version":1,"loss":' + "9" * 9999 + "}"), "message"),
    "a list": (lambda a: pack_header("[1]"), "message"),
}


def _ready(asked: Asked) -> Header:
    ticket = {k: asked.header[k] for k in ("run", "job", "round", "nonce", "base", "version")}
    return {**ticket, "kind": "ready", "site": "north", "num_examples": 24, "software": {}}


def _refusal(asked: Asked, reason: Any) -> Header:
    ticket = {k: asked.header[k] for k in ("run", "job", "round", "nonce", "base", "version")}
    return {**ticket, "kind": "refusal", "site": "north", "code": "x", "reason": reason}


def attacked(
    images: Path, folder: Path, attacks: list[Attack], **sections: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a run in which north sends another attack each round; a first one honestly."""
    before: list[bytes] = []
    honest = trainer(images, folder, "north").answer

    def hostile(data: bytes) -> bytes | None:
        answer, request = honest(data), Envelope.unpack(data)
        if request.kind != "train":
            return answer
        before.append(answer)
        number = int(request.header["round"]) - 2
        return answer if number < 0 else attacks[number](Asked(data, answer, before))

    sites = {n: trainer(images, folder, n).answer for n in NAMES} | {"north": hostile}
    values = tree(
        images,
        federation={"rounds": 1 + len(attacks)} | sections.pop("federation", {}),
        evaluation={"every": 1000, "max_examples": 1},
        deploy={"round_deadline": 60.0, "largest_message_mb": 1.0, "sites": list(NAMES)},
        **sections,
    )
    run, said = coordinate_here(config_from_dict(values), folder / "run", FakeMail(sites))
    tensors = load_file(run.folder / "checkpoint.safetensors")
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    return lines_of(run.folder), said


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(record: dict[str, Any], client: str = "north") -> dict[str, Any]:
    """The one refusal of a record, which is short, of one line and about that client."""
    (one,) = record["left_out"]
    assert one["client"] == client
    assert 0 < len(one["reason"]) <= 400
    assert one["reason"].isprintable()
    return dict(one)


def test_every_hostile_answer_is_refused_by_name_and_the_rounds_go_on(
    images: Path, tmp_path: Path
) -> None:
    # NaN and infinity are no JSON: such a message is not read at all.
    cases = (
        {
            n: (attack, "message" if n.endswith(("nan", "inf")) else "range")
            for n, attack in NUMBERS.items()
        }
        | TENSORS
        | HEADERS
    )
    cases["num_examples 23"] = (NUMBERS["num_examples 23"], "examples")
    assert len(cases) >= 80
    # One layer alone, of one tower: 90 rounds have to be trained.
    lora = {"r": 4, "lora_alpha": 8, "target_modules": {"vision_encoder": ["q_proj", "v_proj"]}}
    model = {"lora": {**lora, "last_layers": 1}}
    attacks = [attack for attack, _ in cases.values()]
    records, said = attacked(images, tmp_path, attacks, model=model)
    assert "left_out" not in records[1]
    assert sorted(records[1]["clients"]) == ["north", "south", "west"]
    for (name, (_, kind)), record in zip(cases.items(), records[2:], strict=True):
        assert sorted(record["clients"]) == ["south", "west"], name
        assert told(record)["kind"] in kind.split("|"), (name, record["left_out"])
    assert all(text.isprintable() and len(text) < 500 for text in said)
    (size,) = [r for n, r in zip(cases, records[2:], strict=True) if n == "19 times"]
    assert 10 < told(size)["figure"] < 40


NEEDED = {
    "scaffold": (
        {"federation": {"scaffold": True}, "optimizer": {"name": "sgd"}},
        [{"rate_sum": v} for v in (None, 1e-300, 1e-12, 1e300, 1.0, -5e-3, HUGE)],
    ),
    "qfedavg": (
        {"federation": {"strategy": "qfedavg"}},
        [{"start_loss": value} for value in (None, 1e300, -1, HUGE)],
    ),
}


@pytest.mark.parametrize(("sections", "headers"), NEEDED.values(), ids=NEEDED)
def test_a_number_that_the_algorithm_divides_by_is_refused(
    images: Path, tmp_path: Path, sections: dict[str, Any], headers: list[Header]
) -> None:
    attacks = [telling(**header) for header in headers]
    records, _ = attacked(images, tmp_path, attacks, **sections)
    for header, record in zip(headers, records[2:], strict=True):
        assert told(record)["kind"] in ("range", "finite"), header
        assert next(iter(header)) in told(record)["reason"]


JOINING: dict[str, tuple[Any, str]] = {
    "2**39 examples": ({"num_examples": 2**39}, "num_examples must be a whole number from 1"),
    "10**400 examples": ({"num_examples": HUGE}, "num_examples must be a whole number from 1"),
    "10**6 examples": ({"num_examples": 10**6}, "over 10000 times those of all other sites"),
    "no examples": ({"num_examples": None}, "num_examples must be a whole number from 1"),
    "an unknown key": ({"admin": 1}, "sends 'admin', which no answer holds"),
    "an error": (None, r"has not taken up the job: \x1b[2J"),
}


@pytest.mark.parametrize(("header", "why"), JOINING.values(), ids=JOINING)
def test_a_site_that_joins_with_nonsense_is_in_the_record_of_each_round(
    images: Path, tmp_path: Path, header: Header | None, why: str
) -> None:
    honest = {n: trainer(images, tmp_path, n).answer for n in NAMES}

    def hostile(data: bytes) -> bytes | None:
        whole = Envelope.unpack(answer := honest["north"](data))
        counts = {"num_examples"} & (header or {}).keys()  # which it goes on telling
        joins = whole.kind == replies.READY or (whole.kind == replies.UPDATE and counts)
        return raw(dict(whole.header) | (header or {}), whole.tensors) if joins else answer

    class Mail(FakeMail):
        def collect(self, tickets: Any) -> Any:
            for answer in super().collect(tickets):
                whole = Envelope.unpack(answer.data)
                bad = header is None and whole.header["site"] == "north"
                yield Answer(answer.ticket, None, TEXT) if bad else answer

    values = tree(
        images,
        federation={"rounds": 1},
        evaluation={"max_examples": 1},
        deploy={"round_deadline": 0.3, "join_deadline": 0.3, "sites": list(NAMES)},
    )
    mail = Mail(honest | {"north": hostile})
    run, said = coordinate_here(config_from_dict(values), tmp_path / "run", mail)
    reason = told(lines_of(run.folder)[-1])["reason"]
    assert any(part in reason for part in why.split("|")), reason
    if why.startswith("over"):
        told_too = "north says it has 1000000 training examples, more than 90% of all"
        assert sum(told_too in text for text in said) == 1
    assert all(text.isprintable() and len(text) < 500 for text in said)


def first(cohort: Cohort, **report: Any) -> Cohort:
    return replace(cohort, reports=(replace(cohort.reports[0], **report), *cohort.reports[1:]))


def with_value(cohort: Cohort, value: float) -> Cohort:
    for tensor in cohort.tensors.values():
        tensor[0].view(-1)[3] = value
    return cohort


SIMULATED: dict[str, tuple[Callable[[Cohort], Cohort], str]] = {
    f"{key} {str(value)[:9]}": (lambda c, key=key, value=value: first(c, **{key: value}), kinds)
    for key, values, kinds in (
        ("loss", (HUGE, math.nan, -math.inf, None, "x", True, -1.0, 1e9), "range|finite"),
        ("seconds", (HUGE, math.nan, -1.0, None), "range|finite"),
        ("steps", (HUGE, 0, 1.5, 10**7), "range|finite"),
        ("num_examples", (HUGE, 2**39, 0, 1, math.nan), "range|finite|examples"),
        ("rate_sum", (math.inf, -1.0, None), "range|finite"),
        ("start_loss", (math.inf, -1.0, "x"), "range|finite"),
    )
    for value in values
} | {
    f"values {value}": (lambda c, value=value: with_value(c, value), "finite")
    for value in (math.nan, math.inf, -math.inf)
}


def test_in_a_simulation_too_one_client_is_left_out(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that training itself finds to have diverged."""
    make = experiment.create_engine

    def diverged(cohort: Cohort) -> Cohort:
        return Cohort((), {}, (LeftOut(cohort.reports[0].client_id, "finite", "the loss is nan"),))

    cases = SIMULATED | {"diverged": (diverged, "finite")}

    class Hostile:
        def __init__(self, parts: Any, private: Any = None) -> None:
            self.inner = make(parts, private)

        def train(self, request: Any) -> Any:
            attack = [change for change, _ in cases.values()][request.server_round - 1]
            for cohort in self.inner.train(request):
                yield attack(cohort) if cohort.reports[0].client_id == "north" else cohort

    monkeypatch.setattr(experiment, "create_engine", Hostile)
    sections = {"federation": {"rounds": len(cases)}, "evaluation": {"every": 1000}}
    run = experiment.run(sequential(images, **sections), output=tmp_path / "run")
    for (name, (_, kind)), record in zip(cases.items(), lines_of(run.folder)[1:], strict=True):
        assert sorted(record["clients"]) == ["south", "west"], name
        assert told(record)["kind"] in kind.split("|"), (name, record["left_out"])
    tensors = load_file(run.folder / "checkpoint.safetensors")
    assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_a_robust_rule_bears_a_site_over_machines(images: Path, tmp_path: Path) -> None:
    """Minus eight times its step passes the checks; three sites bear it by the geometric median."""
    values = {"federation": {"strategy": "ffa"}, "robust": {"rule": "rfa", "attackers": 1}}
    records, said = attacked(images, tmp_path, [lambda a: a.times(-8)] * 2, **values)
    for record in records[2:]:
        assert sorted(record["clients"]) == ["north", "south", "west"]
        weights = record["weights"]
        assert weights["north"] < 0.2 < min(weights["south"], weights["west"])
    assert any(text.startswith("rfa holds a round's updates in memory") for text in said)


def test_sites_fewer_than_a_rule_needs_are_waited_for(images: Path, tmp_path: Path) -> None:
    """Half of three sites is a quorum, but the median of two bears nobody."""
    values = {"federation": {"strategy": "ffa"}, "robust": {"rule": "median", "attackers": 1}}
    with pytest.raises(TrainingFailed, match="round 2: 2 of 3 sites have answered, 3 are needed"):
        attacked(images, tmp_path, [telling(loss=-1)], **values)
