"""What a site answers, and whether the coordinator may take it.

Whatever does not match what was asked is a `Refused`, whose message names the site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from fedclip.config.names import is_site_name
from fedclip.deploy.messages.codec import GROUPS, Format, decode, digest, encode, rank_map
from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.deploy.messages.heads import LOG, Head
from fedclip.deploy.messages.requests import Exchange, Ticket
from fedclip.errors import shortened
from fedclip.federated.update_checks import BOUNDS, Reason, check, number_fault
from fedclip.records import ClientReport, ClientUpdate, State, TrainRequest

READY, UPDATE, TESTED, REFUSAL = "ready", "update", "tested", "refusal"
MASK_KEYS, MASK_SHARES, MASKED = "mask_keys", "mask_shares", "masked"
MASK_SIGNATURE, MASK_OPENED, WORDS = "mask_signature", "mask_opened", "masked/words"
_COMMON = frozenset({"version", "kind", "site", "run", "job", "round", "nonce", "base", LOG})
NUMBERS = ("num_examples", "loss", "steps", "seconds", "rate_sum", "start_loss")
KEYS = {
    READY: _COMMON | {"num_examples", "software"},
    UPDATE: _COMMON | {"layout", "ranks", "form", "epsilon", *NUMBERS},
    TESTED: _COMMON | {"tests", "correct"},
    REFUSAL: _COMMON | {"code", "reason"},
    MASK_KEYS: _COMMON | {"keys"},
    MASK_SHARES: _COMMON | {"shares"},
    MASKED: _COMMON | {"num_examples", "steps", "seconds", "epsilon", "keys"},
    MASK_SIGNATURE: _COMMON | {"signature"},
    MASK_OPENED: _COMMON | {"opened", "shares"},
}
"""All that the header of a site's message may hold, by kind."""


class Refused(BadMessage):
    """A rejected reply; `code` comes from the site where it refused the request.

    `kind` is one word for the fault, and `figure` the number that it is about.
    """

    def __init__(
        self, text: str, code: str = "", *, kind: str = "message", figure: float | None = None
    ) -> None:
        super().__init__(text)
        self.code, self.kind, self.figure = code, kind, figure


@contextmanager
def believed(site: str) -> Iterator[None]:
    """Inside, whatever one site's answer raises is a `Refused` that names the site."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {shortened(error, 100)}"
        raise Refused(f"{site}: its answer cannot be taken: {why}") from error


@dataclass(frozen=True)
class Update(ClientUpdate):
    """A site's update; `change` is the norm of the difference to what it started from."""

    change: float


def ready(ticket: Ticket, site: str, num_examples: int, software: Mapping[str, str]) -> bytes:
    """A site's answer to `hello`."""
    facts = {"num_examples": num_examples, "software": dict(software)}
    return Envelope({"kind": READY, "site": site, **ticket.header(), **facts}).pack()


def refusal(ticket: Ticket | None, site: str, code: str, reason: str) -> bytes:
    """A site's answer where it does not do what it was asked for."""
    asked = {} if ticket is None else ticket.header()
    return Envelope({"kind": REFUSAL, "site": site, **asked, "code": code, "reason": reason}).pack()


def update(
    ticket: Ticket,
    report: ClientReport,
    tensors: State,
    exchange: Exchange,
    form: Format,
    residual: State | None = None,
) -> tuple[bytes, dict[str, torch.Tensor]]:
    """A site's answer to a training request, and what the format lost, for the next round.

    fp32 sends the new values. fp16 and int8 send the difference to the start plus `residual`, what
    they lost before (error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847).
    """
    layout, lost = exchange.answer_layout, dict[str, torch.Tensor]()
    if form == "fp32":
        arrays, _ = encode(tensors, layout, form, UPDATE)
    else:
        known = residual or {}
        change = {f.name: tensors[f.name].float() - exchange.start[f.name] for f in layout}
        change = {n: t + known[n] if _fits(known.get(n), t) else t for n, t in change.items()}
        arrays, read = encode(change, layout, form, UPDATE)
        lost = {n: change[n] - read[n] for n in change}
    header = {
        "kind": UPDATE,
        "site": report.client_id,
        **ticket.header(),
        "layout": digest(layout),
        "ranks": rank_map(layout),
        "form": form,
        "num_examples": report.num_examples,
        "loss": report.loss,
        "steps": report.steps,
        "seconds": report.seconds,
        "rate_sum": report.rate_sum,
        "start_loss": report.start_loss,
    }
    if report.epsilon is not None:
        header |= {"epsilon": report.epsilon}
    return Envelope(header, arrays).pack(), lost


def read_ready(data: bytes, ticket: Ticket, site: str, largest: int) -> tuple[str, int | Reason]:
    """A site's name and number of examples, or why that cannot be.

    `site` is the name that its key has, if any.
    """
    envelope = _opened(data, largest, site or "a site without a key")
    name = str(envelope.header.get("site"))
    if site and name != site:
        raise Refused(f"{site} calls itself {shortened(name)}; its key is registered as {site}")
    if not is_site_name(name):
        raise Refused(f"a site calls itself {shortened(name)}, which no site's name may be")
    _check_kind(envelope, READY, name)
    _check_ticket(envelope.header, ticket, name)
    count: Any = envelope.header.get("num_examples")
    return name, number_fault("num_examples", count) or count


