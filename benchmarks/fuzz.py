"""Damaged inputs by the thousand: is each refused in one clear message, in time?

`python -m benchmarks.fuzz --configs 10000 --files 2000` tries configurations (their overrides,
grids of `bench`, files of sites) and so many each of checkpoints, adapters, caches of pixels, run
folders, pictures and tables of pairs. Counted are `unforeseen` (anything raised but fedclip's own
error with exit code 2), `hangs` (longer than SECONDS), and `taken_damaged` (accepted, though not
what was written). A case is named by its kind and number, which with the seed make it again:
`--only runs/17`. With `--result benchmarks/results` the counts go to `fuzz.json`, kind by kind.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
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

from benchmarks import fuzz_adapters, fuzz_configs, fuzz_data, fuzz_images, fuzz_runs
from benchmarks.common import write_result
from benchmarks.fuzz_damage import Damaged
from fedclip.errors import FedclipError, UsageError
from fedclip.experiment.bench.result import commit

SECONDS = 60.0
"""Longest time for one case; most take milliseconds, also on a busy machine."""
MEMORY = 6 << 30
"""Bytes of address space for the whole command: what reads without end fails before the machine."""
FAULTS = ("unforeseen", "hangs", "taken_damaged")
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
    "checkpoints": Kind(fuzz_runs.make_checkpoint, fuzz_runs.read_checkpoint_case),
    "adapters": Kind(fuzz_adapters.make, fuzz_adapters.read),
    "caches": Kind(fuzz_data.make_cache, fuzz_data.read_cache),
    "runs": Kind(fuzz_runs.make_run, fuzz_runs.read_run),
    "images": Kind(fuzz_images.make, fuzz_images.read),
    "pairs": Kind(fuzz_data.make_table, fuzz_data.read_table),
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
    """What comes of one case: accepted, refused or one of FAULTS, and where."""
    case = kind.make(random.Random(name), Path(place))
    try:
        with warnings.catch_warnings(), _limited(SECONDS):
            warnings.simplefilter("ignore")
            kind.read(case)
    except FedclipError as error:
        if len(str(error)) > LONGEST_REFUSAL:
            return "unforeseen", "a refusal of endless length"
        if error.exit_code != UsageError.exit_code:
            return "unforeseen", f"exit code {error.exit_code}: {str(error)[:120]}"
        return "refused", ""
    except Damaged as error:
        return "taken_damaged", str(error)[:200]
    except Hang:
        return "hangs", repr(case)[:200]
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
    parser.add_argument("--configs", type=int, default=0, metavar="N", help="cases of configs")
    parser.add_argument(
        "--files", type=int, default=0, metavar="N", help="cases of each other kind"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="only these, by comma")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND/NUMBER", help="show one case, and its traceback")
    parser.add_argument("--result", type=Path, metavar="DIR", help="write fuzz.json there")
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if options.only:
        return _show(options.only, options.seed)
    faults = 0
    for name in options.kinds.split(","):
        cases = options.configs if name == "configs" else options.files
        if not cases:
            continue
        started = time.perf_counter()
        tally = fuzz(name, cases, options.seed)
        faults += sum(tally.outcomes[fault] for fault in FAULTS)
        _tell(name, tally)
        if options.result:
            seconds = time.perf_counter() - started
            facts = {"seed": options.seed, "seconds": seconds, "commit": commit()}
            _write(name, tally, facts, options.result)
    return 1 if faults else 0


def _write(name: str, tally: Tally, facts: dict[str, Any], folder: Path) -> None:
    """Puts a kind's counts into the result, beside those of the kinds that were tried before."""
    path = folder / "fuzz.json"
    kinds = json.loads(path.read_text())["details"]["kinds"] if path.exists() else {}
    kinds[name] = dict(tally.outcomes) | facts
    total = sum((Counter(_counts(kind)) for kind in kinds.values()), Counter[str]())
    figures = {"fuzz_cases": total.total()} | {f"fuzz_{fault}": total[fault] for fault in FAULTS}
    write_result("fuzz", figures, {"kinds": {n: kinds[n] for n in KINDS if n in kinds}}, folder)


def _counts(kind: dict[str, Any]) -> dict[str, int]:
    return {outcome: kind.get(outcome, 0) for outcome in ("accepted", "refused", *FAULTS)}


def _tell(name: str, tally: Tally) -> None:
    print(name, dict(tally.outcomes), flush=True)
    for signature, cases in tally.signatures.items():
        print(f"  {signature} ({', '.join(cases)})", flush=True)


def _show(name: str, seed: int) -> int:
    kind, _, number = name.partition("/")
    with tempfile.TemporaryDirectory(prefix="fedclip-fuzz-") as place:
        case = KINDS[kind].make(random.Random(f"{seed}/{kind}/{number}"), Path(place))
        print(case)
        KINDS[kind].read(case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
