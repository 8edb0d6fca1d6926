"""Masked sums: how exact they are whoever drops out, and what they cost at a hundred sites.

`python -m benchmarks.masks` writes `masks.json`. Errors are those of the mean change, relative to
its norm, for 3 to 100 sites of which as many as may be drop out at each of three phases, with one
more of whom there must be no sum. Times are of one process's processor, at ViT-B/32's size (rank 8
on q, k, v and out of both towers), with signatures by P-384 as sites make them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.common import write_result
from fedclip.deploy.keys import certificates
from fedclip.deploy.messages import masks, replies
from fedclip.deploy.messages.codec import layout_of
from fedclip.deploy.messages.requests import Exchange, Ticket
from fedclip.federated.secure.aggregator import Aggregator
from fedclip.federated.secure.participant import Participant
from fedclip.federated.secure.payload import Terms, mean_of, vector_of
from fedclip.federated.secure.session import Broken, Session, threshold
from fedclip.records import ClientReport

COUNTS = (3, 10, 30, 100)
PHASES = ("shares", "vectors", "unmasking")
SMALL = 20_000
VIT_B_32 = 12 * 4 * 8 * 2 * (768 + 512)
"""Numbers of the adapter: layers, modules, rank, A and B, widths of the two towers."""
SCALE = 0.01
"""Standard deviation of a site's changes: some ten steps of AdamW at 1e-3."""


class Clocks:
    """Processor seconds by who spends them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, who: str) -> Iterator[None]:
        """Count what is done inside to somebody."""
        start = time.process_time()
        yield
        self.seconds[who] = self.seconds.get(who, 0.0) + time.process_time() - start


class Lab:
    """Sites with keys and updates of their own."""

    def __init__(self, count: int, numbers: int) -> None:
        rng = np.random.default_rng(count)
        self.names = tuple(f"site-{number:03}" for number in range(count))
        self.examples = {name: int(rng.integers(30, 250)) for name in self.names}
        self.start = {"w": torch.from_numpy(rng.normal(0, 0.02, numbers)).float()}
        self.updates = {n: self.start["w"] + self._change(rng, numbers) for n in self.names}
        self.keys = {name: certificates.new_key() for name in self.names}
        self.public = {
            n: certificates.public_openssh(key.public_key(), "").decode().strip()
            for n, key in self.keys.items()
        }
        self.terms = Terms(count, max(self.examples.values()), 1.0)

    @staticmethod
    def _change(rng: np.random.Generator, numbers: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, SCALE, numbers)).float()

    def sign(self, name: str) -> Callable[[bytes], bytes]:
        """Signs with a site's key."""
        return lambda message: certificates.sign(self.keys[name], message)

    def verify(self, site: str, message: bytes, signature: bytes) -> bool:
        """Whether a site has signed a message."""
        return certificates.signed_by(self.public[site], message, signature)

    def error(self, found: torch.Tensor, names: tuple[str, ...]) -> float:
        """Of a mean change, relative to the plain one."""
        weights = torch.tensor([float(self.examples[n]) for n in names], dtype=torch.float64)
        rows = torch.stack([self.updates[n].double() for n in names])
        plain = torch.tensordot(weights / weights.sum(), rows, dims=1) - self.start["w"].double()
        off = found.double() - self.start["w"].double() - plain
        return float(off.norm() / plain.norm())


def session(lab: Lab, gone: dict[str, int]) -> tuple[float, Clocks]:
    """One sum, with so many sites gone from each phase on; its error, and who spent what."""
    clocks, left = Clocks(), list(lab.names)
    asked = Session("run", 1, "0" * 32, lab.names)
    coordinator = Aggregator(asked, lab.verify)
    sites = {n: Participant(n, asked, lab.sign(n), lab.verify) for n in lab.names}

    def without(phase: str) -> list[str]:
        nonlocal left
        left = left[: len(left) - gone.get(phase, 0)]
        return left

    for name in lab.names:
        with clocks.of(name):
            advert = sites[name].keys()
        with clocks.of("coordinator"):
            coordinator.add_keys(advert)
    with clocks.of("coordinator"):
        adverts = coordinator.keys()
    for name in without("shares"):
        certificates.signed_by.cache_clear()  # each site checks all signatures itself
        with clocks.of(name):
            sealed = sites[name].shares(adverts)
        with clocks.of("coordinator"):
            coordinator.add_shares(name, sealed)
    with clocks.of("coordinator"):
        coordinator.settle()
        coordinator.bind(b"request")
    length = lab.terms.length(lab.start, ["w"])
    for name in without("vectors"):
        with clocks.of(name):
            update = {"w": lab.updates[name]}
            words = vector_of(update, lab.start, ["w"], lab.examples[name], 1.0, lab.terms)
            hidden = sites[name].masked(words, coordinator.shares_for(name), b"request")
        with clocks.of("coordinator"):
            coordinator.add_masked(name, hidden, length)
    return _unmasked(lab, coordinator, sites, without("unmasking"), clocks), clocks


