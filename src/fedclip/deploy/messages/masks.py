"""Messages of masked sums: keys, sealed shares, masked vectors, survivors, and what unmasks them.

Keys and shares are base64 in headers; a vector is a tensor. What the values mean is checked by
`federated.secure`, here only what they are.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fedclip.config.names import is_site_name
from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.deploy.messages.heads import LOG
from fedclip.deploy.messages.replies import MASKED, WORDS, Refused, check_answer, read_numbers
from fedclip.deploy.messages.requests import Ticket
from fedclip.errors import shortened
from fedclip.federated.secure.session import Advert, Session
from fedclip.federated.update_checks import report_fault
from fedclip.records import ClientReport, TrainRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MASKS = "masks"
"""The kind of what a site is asked for besides training, and the key of a training request."""
MOST_SITES = 10_000
_LONGEST = 1_000
_OF_ONE_SITE = ("site", "nonce", LOG)
"""What of a training request differs from site to site, with the sealed shares."""


def ask(ticket: Ticket, site: str, step: str, session: Session, **facts: Any) -> bytes:
    """One step of a session, to one site."""
    header = {"kind": MASKS, "site": site, **ticket.header(), "step": step}
    return Envelope(header | {"session": session_json(session)} | facts).pack()


def answer(kind: str, ticket: Ticket, site: str, **facts: Any) -> bytes:
    """A site's answer to one."""
    return Envelope({"kind": kind, "site": site, **ticket.header(), **facts}).pack()


def session_json(session: Session) -> dict[str, Any]:
    """A session as part of a header; its run is the message's."""
    return {
        "round": session.server_round,
        "nonce": session.nonce,
        "cohort": list(session.cohort),
    }


def read_session(value: Any, run: str) -> Session:
    """A session of a run; raises BadMessage."""
    if not isinstance(value, Mapping) or value.keys() != {"round", "nonce", "cohort"}:
        raise BadMessage("the session of a masked sum cannot be read")
    number, nonce = value["round"], value["nonce"]
    if type(number) is not int or not 1 <= number <= 10**9:
        raise BadMessage(f"the session of a masked sum is of round {shortened(number)}")
    if not isinstance(nonce, str) or not 16 <= len(nonce) <= 64:
        raise BadMessage("the session of a masked sum has no nonce that can be")
    return Session(run, number, nonce, read_names(value["cohort"]))


def read_names(value: Any) -> tuple[str, ...]:
    """Names of sites; raises BadMessage."""
    named = isinstance(value, list) and len(value) <= MOST_SITES
    if not named or not all(isinstance(name, str) and is_site_name(name) for name in value):
        raise BadMessage("a list of sites cannot be read")
    return tuple(value)


def adverts_json(adverts: Sequence[Advert]) -> list[list[str]]:
    """Clients' keys as part of a header."""
    return [[a.site, *map(_text, (a.mask_key, a.share_key, a.signature))] for a in adverts]


def read_adverts(value: Any) -> list[Advert]:
    """Clients' keys; raises BadMessage."""
    fits = isinstance(value, list) and len(value) <= MOST_SITES
    if not fits or not all(isinstance(one, list) and len(one) == 4 for one in value):
        raise BadMessage("the keys of a masked sum cannot be read")
    sites = read_names([one[0] for one in value])
    return [Advert(s, *map(_bytes, one[1:])) for s, one in zip(sites, value, strict=True)]


def bytes_json(values: Mapping[str, bytes]) -> dict[str, str]:
    """Bytes by site, such as shares or signatures, as part of a header."""
    return {site: _text(data) for site, data in values.items()}


def read_bytes(value: Any) -> dict[str, bytes]:
    """Bytes by site; raises BadMessage."""
    if not isinstance(value, Mapping):
        raise BadMessage("the shares of a masked sum cannot be read")
    sites = read_names(list(value))
    return {site: _bytes(value[site]) for site in sites}


def signature_json(signature: bytes) -> str:
    """A signature as part of a header."""
    return _text(signature)


def read_signature(value: Any) -> bytes:
    """A signature; raises BadMessage."""
    return _bytes(value)


def binding(envelope: Envelope) -> bytes:
    """Digest of all that a training request asks of every site alike: model, rates, and terms."""
    header = {key: value for key, value in envelope.header.items() if key not in _OF_ONE_SITE}
    header[MASKS] = {key: value for key, value in header[MASKS].items() if key != "sealed"}
    found = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(envelope.tensors):
        tensor = envelope.tensors[name].contiguous()
        found.update(f"{len(name)}:{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()


def masked(
    ticket: Ticket, report: ClientReport, words: NDArray[np.uint32], following: Advert | None
) -> bytes:
    """A site's answer to a training request: its masked vector, and its keys of the next round.

    Of its training it tells no more than the steps and the seconds: the loss is in the vector, or
    in a private run nowhere, and the epsilon that was spent stands here.
    """
    header = {
        "kind": MASKED,
        "site": report.client_id,
        **ticket.header(),
        "num_examples": report.num_examples,
        "steps": report.steps,
        "seconds": report.seconds,
        "keys": None if following is None else adverts_json([following]),
    }
    if report.epsilon is not None:
        header |= {"epsilon": report.epsilon}
    return Envelope(header, {WORDS: torch.from_numpy(words.view("int32"))}).pack()


def read_masked(
    data: bytes,
    ticket: Ticket,
    site: str,
    request: TrainRequest,
    largest: int,
    private: bool = False,
) -> tuple[ClientReport, NDArray[np.uint32], Advert | None]:
    """What `masked` has written; raises Refused, naming the site."""
    envelope = check_answer(data, MASKED, ticket, site, largest)
    keys = ("num_examples", "steps", "seconds")
    numbers = read_numbers(envelope.header, site, keys, private=private)
    report = ClientReport(site, loss=0.0, **numbers)
    if (fault := report_fault(report, request)) is not None:
        raise Refused(f"{site} {fault.words}", kind=fault.kind, figure=fault.figure)
    words = envelope.tensors.get(WORDS)
    if words is None or words.dtype != torch.int32 or words.ndim != 1:
        raise Refused(f"{site} sends no vector of 32-bit words", kind="dtype")
    told = envelope.header.get("keys")
    found = [None] if told is None else read_adverts(told)
    if len(found) != 1:
        raise Refused(f"{site} sends keys of several sites")
    return replace(report, loss=float("nan")), words.numpy().view("uint32"), found[0]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(value: Any) -> bytes:
    try:
        if isinstance(value, str) and len(value) <= _LONGEST:
            return base64.b64decode(value, validate=True)
    except ValueError:
        pass
    raise BadMessage(f"a key or share of a masked sum cannot be read: {shortened(value)}")
