"""What a site is asked for: to take up a job, and to train in a round; `results` has the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
from fedclip.records import State, TrainRequest

if TYPE_CHECKING:
    import torch

HELLO, TRAIN, RESULT = "hello", "train", "result"
_SETS = ("state", "frames", "shift", "offsets", "anchor")


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
    request: TrainRequest, site: str, ticket: Ticket, down: Format, up: Format
) -> tuple[bytes, Exchange]:
    """A training request to one site as bytes; the exchange has what the site will start from."""
    exchange = Exchange.of(request, site)
    whole = {
        "state": exchange.start,
        "frames": request.frames,
        "shift": request.shift,
        "offsets": request.offsets.get(site, {}),
        "anchor": {} if request.anchor is request.state else request.anchor or {},
    }
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
        "purpose": request.purpose,
        "progress": request.progress,
        "round_share": request.round_share,
        "rank": request.ranks.get(site),
        "trained": _numbers(names, request.trained),
        "sent": _numbers(names, request.sent),
        "start_loss": request.start_loss,
        "proximal_mu": request.proximal_mu,
        "anchored": request.anchor is request.state,
    }
    return Envelope(header, arrays).pack(), exchange


def read_train(envelope: Envelope, site: str) -> tuple[TrainRequest, Exchange, Format]:
    """A request as the site has it, its own part, and the format of the answer."""
    header = envelope.header
    try:
        down, up = header["down"], header["up"]
        layouts = {
            name: layout_from_json(header["layouts"][name])
            for name in _SETS
            if name in header["layouts"]
        }
        names = [field.name for field in layouts["state"]]
        sets = {
            name: decode(envelope.tensors, layout, down if name == "state" else "fp32", name)
            for name, layout in layouts.items()
        }
        rank = header["rank"]
        state = sets["state"]
        anchor = sets.get("anchor")
        cut = {f.name: f.rank for f in layouts["state"] if f.rank is not None}
        request = TrainRequest(
            server_round=int(header["round"]),
            client_ids=(site,),
            state=state,
            progress=float(header["progress"]),
            round_share=float(header["round_share"]),
            ranks={} if rank is None else {site: int(rank)},
            trained=_named(names, header["trained"]),
            sent=_named(names, header["sent"]),
            offsets={site: sets["offsets"]} if "offsets" in sets else {},
            anchor=state if header["anchored"] else anchor,
            proximal_mu=header["proximal_mu"],
            shift=sets.get("shift", {}),
            frames=sets.get("frames", {}),
            start_loss=bool(header["start_loss"]),
            cut=cut,
            purpose=str(header["purpose"]),
        )
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise BadMessage(f"the request cannot be read: {error!r}") from None
    exchange = Exchange.of(request, site)
    return request, exchange, up


def _numbers(names: list[str], chosen: Iterable[str] | None) -> list[int] | None:
    return None if chosen is None else [names.index(name) for name in sorted(chosen)]


def _named(names: list[str], numbers: list[int] | None) -> frozenset[str] | None:
    return None if numbers is None else frozenset(names[number] for number in numbers)
