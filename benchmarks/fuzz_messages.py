"""Mutated messages by the thousand: is each refused in one clear line, in constant memory?

`python -m benchmarks.fuzz_messages --cases 20000` changes honest messages of sites and of the
coordinator (bytes, header, tensors) and reads them as the other end does. Counted are `escaped`
(anything raised but fedclip's own errors) and `taken_bad` (accepted, though a number in it is not
finite or out of bounds). `--only messages/17` shows one case and its traceback.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save

from benchmarks.common import write_result
from benchmarks.fuzz import Kind, Tally, attempt
from benchmarks.fuzz_configs import Damaged
from fedclip.deploy.messages import replies, requests, results
from fedclip.deploy.messages.envelope import BadMessage, Envelope, pack_header
from fedclip.deploy.messages.heads import Head
from fedclip.deploy.messages.requests import Exchange, Ticket
from fedclip.errors import UsageError
from fedclip.federated.update_checks import BOUNDS
from fedclip.records import ClientReport, RunState, TrainRequest

A, B = "base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"
TICKET = Ticket("run", "job", 3, "nonce", "base", Head(7, "0" * 64))
REPORT = ClientReport("north", 10, 0.5, 4, 1.5, 0.1, 0.7)
LARGEST = 100_000
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 5e-324, 1e-300, 1e300, 2**31, 2**53, 2**63, 2**64),
    *(10**400, -(10**400), math.nan, math.inf, -math.inf, "", "1", "nan", "north", "south", [], {}),
    *([1], [[]], {"a": 1}, "x" * 3000, "\x1b[2J\n", "\u202e", "\ud800", "é" * 200, [1] * 500),
)
FLOATS = (math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 0.0)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)
GROWTH_MB = 20.0
"""Memory that the process may grow by, from the first tenth of the cases to the last."""


def state() -> dict[str, torch.Tensor]:
    """A small adapter with a head."""
    draw = torch.Generator().manual_seed(1)
    shapes = {A: (4, 6), B: (5, 4), "head.weight": (3, 2), "head.bias": (3,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@cache
def honest() -> dict[str, bytes]:
    """A message of each kind, as it should be."""
    request = asked()
    moved = {name: tensor + 0.01 for name, tensor in request.state.items()}
    exchange = Exchange.of(request, "north")
    answers = {
        f"update {form}": replies.update(TICKET, REPORT, moved, exchange, form)[0]  # type: ignore[arg-type]
        for form in ("fp32", "fp16", "int8")
    }
    return answers | {
        "ready": replies.ready(TICKET, "north", 10, {"fedclip": "1"}),
        "tested": results.tested(TICKET, "north", results.Tested(5, 4)),
        "refusal": replies.refusal(TICKET, "north", "refused", "too hot"),
        "train": requests.train(request, "north", TICKET, "fp32", "fp32")[0],
        "result": results.result(RunState(request.state), "north", TICKET),
    }


@cache
def asked() -> TrainRequest:
    """What a round asks, of which all numbers are needed."""
    tensors = state()
    offsets = {"north": {n: torch.zeros_like(t) for n, t in tensors.items()}}
    return TrainRequest(
        3, ("north",), tensors, examples={"north": 10}, offsets=offsets, start_loss=True
    )


def make(draw: random.Random, place: Path) -> tuple[str, bytes]:
    """A message of some kind, changed in one to three ways."""
    name = draw.choice(sorted(honest()))
    data = honest()[name]
    for _ in range(draw.randint(1, 3)):
        change = draw.choice((_bytes, _header, _header, _tensors))
        try:
            data = change(draw, data)
        except Exception:  # no longer a message that this change could read
            data = _bytes(draw, data)
    return name, data


def read(case: tuple[str, bytes]) -> None:
    """Takes a message as the other end does; Damaged if it takes what must not be taken."""
    try:
        _read(*case)
    except BadMessage as error:
        text = str(error)
        if len(text) > 400 or not text.isprintable():
            raise Damaged(f"a refusal that is no short line: {text[:100]!r}") from None
        raise UsageError(text) from None


def _read(name: str, data: bytes) -> None:
    if name.startswith("update"):
        form: Any = name.removeprefix("update ")
        exchange = Exchange.of(asked(), "north")
        found = replies.read_update(
            data, TICKET, "north", exchange, form, request=asked(), largest=LARGEST
        )
        numbers = [torch.tensor(getattr(found.report, key)) for key in replies.NUMBERS]
        if not all(bool(t.isfinite().all()) for t in [*found.tensors.values(), *numbers]):
            raise Damaged("an update with numbers that are not finite")
        told = {key: getattr(found.report, key, None) for key in BOUNDS}
        if any(
            not BOUNDS[k].least <= v <= BOUNDS[k].most for k, v in told.items() if v is not None
        ):
            raise Damaged(f"a report with numbers out of bounds: {found.report}")
    elif name == "ready":
        ready = replies.read_ready(data, TICKET, "north", LARGEST)
        if ready[0] != "north":
            raise Damaged(f"another name: {ready[0]!r}")
    elif name == "tested":
        results.read_tested(data, TICKET, "north", LARGEST)
    elif name == "refusal":
        replies.check_answer(data, replies.UPDATE, TICKET, "north", LARGEST)
    else:  # what the coordinator sends, at a site
        envelope = Envelope.unpack(data, LARGEST)
        Ticket.of(envelope.header)
        if name == "train":
            requests.read_train(envelope, "north")
        else:
            results.read_result(envelope)


KIND = Kind(make, read)


def _bytes(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data or b"x")
    place, length = draw.randrange(len(changed)), draw.randint(1, 40)
    what = draw.randrange(5)
    if what == 0:
        changed[place] ^= 1 << draw.randrange(8)
    elif what == 1:
        del changed[place:]
    elif what == 2:
        del changed[place : place + length]
    elif what == 3:
        changed[place:place] = changed[place : place + length] or b"\0" * length
    else:
        changed[place : place + length] = draw.randbytes(length)
    return bytes(changed)


def _header(draw: random.Random, data: bytes) -> bytes:
    envelope = Envelope.unpack(data)
    header = json.loads(json.dumps(envelope.header))
    inner = header
    key = draw.choice(sorted(inner))
    while isinstance(inner[key], dict) and inner[key] and draw.random() < 0.7:
        inner = inner[key]
        key = draw.choice(sorted(inner))
    what = draw.randrange(8)
    if what == 0:
        del inner[key]
    elif what == 1:
        inner[draw.choice(("x", "site", "round", "y" * 500, "\x1b"))] = draw.choice(NASTY)
    else:
        inner[key] = draw.choice(NASTY)
    return packed(header, envelope.tensors)


def _tensors(draw: random.Random, data: bytes) -> bytes:
    envelope = Envelope.unpack(data)
    tensors = {name: tensor.clone() for name, tensor in envelope.tensors.items()}
    if not tensors:
        return packed(envelope.header, {draw.choice(("a", "update/A", "state/B")): torch.ones(3)})
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    what = draw.randrange(7)
    if what == 0 and tensor.numel():
        tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice(FLOATS)
    elif what == 1:
        tensor = tensor.to(draw.choice(DTYPES))
    elif what == 2:
        tensor = tensor[:-1].clone() if tensor.dim() else tensor[None]
    elif what == 3:
        tensor = torch.cat([tensor.view(-1)] * draw.randint(2, 9))
    elif what == 4:
        tensor = tensor.reshape(1, -1, *[1] * draw.randrange(4))
    elif what == 5:
        name = draw.choice((f"{name}x", "update/other", "shared/x", "member/a/b", "", "private"))
    if what < 6:
        tensors[name] = tensor.contiguous()
    return packed(envelope.header, tensors)


def packed(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A message with any header, also with numbers that JSON should not hold."""
    text = json.dumps(header)
    return bytes(save(dict(tensors), {"header": text})) if tensors else pack_header(text)