def _unmasked(
    lab: Lab,
    coordinator: Aggregator,
    sites: dict[str, Participant],
    left: list[str],
    clocks: Clocks,
) -> float:
    with clocks.of("coordinator"):
        survivors = coordinator.survivors()
    signatures: dict[str, bytes] = {}
    if survivors != coordinator.members:
        for name in left:
            with clocks.of(name):
                signature = sites[name].confirm(survivors)
            with clocks.of("coordinator"):
                coordinator.add_signature(name, signature)
        signatures = coordinator.signatures()
    for name in left:
        with clocks.of(name):
            shares = sites[name].reveal(survivors, signatures)
        with clocks.of("coordinator"):
            coordinator.add_revealed(name, shares)
    with clocks.of("coordinator"):
        examples = [lab.examples[name] for name in survivors]
        found = mean_of(coordinator.total(), lab.start, ["w"], examples, lab.terms)
    return lab.error(found.mean["w"], survivors)


def errors() -> dict[str, dict[str, float]]:
    """Relative errors by number of sites and phase; raises where one too few still give a sum."""
    found: dict[str, dict[str, float]] = {}
    for count in COUNTS:
        lab, most = Lab(count, SMALL), count - threshold(count)
        found[str(count)] = {"nobody": session(lab, {})[0]}
        for phase in PHASES if most else ():
            found[str(count)][phase] = session(lab, {phase: most})[0]
        for phase in PHASES:
            try:
                session(lab, {phase: most + 1})
            except Broken:
                continue
            raise AssertionError(f"{most + 1} of {count} gone at {phase}, and there is a sum")
        print(count, found[str(count)], flush=True)
    return found


def bytes_up(lab: Lab) -> dict[str, int]:
    """Bytes that one site sends: a round of masks, the first one's more, and a plain update."""
    asked = Session("0" * 16, 1, "0" * 32, lab.names)
    ticket, name = Ticket("0" * 16, "0" * 16, 1, "0" * 16, "0" * 64), lab.names[0]
    sites = {n: Participant(n, asked, lab.sign(n), lab.verify) for n in lab.names}
    adverts = [site.keys() for site in sites.values()]
    shares = masks.bytes_json(sites[name].shares(adverts))
    report = ClientReport(name, 1000, 0.123456789, 100, 12.3456789)
    words = np.zeros(lab.terms.length(lab.start, ["w"]), np.uint32)
    opened = masks.bytes_json(dict.fromkeys(lab.names, bytes(33)))
    kinds = (replies.MASK_KEYS, replies.MASK_SHARES, replies.MASK_OPENED)
    answers: tuple[dict[str, Any], ...] = (
        {"keys": masks.adverts_json(adverts[:1])},
        {"shares": shares},
        {"opened": opened, "shares": shares},
    )
    keys, sealed, unmasking = (
        len(masks.answer(kind, ticket, name, **facts))
        for kind, facts in zip(kinds, answers, strict=True)
    )
    layout = layout_of(lab.start)
    exchange = Exchange(layout, lab.start, layout, frozenset())
    plain, _ = replies.update(ticket, report, lab.start, exchange, "fp32")
    vector = len(masks.masked(ticket, report, words, adverts[0]))
    return {
        "vector": vector,
        "unmasking": unmasking,
        "first_round_more": keys + sealed,
        "plain": len(plain),
    }


def main() -> None:
    """Measure, and write the result."""
    found = errors()
    lab = Lab(100, VIT_B_32)
    most = 100 - threshold(100)
    seconds: dict[str, Any] = {}
    for label, gone in (("nobody_gone", {}), ("most_gone", {"vectors": most})):
        error, clocks = session(lab, gone)
        server = clocks.seconds.pop("coordinator")
        seconds[label] = {"site": max(clocks.seconds.values()), "coordinator": server}
        found["100"][f"ViT-B/32, {label}"] = error
        print(label, error, seconds[label], flush=True)
    sizes = bytes_up(lab)
    figures = {
        "masked_relative_error": max(max(row.values()) for row in found.values()),
        "masked_site_seconds_100": max(row["site"] for row in seconds.values()),
        "masked_server_seconds_100": max(row["coordinator"] for row in seconds.values()),
        "masked_server_seconds_100_nobody_gone": seconds["nobody_gone"]["coordinator"],
        "masked_bytes_up_ratio": (sizes["vector"] + sizes["unmasking"]) / sizes["plain"],
    }
    details = {
        "relative_error": found,
        "processor_seconds": seconds,
        "bytes_up": sizes,
        "numbers": {"small": SMALL, "vit_b_32": VIT_B_32},
        "gone": {str(n): n - threshold(n) for n in COUNTS},
    }
    write_result("masks", figures, details)
    print(figures)


if __name__ == "__main__":
    main()