def read_update(
    data: bytes,
    ticket: Ticket,
    site: str,
    exchange: Exchange,
    form: Format,
    *,
    request: TrainRequest,
    largest: int,
    private: bool = False,
) -> Update:
    """A site's update; raises Refused, naming the site, for whatever does not match the request.

    `request` is what the round's sites were asked, `exchange` this one's part of it. Of a `private`
    run it tells the epsilon that it has spent, and no loss.
    """
    envelope = check_answer(data, UPDATE, ticket, site, largest)
    header, layout = envelope.header, exchange.answer_layout
    if header.get("ranks") != rank_map(layout):
        raise Refused(
            f"{site} sends factors of other ranks: {_ranks(header.get('ranks'))}, asked for were "
            f"{_ranks(rank_map(layout))}",
            kind="ranks",
        )
    if header.get("layout") != digest(layout):
        raise Refused(
            f"{site} sends tensors of other names or shapes than it was asked for", kind="names"
        )
    if header.get("form") != form:
        raise Refused(
            f"{site} sends {shortened(header.get('form'))} where {form} was asked for", kind="dtype"
        )
    try:
        tensors = decode(envelope.tensors, layout, form, UPDATE)
    except BadMessage as error:
        raise Refused(f"{site}: {error}") from None
    if form != "fp32":
        tensors = {n: exchange.start[n].float() + t for n, t in tensors.items()}
    report = ClientReport(site, **read_numbers(header, site, NUMBERS, private=private))
    update = Update(report, tensors, _distance(tensors, exchange.start))
    if (reason := check(update, request)) is not None:
        raise _refused(site, reason)
    return update


def check_answer(data: bytes, kind: str, ticket: Ticket, site: str, largest: int) -> Envelope:
    """A site's answer, which is of this kind and to this ticket; raises Refused."""
    envelope = _opened(data, largest, site)
    if envelope.header.get("site") != site:
        raise Refused(f"{site} answers in the name of {shortened(envelope.header.get('site'))}")
    _check_kind(envelope, kind, site)
    _check_ticket(envelope.header, ticket, site)
    return envelope


def _opened(data: bytes, largest: int, site: str) -> Envelope:
    try:
        envelope = Envelope.unpack(data, largest)
        Head.of(envelope.header)  # can be read
        return envelope
    except BadMessage as error:
        raise Refused(f"{site}: {error}") from None


def _check_kind(envelope: Envelope, kind: str, site: str) -> None:
    header = envelope.header
    if strange := sorted(header.keys() - KEYS.get(envelope.kind, KEYS[kind])):
        raise Refused(f"{site} sends {shortened(strange[0])}, which no answer holds", kind="keys")
    groups = [f"{UPDATE}/{group}" for group in GROUPS] if envelope.kind == UPDATE else []
    known = {*groups, *(f"{group}.scale" for group in groups)}
    known |= {WORDS} if envelope.kind == MASKED else set()
    if strange := sorted(envelope.tensors.keys() - known):
        raise Refused(f"{site} sends tensors that nobody asked for: {shortened(strange[0])}")
    if envelope.kind == REFUSAL:
        code, reason = header.get("code"), header.get("reason")
        raise Refused(f"{site} refuses: {reason}", str(code), kind="refuses")
    if envelope.kind != kind:
        raise Refused(f"{site} answers with {shortened(envelope.kind)} where {kind!r} was expected")


def _check_ticket(header: Mapping[str, Any], ticket: Ticket, site: str) -> None:
    if header.get("base") != ticket.base:
        raise Refused(
            f"{site} has another base model ({shortened(header.get('base'), 20)}) than the "
            f"coordinator ({ticket.base[:12]})",
            kind="base",
        )
    if header.get("run") != ticket.run or header.get("job") != ticket.job:
        raise Refused(f"{site} answers to another run", kind="run")
    if header.get("round") != ticket.server_round or isinstance(header.get("round"), bool):
        raise Refused(
            f"{site} sends a stale answer: it is of round {shortened(header.get('round'), 20)}, "
            f"this is round {ticket.server_round}",
            kind="round",
        )
    if header.get("nonce") != ticket.nonce:
        raise Refused(
            f"{site} sends an answer to another request: an old one, replayed", kind="nonce"
        )


def read_numbers(
    header: Mapping[str, Any], site: str, keys: Sequence[str], *, private: bool = False
) -> dict[str, Any]:
    """Numbers of a site's training, within their bounds; raises Refused."""
    if private != ("epsilon" in header):
        told = "no epsilon, in a private run" if private else "an epsilon, in a run without"
        raise Refused(f"{site} sends {told}", kind="keys")
    maybe = ("loss", *_MAYBE) if private else _MAYBE
    found = {key: _number(header, key, site, null=key in maybe) for key in keys}
    return found | ({"epsilon": _number(header, "epsilon", site)} if private else {})


_MAYBE = ("rate_sum", "start_loss")
"""What a site need not know, unless the request needs it."""


def _number(header: Mapping[str, Any], key: str, site: str, *, null: bool = False) -> Any:
    value: Any = header.get(key)
    if null and value is None:
        return math.nan
    if (fault := number_fault(key, value)) is not None:
        raise _refused(site, fault)
    return value if BOUNDS[key].whole else float(value)


def _refused(site: str, reason: Reason) -> Refused:
    return Refused(f"{site} {reason.words}", kind=reason.kind, figure=reason.figure)


def _distance(tensors: State, start: State) -> float:
    squares = [(t.double() - start[n].double()).square().sum() for n, t in tensors.items()]
    return math.sqrt(sum(float(square) for square in squares))


def _fits(known: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return known is not None and known.shape == tensor.shape


def _ranks(value: Any) -> str:
    if not isinstance(value, Mapping) or not value:
        return "none"
    told = [f"rank {rank} in {count} layers" for rank, count in islice(value.items(), 20)]
    return shortened(", ".join(told), 200).strip("'")
