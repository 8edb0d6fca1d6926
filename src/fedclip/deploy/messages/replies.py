"""What a site answers, and whether the coordinator may take it.

Whatever does not match what was asked is a `Refused`, whose message names the site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedclip.config.names import is_site_name
from fedclip.deploy.messages.codec import Format, decode, digest, encode, rank_map
from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.deploy.messages.requests import Exchange, Ticket
from fedclip.errors import shortened
from fedclip.federated.update_checks import check, outliers
from fedclip.records import ClientReport, ClientUpdate, State, TrainRequest

READY, UPDATE, TESTED, REFUSAL = "ready", "update", "tested", "refusal"


class Refused(BadMessage):
    """A site's answer that is not taken; `code` is the site's own where it refused the request."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


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
    return Envelope(header, arrays).pack(), lost


def read_ready(data: bytes, ticket: Ticket, site: str, largest: int) -> tuple[str, int]:
    """A site's name and number of examples; `site` is the name that its key has, if any."""
    envelope = _opened(data, largest, site or "a site without a key")
    name = str(envelope.header.get("site"))
    if site and name != site:
        raise Refused(f"{site} calls itself {name}; its key is registered as {site}")
    if not is_site_name(name):
        raise Refused(f"a site calls itself {shortened(name)}, which no site's name may be")
    _check_kind(envelope, READY, name)
    _check_ticket(envelope.header, ticket, name)
    return name, count_of(envelope.header, "num_examples", name)


def read_update(
    data: bytes,
    ticket: Ticket,
    site: str,
    exchange: Exchange,
    form: Format,
    *,
    request: TrainRequest,
    num_examples: int,
    largest: int,
) -> Update:
    """A site's update; raises Refused, naming the site, for whatever does not match the request.

    `request` is what the round's sites were asked, `exchange` this one's part of it.
    """
    envelope = check_answer(data, UPDATE, ticket, site, largest)
    header, layout = envelope.header, exchange.answer_layout
    if header.get("ranks") != rank_map(layout):
        raise Refused(
            f"{site} sends factors of other ranks: {_ranks(header.get('ranks'))}, asked for were "
            f"{_ranks(rank_map(layout))}"
        )
    if header.get("layout") != digest(layout):
        raise Refused(f"{site} sends tensors of other names or shapes than it was asked for")
    if header.get("form") != form:
        raise Refused(f"{site} sends {header.get('form')!r} where {form} was asked for")
    try:
        tensors = decode(envelope.tensors, layout, form, UPDATE)
    except BadMessage as error:
        raise Refused(f"{site}: {error}") from None
    if form != "fp32":
        tensors = {n: exchange.start[n].float() + t for n, t in tensors.items()}
    if count_of(header, "num_examples", site) != num_examples:
        raise Refused(
            f"{site} now has {header['num_examples']} examples, and said {num_examples} when it "
            "came; its data have changed"
        )
    report = ClientReport(
        site,
        num_examples,
        _number(header, "loss", site),
        count_of(header, "steps", site),
        _number(header, "seconds", site),
        _maybe(header, "rate_sum", site),
        _maybe(header, "start_loss", site),
    )
    update = Update(report, tensors, _distance(tensors, exchange.start))
    if (reason := check(update, request)) is not None:
        raise Refused(f"{site} {reason.words}")
    return update


def check_answer(data: bytes, kind: str, ticket: Ticket, site: str, largest: int) -> Envelope:
    """A site's answer, which is of this kind and to this ticket; raises Refused."""
    envelope = _opened(data, largest, site)
    if envelope.header.get("site") != site:
        raise Refused(f"{site} answers in the name of {envelope.header.get('site')!r}")
    _check_kind(envelope, kind, site)
    _check_ticket(envelope.header, ticket, site)
    return envelope


def too_large(changes: Mapping[str, float], times: float, usual: float | None) -> dict[str, str]:
    """Why updates of such norms are not taken, by site: more than `times` what others have.

    Each is compared with the median of the others, a single one with `usual`, if there is one.
    """
    return {
        site: f"{site} sends an update {found.times:.0f} times as large as the others' "
        f"(norm {found.norm:.3g}); {times:g} times is the limit (deploy.largest_update)"
        for site, found in outliers(changes, times, usual).items()
    }


def _opened(data: bytes, largest: int, site: str) -> Envelope:
    try:
        return Envelope.unpack(data, largest)
    except BadMessage as error:
        raise Refused(f"{site}: {error}") from None


def _check_kind(envelope: Envelope, kind: str, site: str) -> None:
    if envelope.kind == REFUSAL:
        code, reason = envelope.header.get("code"), envelope.header.get("reason")
        raise Refused(f"{site} refuses: {reason}", str(code))
    if envelope.kind != kind:
        raise Refused(f"{site} answers with {envelope.kind!r} where {kind!r} was expected")


def _check_ticket(header: Mapping[str, Any], ticket: Ticket, site: str) -> None:
    if header.get("base") != ticket.base:
        raise Refused(
            f"{site} has another base model ({str(header.get('base'))[:12]}) than the coordinator "
            f"({ticket.base[:12]})"
        )
    if header.get("run") != ticket.run or header.get("job") != ticket.job:
        raise Refused(f"{site} answers to another run")
    if header.get("round") != ticket.server_round:
        raise Refused(
            f"{site} sends a stale answer: it is of round {header.get('round')}, this is round "
            f"{ticket.server_round}"
        )
    if header.get("nonce") != ticket.nonce:
        raise Refused(f"{site} sends an answer to another request: an old one, replayed")


def count_of(header: Mapping[str, Any], key: str, site: str, least: int = 1) -> int:
    """A whole number of a header; raises Refused."""
    value = header.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**40:
        raise Refused(f"{site}: {key} must be a whole number from {least} on, got {value!r}")
    return value


def _number(header: Mapping[str, Any], key: str, site: str) -> float:
    value = header.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise Refused(f"{site}: {key} must be a number, got {value!r}")
    return float(value)


def _maybe(header: Mapping[str, Any], key: str, site: str) -> float:
    return math.nan if header.get(key) is None else _number(header, key, site)


def _distance(tensors: State, start: State) -> float:
    squares = [(t.double() - start[n].double()).square().sum() for n, t in tensors.items()]
    return math.sqrt(sum(float(square) for square in squares))


def _fits(known: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return known is not None and known.shape == tensor.shape


def _ranks(value: Any) -> str:
    if not isinstance(value, Mapping) or not value:
        return "none"
    return ", ".join(f"rank {rank} in {count} layers" for rank, count in value.items())
