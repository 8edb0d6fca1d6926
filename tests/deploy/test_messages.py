"""Messages between coordinator and sites: formats, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fuzz_messages import fuzz_messages
from fedclip.deploy.messages import replies, requests, results
from fedclip.deploy.messages.codec import (
    decode,
    digest,
    encode,
    layout_from_json,
    layout_of,
    rank_map,
)
from fedclip.deploy.messages.envelope import BadMessage, Envelope, pack_header, read_header
from fedclip.deploy.messages.outliers import too_large
from fedclip.deploy.messages.replies import Refused, read_update
from fedclip.deploy.messages.requests import Exchange, Ticket
from fedclip.records import ClientReport, RunState, TrainRequest

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
TICKET = Ticket("run", "job", 3, "nonce", "base")
REPORT = ClientReport("north", 10, 0.5, 4, 1.5)
LARGEST = 10**6


def state(rank: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        A: torch.randn(rank, 6, generator=draw),
        B: torch.randn(5, rank, generator=draw),
        "head.weight": torch.randn(3, 2, generator=draw),
        "head.bias": torch.randn(3, generator=draw),
    }


def changed(start: Mapping[str, torch.Tensor], by: float = 0.01) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {n: t + by * torch.randn(t.shape, generator=draw) for n, t in start.items()}


# Envelopes


def test_an_envelope_comes_back_as_it_was() -> None:
    envelope = Envelope({"kind": "x", "number": 1.5, "nothing": math.nan}, {"a": torch.ones(3)})
    back = Envelope.unpack(envelope.pack())
    assert back.header == {"version": 1, "kind": "x", "number": 1.5, "nothing": None}
    assert torch.equal(back.tensors["a"], torch.ones(3))


def test_a_header_alone_needs_no_torch_and_is_an_envelope() -> None:
    assert Envelope.unpack(pack_header(json.dumps({"version": 1, "kind": "k"}))).kind == "k"


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_message(data: bytes) -> None:
    with pytest.raises(BadMessage):
        Envelope.unpack(data)


@given(st.integers(0, 400))
def test_a_message_cut_short_is_refused(length: int) -> None:
    data = Envelope({"kind": "x"}, {"a": torch.arange(64.0)}).pack()
    with pytest.raises(BadMessage):
        Envelope.unpack(data[: min(length, len(data) - 1)])


def test_another_version_is_refused() -> None:
    with pytest.raises(BadMessage, match="version 2"):
        Envelope.unpack(pack_header('{"version":2}'))


def test_a_large_message_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadMessage, match="1000000 are the most"):
        Envelope.unpack(b"x" * (LARGEST + 1), LARGEST)


# Formats


def test_the_groups_are_flat_arrays_by_hand() -> None:
    tensors = {A: torch.tensor([[1.0, 2.0]]), B: torch.tensor([[3.0], [4.0]])}
    arrays, read = encode(tensors, layout_of(tensors), "fp32", "x")
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "x/A": [1.0, 2.0],
        "x/B": [3.0, 4.0],
    }
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_int8_has_a_step_for_each_component() -> None:
    """A's rows and B's columns are the components; 127 steps reach the largest value of each."""
    tensors = {
        A: torch.tensor([[127.0, 1.0], [0.0, 0.0]]),
        B: torch.tensor([[254.0, 1.0], [2.0, -1.0]]),
    }
    arrays, read = encode(tensors, layout_of(tensors), "int8", "x")
    assert arrays["x/A"].tolist() == [127, 1, 0, 0]
    assert arrays["x/A.scale"].tolist() == [1.0, 0.0]
    assert arrays["x/B"].tolist() == [127, 1, 127, -127]
    assert arrays["x/B.scale"].tolist() == pytest.approx([2.0, 1 / 127])
    assert torch.allclose(read[B], tensors[B])


@pytest.mark.parametrize(("form", "tolerance"), [("fp32", 0.0), ("fp16", 1e-3), ("int8", 5e-3)])
def test_what_is_read_is_near_what_was_sent(form: Any, tolerance: float) -> None:
    tensors = state()
    arrays, read = encode(tensors, layout_of(tensors), form, "x")
    again = decode(arrays, layout_of(tensors), form, "x")
    for name, tensor in tensors.items():
        assert torch.equal(again[name], read[name])
        assert (read[name] - tensor).abs().max() <= tolerance * tensor.abs().max()


def test_beyond_its_rank_a_factor_does_not_travel() -> None:
    tensors = state()
    layout = layout_of(tensors, rank=1)
    arrays, read = encode(tensors, layout, "fp32", "x")
    assert len(arrays["x/A"]) == 6
    assert len(arrays["x/B"]) == 5
    assert torch.equal(read[A][:1], tensors[A][:1])
    assert not read[A][1:].any()
    assert not read[B][:, 1:].any()
    assert rank_map(layout) == {"1": 1}


def test_a_layout_has_one_digest() -> None:
    one, other = layout_of(state()), layout_of(state(rank=3))
    assert digest(one) == digest(layout_from_json([[f.name, list(f.shape), f.rank] for f in one]))
    assert digest(one) != digest(other)


def test_error_feedback_loses_nothing_in_the_long_run() -> None:
    """The mean of what was read tends to the true change, though each time is rounded."""
    start = {A: torch.zeros(2, 50)}
    change = {A: torch.linspace(-1, 1, 100).reshape(2, 50).sin() * 0.01}
    exchange = Exchange(layout_of(start), start, layout_of(start), frozenset())
    residual, total = {}, torch.zeros(2, 50)  # type: dict[str, torch.Tensor], torch.Tensor
    for _ in range(50):
        data, residual = replies.update(TICKET, REPORT, change, exchange, "int8", residual)
        total += take(data, exchange, "int8").tensors[A]
    one = encode(change, layout_of(start), "int8", "x")[1][A]
    assert (total / 50 - change[A]).abs().max() < 0.1 * (one - change[A]).abs().max()


def take(data: bytes, exchange: Exchange, form: Any = "fp32") -> replies.Update:
    sent = frozenset(field.name for field in exchange.answer_layout)
    request = TrainRequest(
        3, ("north",), exchange.start, trained=sent, examples={"north": REPORT.num_examples}
    )
    return read_update(data, TICKET, "north", exchange, form, request=request, largest=LARGEST)


# Requests


def test_a_request_reaches_the_site_whole() -> None:
    start = state()
    request = TrainRequest(
        3,
        ("north", "south"),
        start,
        progress=0.25,
        round_share=0.125,
        trained=frozenset(start) - {A},
        sent=frozenset({B}),
        offsets={"north": {B: torch.ones(5, 4)}},
        anchor=start,
        proximal_mu=0.5,
        shift={"layer": torch.ones(2, 2)},
        frames={B: torch.eye(5)},
        start_loss=True,
        purpose="personal",
    )
    data, sent = requests.train(request, "north", TICKET, "fp32", "int8")
    read, exchange, up = requests.read_train(Envelope.unpack(data), "north")
    assert up == "int8"
    assert (read.server_round, read.progress, read.round_share) == (3, 0.25, 0.125)
    assert (read.trained, read.sent, read.purpose) == (request.trained, request.sent, "personal")
    assert (read.start_loss, read.proximal_mu) == (True, 0.5)
    assert read.anchor is read.state
    for mine, theirs in (
        (read.state, start),
        (read.offsets["north"], request.offsets["north"]),
        (read.shift, request.shift),
        (read.frames, request.frames),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert exchange.kept == sent.kept == {"head.weight", "head.bias"}
    assert exchange.answer_layout == sent.answer_layout
    assert [f.name for f in exchange.answer_layout] == [B]


def test_a_site_is_not_sent_what_is_anothers() -> None:
    start = state()
    other = {B: torch.full((5, 4), 7.0)}
    request = TrainRequest(3, ("north", "south"), start, starts={"south": other})
    data, _ = requests.train(request, "north", TICKET, "fp32", "fp32")
    read, _, _ = requests.read_train(Envelope.unpack(data), "north")
    assert torch.equal(read.state[B], start[B])
    data, _ = requests.train(request, "south", TICKET, "fp32", "fp32")
    read, _, _ = requests.read_train(Envelope.unpack(data), "south")
    assert torch.equal(read.state[B], other[B])


# Answers


def exchange_of(start: Mapping[str, torch.Tensor], rank: int | None = None) -> Exchange:
    return Exchange(layout_of(start, rank), start, layout_of(start, rank), frozenset())


def answer(
    ticket: Ticket = TICKET,
    tensors: Mapping[str, torch.Tensor] | None = None,
    exchange: Exchange | None = None,
    report: ClientReport = REPORT,
    form: Any = "fp32",
) -> bytes:
    exchange = exchange or exchange_of(state())
    tensors = tensors or changed(exchange.start)
    return replies.update(ticket, report, tensors, exchange, form)[0]


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8"])
def test_a_good_answer_is_taken(form: Any) -> None:
    exchange = exchange_of(state())
    tensors = changed(exchange.start)
    taken = take(answer(form=form), exchange, form)
    assert taken.report == replace(REPORT, rate_sum=math.nan) or math.isnan(taken.report.rate_sum)
    for name, tensor in tensors.items():
        assert torch.allclose(taken.tensors[name], tensor, atol=2e-4)
    squares = sum(float((tensors[n] - t).square().sum()) for n, t in exchange.start.items())
    assert taken.change == pytest.approx(math.sqrt(squares), rel=2e-2)


def poisoned(value: float) -> dict[str, torch.Tensor]:
    tensors = changed(state())
    tensors[B][2, 1] = value
    return tensors


REFUSED = {
    "another base": (answer(replace(TICKET, base="other")), "another base model"),
    "another run": (answer(replace(TICKET, run="other")), "another run"),
    "a stale round": (answer(replace(TICKET, server_round=2)), "stale .* round 2, this is round 3"),
    "a replay": (answer(replace(TICKET, nonce="old")), "replayed"),
    "another rank": (answer(exchange=exchange_of(state(rank=3))), "rank 3 in 1 layers, .* rank 4"),
    "other shapes": (
        answer(exchange=exchange_of(state() | {"head.bias": torch.ones(4)})),
        "other names or shapes",
    ),
    "other names": (
        answer(exchange=exchange_of({n: t for n, t in state().items() if n != "head.bias"})),
        "other names or shapes",
    ),
    "NaN": (answer(tensors=poisoned(math.nan)), "not finite"),
    "infinity": (answer(tensors=poisoned(math.inf)), "not finite"),
    "another format": (answer(form="int8"), "'int8' where fp32"),
    "other examples": (answer(report=replace(REPORT, num_examples=11)), "11 examples, and said 10"),
    "no loss": (answer(report=replace(REPORT, loss=math.nan)), "loss must be a number"),
    "a large message": (answer() + b" " * LARGEST, "1000000 are the most"),
    "noise": (b"noise" * 10, "cut off"),
    "a refusal": (replies.refusal(TICKET, "north", "refused", "too hot"), "refuses: too hot"),
}


@pytest.mark.parametrize(("data", "why"), REFUSED.values(), ids=REFUSED)
def test_an_answer_that_does_not_match_is_refused_by_name(data: bytes, why: str) -> None:
    with pytest.raises(Refused, match=rf"^north\b.*{why}"):
        take(data, exchange_of(state()))


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_in_short_formats(form: Any, value: float) -> None:
    data = answer(tensors=poisoned(value), form=form)
    with pytest.raises(Refused, match="north sends values that are not finite"):
        take(data, exchange_of(state()), form)


def test_numbers_may_be_left_out_only_where_nobody_needs_them() -> None:
    """Of q-FedAvg the start loss, of SCAFFOLD the sum of rates: a null would spoil the state."""
    exchange, data = exchange_of(state()), answer(report=replace(REPORT, rate_sum=math.nan))
    request = TrainRequest(3, ("north",), exchange.start)
    limits: Any = {"largest": LARGEST}
    given = (data, TICKET, "north", exchange, "fp32")
    assert read_update(*given, request=request, **limits).report.num_examples == 10
    for key, needs_it in {
        "(rate_sum|start_loss)": replace(request, start_loss=True),  # q-FedAvg needs both
        "rate_sum": replace(request, offsets={"north": {}}),
    }.items():
        with pytest.raises(Refused, match=f"north sends a {key} that is not finite"):
            read_update(*given, request=needs_it, **limits)


def test_an_answer_in_anothers_name_is_refused() -> None:
    data = answer(report=replace(REPORT, client_id="south"))
    with pytest.raises(Refused, match="north answers in the name of 'south'"):
        take(data, exchange_of(state()))


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"tests": 3, "correct": 4}, "says that 4 of 3 tests are right"),
        ({"tests": -1, "correct": 0}, "tests must be a whole number from 0 to"),
        ({"tests": 3, "correct": 1.5}, "correct must be a whole number"),
    ],
)
def test_what_a_site_says_of_its_tests_must_be_possible(header: dict[str, Any], why: str) -> None:
    good = results.tested(TICKET, "north", results.Tested(5, 4))
    assert results.read_tested(good, TICKET, "north", 10**6) == results.Tested(5, 4)
    bad = Envelope({**read_header(good), **header}).pack()
    with pytest.raises(replies.Refused, match=f"north.*{why}"):
        results.read_tested(bad, TICKET, "north", 10**6)


def test_a_result_with_something_unknown_is_refused() -> None:
    sent = results.result(RunState({"a": torch.ones(2)}), "north", TICKET)
    assert torch.equal(results.read_result(Envelope.unpack(sent)).shared["a"], torch.ones(2))
    with pytest.raises(BadMessage, match="something unknown"):
        results.read_result(Envelope({}, {"elsewhere/a": torch.ones(2)}))


def test_arrays_of_another_length_are_refused() -> None:
    envelope = Envelope.unpack(answer())
    short = {name: array[:-1] for name, array in envelope.tensors.items()}
    data = Envelope(envelope.header, short).pack()
    with pytest.raises(Refused, match=r"north: update/A: 24 values in float32 .* got \[23\]"):
        take(data, exchange_of(state()))


def test_a_header_of_lies_is_refused() -> None:
    header = read_header(answer())
    for key, value in {"num_examples": True, "steps": -1, "seconds": "x", "loss": None}.items():
        data = Envelope(header | {key: value}, Envelope.unpack(answer()).tensors).pack()
        with pytest.raises(Refused, match=f"north.*{key}"):
            take(data, exchange_of(state()))


def test_an_update_far_larger_than_the_others_is_named() -> None:
    assert too_large({"north": 1.0, "south": 1.2, "west": 0.8}, 20.0, None) == {}
    found = too_large({"north": 1.0, "south": 1.2, "west": 110.0}, 20.0, None)
    assert list(found) == ["west"]
    assert "west sends an update 100 times as large as the others'" in str(found["west"])
    assert list(too_large({"north": 1.0, "south": 100.0}, 20.0, None)) == ["south"]
    assert too_large({"north": 100.0}, 20.0, None) == {}
    assert list(too_large({"north": 100.0}, 20.0, 1.0)) == ["north"]


@given(st.lists(st.floats(1.0, 10.0), min_size=2, max_size=8), st.data())
def test_100_times_too_large_is_always_found(changes: list[float], data: st.DataObject) -> None:
    """Whoever it is, and whatever the others have, within a factor of 10."""
    sites = {str(number): change for number, change in enumerate(changes)}
    bad = data.draw(st.sampled_from(sorted(sites)))
    sites[bad] = 1000.0 * 10
    assert list(too_large(sites, 20.0, None)) == [bad]


def test_a_sample_of_mutated_messages() -> None:
    """`python -m benchmarks.fuzz_messages` tries thousands, and looks at memory."""
    tally, _ = fuzz_messages(500, seed=1)
    assert set(tally.outcomes) == {"refused", "accepted"}, tally.signatures
    assert tally.outcomes["refused"] > tally.outcomes["accepted"]
