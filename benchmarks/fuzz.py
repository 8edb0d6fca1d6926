"""Damaged inputs by the thousand: is each refused in one clear message, in time?

`python -m benchmarks.fuzz --configs 10000` tries configurations, their overrides, grids of `bench`
and files of sites. Counted are `unforeseen` (anything raised but fedclip's own errors), `hangs`
(longer than SECONDS), and `taken_damaged` (accepted, though not what was written). A case is named
by its kind and number, which with the seed make it again: `--only configs/17`.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import fuzz_configs
from benchmarks.common import write_result
from fedclip.errors import FedclipError

SECONDS = 10.0
"""Longest time for one case."""
LONGEST_REFUSAL = 20_000
"""Characters of a message that a person would still read."""


class Hang(BaseException):
    """A case took too long; not an Exception, so that no reader catches it."""


@dataclass(frozen=True)
class Kind:
    """One kind of input: `make` damages one in a folder, `read` takes it as fedclip does.

    `read` raises FedclipError to refuse it, and Damaged where what it was given came out otherwise.
    """

    make: Callable[[random.Random, Path], Any]
    read: Callable[[Any], None]


KINDS = {
    "configs": Kind(fuzz_configs.make, fuzz_configs.read),
}


@dataclass
class Tally:
    """What came of the cases of one kind; of each fault the first few by name."""

    outcomes: Counter[str] = field(default_factory=Counter)
    signatures: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, outcome: str, signature: str = "") -> None:
        """Counts one case."""
        self.outcomes[outcome] += 1
        if signature:
            named = self.signatures.setdefault(f"{outcome}: {signature}", [])
            named += [name] if len(named) < 3 else []


def fuzz(kind: str, cases: int, seed: int = 0, first: int = 0) -> Tally:
    """Tries so many cases of a kind, each from a seed of its own."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fedclip-fuzz-") as place:
        for number in range(first, first + cases):
            tally.add(f"{kind}/{number}", *attempt(KINDS[kind], f"{seed}/{kind}/{number}", place))
    return tally


def attempt(kind: Kind, name: str, place: str) -> tuple[str, str]:
    """What comes of one case: accepted, refused, unforeseen, hang or taken_damaged, and where."""
    case = kind.make(random.Random(name), Path(place))
    try:
        with warnings.catch_warnings(), _limited(SECONDS):
            warnings.simplefilter("ignore")
            kind.read(case)
    except FedclipError as error:
        long = len(str(error)) > LONGEST_REFUSAL
        return ("unforeseen", "a refusal of endless length") if long else ("refused", "")
    except fuzz_configs.Damaged as error:
        return "taken_damaged", str(error)[:200]
    except Hang:
        return "hang", repr(case)[:200]
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return "unforeseen", f"{type(error).__name__} at {where}: {str(error)[:120]}"
    return "accepted", ""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def over(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: list[str] | None = None) -> int:
    """Fuzzes the kinds asked for, prints the counts, and writes them; 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in KINDS:
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help=f"cases of {name}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND/NUMBER", help="show one case, and its traceback")
    parser.add_argument("--result", type=Path, metavar="DIR", help="write fuzz.json there")
    options = parser.parse_args(arguments)
    if options.only:
        return _show(options.only, options.seed)
    asked = {name: getattr(options, name) for name in KINDS if getattr(options, name)}
    started = time.perf_counter()
    tallies = {name: fuzz(name, cases, options.seed) for name, cases in asked.items()}
    total = sum((tally.outcomes for tally in tallies.values()), Counter[str]())
    for name, tally in tallies.items():
        print(name, dict(tally.outcomes))
        for signature, cases in tally.signatures.items():
            print(f"  {signature} ({', '.join(cases)})")
    figures = {
        "fuzz_cases": total.total(),
        "fuzz_unforeseen": total["unforeseen"],
        "fuzz_hangs": total["hang"],
        "fuzz_taken_damaged": total["taken_damaged"],
    }
    if options.result:
        details = {
            "seed": options.seed,
            "seconds": time.perf_counter() - started,
            "kinds": {name: dict(tally.outcomes) for name, tally in tallies.items()},
        }
        write_result("fuzz", figures, details, options.result)
    return 1 if any(figures[f"fuzz_{f}"] for f in ("unforeseen", "hangs", "taken_damaged")) else 0


def _show(name: str, seed: int) -> int:
    kind, _, number = name.partition("/")
    with tempfile.TemporaryDirectory(prefix="fedclip-fuzz-") as place:
        case = KINDS[kind].make(random.Random(f"{seed}/{kind}/{number}"), Path(place))
        print(case)
        KINDS[kind].read(case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
