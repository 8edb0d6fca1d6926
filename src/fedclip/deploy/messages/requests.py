"""What a site is asked for: to take up a job, and to train in a round; `results` has the end."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from fedclip.deploy.messages.codec import (
    Format,
    Layout,
    decode,
    encode,
    layout_from_json,
    layout_of,
    layout_to_json,
)
from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.deploy.messages.heads import Head
from fedclip.records import TENSORS_BY_CLIENT, State, TrainRequest

if TYPE_CHECKING:
    import torch

HELLO, TRAIN, RESULT = "hello", "train", "result"
_FIELDS = {f.name: f for f in fields(TrainRequest) if "wire" in f.metadata}
_PLAIN = {n: f.type for n, f in _FIELDS.items() if f.metadata["wire"] == "plain"}
_TENSORS = [name for name in _FIELDS if name not in _PLAIN]
"""What of a request travels by its fields alone: values in the header, and sets of tensors."""


@dataclass(frozen=True)
class Ticket:
    """What makes a message one of a kind: a run, a job in it, a round, and a number used once.

    `log` is the head of its sender's log, which confirms the log to the other side.
    """

    run: str
    job: str
    server_round: int
    nonce: str
    base: str
    log: Head | None = None

    def header(self) -> dict[str, Any]:
        """The ticket as part of a header."""
        return ({} if self.log is None else self.log.header()) | {
            "run": self.run,
            "job": self.job,
            "round": self.server_round,
            "nonce": self.nonce,
            "base": self.base,
        }

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Ticket:
        """The ticket in a header; raises BadMessage."""
        try:
            return cls(
                str(header["run"]),
                str(header["job"]),
                int(header["round"]),
                str(header["nonce"]),
                str(header["base"]),
                Head.of(header),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise BadMessage("the message does not say which round it belongs to") from None


def job_digest(job: Mapping[str, Any]) -> str:
    """A short name of a job: what a site needs to know of the run."""
    text = json.dumps(job, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hello(ticket: Ticket, site: str, job: Mapping[str, Any], now: float) -> bytes:
    """The first message to a site: what the run is about."""
    return Envelope(
        {"kind": HELLO, "site": site, "time": now, **ticket.header(), "description": job}
    ).pack()


@dataclass(frozen=True)
class Exchange:
    """One site's part of a training request: what it starts from and what it sends back.

    `start` are the tensors as the site reads them; `kept` are names that it trains and keeps.
    """

    layout: Layout
    start: State
    answer_layout: Layout
    kept: frozenset[str]

    @classmethod
    def of(cls, request: TrainRequest, site: str) -> Exchange:
        """The part of `site`; nothing that it keeps for itself is sent to it."""
        trained = request.state.keys() if request.trained is None else request.trained
        sent = trained if request.sent is None else request.sent & set(trained)
        kept = frozenset(trained) - sent
        own = request.starts.get(site, {})
        start = {n: t if n in kept else own.get(n, t) for n, t in request.state.items()}
        layout = layout_of(start, request.ranks.get(site), request.cut)
        answered = tuple(field for field in layout if field.name in sent)
        return cls(layout, start, answered, kept)


def train(
    request: TrainRequest,
    site: str,
    ticket: Ticket,
    down: Format,
    up: Format,
    more: Mapping[str, Any] | None = None,
) -> tuple[bytes, Exchange]:
    """A training request to one site as bytes; the exchange has what the site will start from.

    The header has `more` beside the request, such as what a masked sum needs.
    """
    exchange = Exchange.of(request, site)
    anchored = request.anchor is request.state
    own = replace(request.of(site), anchor=None) if anchored else request.of(site)
    whole = {"state": exchange.start} | {name: _tensors(own, name) for name in _TENSORS}
    arrays: dict[str, torch.Tensor] = {}
    layouts: dict[str, Any] = {}
    for name, tensors in whole.items():
        if tensors:
            layout = exchange.layout if name == "state" else layout_of(tensors)
            layouts[name] = layout_to_json(layout)
            # What is no adapter is part of a sum on both ends, and not to be rounded.
            form = down if name == "state" else "fp32"
            encoded, read = encode(tensors, layout, form, name)
            arrays |= encoded
            if name == "state":
                exchange = Exchange(layout, read, exchange.answer_layout, exchange.kept)
    names = [field.name for field in exchange.layout]
    header = {
        "kind": TRAIN,
        "site": site,
        **ticket.header(),
        "down": down,
        "up": up,
        "layouts": layouts,
        **{name: getattr(request, name) for name in _PLAIN},
        "rank": request.ranks.get(site),
        "trained": _numbers(names, request.trained),
        "sent": _numbers(names, request.sent),
        "anchored": anchored,
        **(more or {}),
    }
    return Envelope(header, arrays).pack(), exchange


def read_train(envelope: Envelope, site: str) -> tuple[TrainRequest, Exchange, Format]:
    """A received request, the site's part of it, and the format of the reply."""
    header = envelope.header
    try:
        down, up = header["down"], header["up"]
        layouts = {
            name: layout_from_json(header["layouts"][name])
            for name in ("state", *_TENSORS)
            if name in header["layouts"]
        }
        names = [field.name for field in layouts["state"]]
        sets = {
            name: decode(envelope.tensors, layout, down if name == "state" else "fp32", name)
            for name, layout in layouts.items()
        }
        rank = header["rank"]
        state = sets["state"]
        cut = {f.name: f.rank for f in layouts["state"] if f.rank is not None}
        request = TrainRequest(
            server_round=int(header["round"]),
            client_ids=(site,),
            state=state,
            ranks={} if rank is None else {site: int(rank)},
            trained=_named(names, header["trained"]),
            sent=_named(names, header["sent"]),
            cut=cut,
            **{name: _plain(header, name) for name in _PLAIN},
            **{name: _read_tensors(sets[name], name, site) for name in _TENSORS if name in sets},
        )
        if header["anchored"]:
            request = replace(request, anchor=state)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise BadMessage(f"the request cannot be read: {error!r}") from None
    exchange = Exchange.of(request, site)
    return request, exchange, up


def _tensors(request: TrainRequest, name: str) -> State:
    """The tensors of a field of a request to one client; none where it has none."""
    value = getattr(request, name) or {}
    if _FIELDS[name].metadata == TENSORS_BY_CLIENT:
        value = value.get(request.client_ids[0], {})
    return value


def _read_tensors(tensors: State, name: str, site: str) -> Any:
    return {site: tensors} if _FIELDS[name].metadata == TENSORS_BY_CLIENT else tensors


def _plain(header: Mapping[str, Any], name: str) -> Any:
    """A value of the kind that its field has; raises TypeError."""
    value, kind = header[name], str(_PLAIN[name])
    if value is None and kind.endswith(" | None"):
        return None
    wanted = kind.removesuffix(" | None")
    if wanted == "float" and type(value) is int:
        value = float(value)  # JSON may have it so
    if type(value).__name__ != wanted:
        raise TypeError(f"{name} must be of kind {kind}")
    if wanted == "float" and not math.isfinite(value):
        raise ValueError(f"{name} must be finite")
    return value


def _numbers(names: list[str], chosen: Iterable[str] | None) -> list[int] | None:
    return None if chosen is None else [names.index(name) for name in sorted(chosen)]


def _named(names: list[str], numbers: list[int] | None) -> frozenset[str] | None:
    return None if numbers is None else frozenset(names[number] for number in numbers)