def fuzz_messages(cases: int, seed: int = 0) -> tuple[Tally, float]:
    """Tries so many cases; the memory in MB by which the process grew after the first tenth."""
    tally, process = Tally(), psutil.Process()
    with tempfile.TemporaryDirectory(prefix="fedclip-fuzz-") as place:
        for number in range(cases):
            if number == cases // 10:
                before = process.memory_info().rss
            tally.add(f"messages/{number}", *attempt(KIND, f"{seed}/messages/{number}", place))
    return tally, (process.memory_info().rss - before) / 1e6


def main(arguments: list[str] | None = None) -> int:
    """Fuzzes, prints the counts, and writes them; 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="messages/NUMBER", help="show one case")
    parser.add_argument("--result", type=Path, metavar="DIR", help="write fuzz_messages.json there")
    options = parser.parse_args(arguments)
    if options.only:
        case = make(random.Random(f"{options.seed}/{options.only}"), Path())
        print(case)
        read(case)
        return 0
    tally, grown = fuzz_messages(options.cases, options.seed)
    print(dict(tally.outcomes), f"grown by {grown:.1f} MB")
    for signature, names in tally.signatures.items():
        print(f"  {signature} ({', '.join(names)})")
    figures = {
        "messages_cases": tally.outcomes.total(),
        "messages_escaped": tally.outcomes["unforeseen"] + tally.outcomes["hang"],
        "messages_taken_bad": tally.outcomes["taken_damaged"],
        "messages_grown_mb": grown,
    }
    if options.result:
        details = {"seed": options.seed, "outcomes": dict(tally.outcomes)}
        write_result("fuzz_messages", figures, details, options.result)
    bad = figures["messages_escaped"] or figures["messages_taken_bad"] or grown > GROWTH_MB
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
