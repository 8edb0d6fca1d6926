"""Runs that are killed (SIGKILL) and go on: does each end with the bytes of an undisturbed one?

`python -m benchmarks.kills --kills 100 --result benchmarks/results` kills runs of several kinds at
drawn moments: at any time, once a piece of a file, a line of metrics, a piece of the cache of
decoded pixels or of an adapter's folder is seen, right after the first write, and again while the
run goes on. Then `--resume` (or, where no run folder was made yet, the same command) ends it. A run
is a child of this process, forked once everything is imported; the first of every kind is a whole
process. Private runs all draw from one key, so that adapter, metrics and ledger can be compared.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a fork keeps no other threads

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import fedclip
from benchmarks.common import write_result
from benchmarks.small_runs import RUNS
from fedclip.cli.main import main as fedclip_main
from fedclip.experiment import privacy
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.run import resume
from fedclip.files import PART, replace_file

MOMENTS = ("file", "any time", "line", "cache", "adapter", "first write", "twice")
SAME_FIGURES = ("adapter_sha256", "state_sha256", "adapter_folders", "records_sha256")
KEY = bytes(range(32))
COMMAND = "from benchmarks.kills import command; command()"
LIMIT = 600.0
"""Seconds after which a run hangs."""


UNLIKE = ("summary.json", "timing.jsonl", "report.html")
"""Files of a run that say how long it took."""


@dataclass
class Undisturbed:
    """How a run ends that nobody kills: files, figures, and how long it takes."""

    files: Mapping[str, bytes]
    figures: Mapping[str, Any]
    seconds: float


@dataclass
class Tally:
    """What came of the kills, and what they left behind."""

    kills: Counter[str] = field(default_factory=Counter)
    identical: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Kills runs, prints and writes the counts; 1 where an end differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--commands", type=int, default=len(RUNS), help="of them whole processes")
    parser.add_argument("--kinds", nargs="*", default=list(RUNS), choices=RUNS, metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, metavar="DIR", help="write kills.json there")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedclip-kills-") as place:
        rng = random.Random(options.seed)
        commands = min(options.commands, len(options.kinds))
        tally = kill_all(options.kills, rng, Path(place), options.kinds, commands=commands)
    print(*tally.faults, sep="\n")
    figures = {"kills": tally.kills.total(), "kills_identical": tally.identical.total()}
    print(figures)
    if options.result:
        details = {
            "seed": options.seed,
            "seconds": time.perf_counter() - started,
            "kills": dict(sorted(tally.kills.items())),
            "identical": dict(sorted(tally.identical.items())),
            "left_behind": dict(sorted(tally.left.items())),
        }
        write_result("kills", figures, details, options.result)
    return 0 if figures["kills"] == figures["kills_identical"] else 1


def kill_all(
    kills: int, rng: random.Random, place: Path, names: list[str], *, commands: int
) -> Tally:
    """Kills so many runs, each kind and moment in turn; one that came too late does not count."""
    tally, whole = Tally(), dict[str, Undisturbed]()
    while tally.kills.total() < kills:
        number = tally.kills.total()
        name, moment = names[number % len(names)], MOMENTS[number // len(names) % len(MOMENTS)]
        if name not in whole:
            whole[name] = undisturbed(name, place)
        shutil.rmtree(place / "case", ignore_errors=True)
        case = Case(name, place / "case", command=number < commands)
        if not _killed(case, moment, rng, whole[name].seconds):
            continue
        kind = f"{name}, {moment}"
        tally.kills[kind] += 1
        tally.left.update(_left(case))
        if moment == "twice" and _killed(case, "any time", rng, whole[name].seconds):
            tally.left.update(_left(case))
        fault = _ended(case, whole[name])
        if fault is None:
            tally.identical[kind] += 1
        else:
            tally.faults.append(f"{kind}: {fault}")
        print(f"{number + 1} {kind}: {fault or 'identical'}", flush=True)
    return tally


def undisturbed(name: str, place: Path) -> Undisturbed:
    """One run to its end."""
    case = Case(name, place / f"{name.replace(' ', '-')}-whole")
    started = time.perf_counter()
    status = case.start().wait()
    seconds = time.perf_counter() - started
    assert status == 0, f"{name} ends with {status}: {(case.place / 'said.txt').read_text()[-500:]}"
    return Undisturbed(_files(case.run), _figures(case.run), seconds)


class Child:
    """A process that is waited for or killed."""

    def __init__(self, pid: int) -> None:
        """Takes over a child of this process."""
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self._status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if done else None
        return self._status

    def wait(self) -> int:
        """Exit code at the end."""
        limit = time.monotonic() + LIMIT
        while self.poll() is None:
            if time.monotonic() > limit:
                self.kill()
                return -1
            time.sleep(0.005)
        return self.poll() or 0

    def kill(self) -> bool:
        """SIGKILL; False where it came too late."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)
        return self.poll() == -signal.SIGKILL


@dataclass
class Case:
    """One run in a folder of its own, with a cache of its own."""

    name: str
    place: Path
    command: bool = False  # a whole process in the place of a fork

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.place / "run"

    def start(self) -> Child:
        """Begins the run, or goes on with it where its folder stands already."""
        self.place.mkdir(exist_ok=True)
        return self._command() if self.command else self._fork()

    def _config(self) -> dict[str, Any]:
        config = RUNS[self.name]
        return config | {"data": config["data"] | {"memory_gb": 0.0}}  # so that pixels are cached

    def _command(self) -> Child:
        file = self.place / "config.yaml"
        file.write_text(yaml.safe_dump(self._config()))
        words = (
            ["--resume", str(self.run)]
            if self._goes_on()
            else [str(file), "--output", str(self.run)]
        )
        environment = {**os.environ, "FEDCLIP_CACHE": str(self.place / "cache")}
        with (self.place / "said.txt").open("w") as said:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from benchmarks.kills import command; command()",
                    "run",
                    *words,
                ],
                env=environment,
                stdout=said,
                stderr=said,
            )
        process.returncode = 0  # `Child` waits for it
        return Child(process.pid)

    def _fork(self) -> Child:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return Child(pid)
        code = 1
        with_one_key()
        try:
            said = os.open(self.place / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ["FEDCLIP_CACHE"] = str(self.place / "cache")
            if self._goes_on():
                resume(self.run)
            else:
                fedclip.run(self._config(), output=self.run)
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _goes_on(self) -> bool:
        return RunFolder(self.run).is_run()


def with_one_key() -> None:
    """Has every private run of this process write the same key, where it would make a new one."""

    def create(path: Path) -> bytes:
        replace_file(path, KEY, mode=0o600)
        return KEY

    privacy.create_key = create


def command() -> None:
    """`fedclip`, with the one key."""
    with_one_key()
    fedclip_main()


def _killed(case: Case, moment: str, rng: random.Random, seconds: float) -> bool:
    """Starts a run and kills it at a moment; False where it was over before."""
    child = case.start()
    if moment in ("any time", "twice"):
        limit = time.monotonic() + rng.uniform(0, seconds)
        while time.monotonic() < limit and child.poll() is None:
            time.sleep(0.001)
        return child.kill()
    looked, wanted = SIGNS[moment]
    wanted = rng.randint(1, wanted)
    before, seen = looked(case), 0
    while child.poll() is None and seen < wanted:
        time.sleep(0.0002)  # the child may need this core
        with suppress(FileNotFoundError):  # it was renamed meanwhile
            now = looked(case)
            if now != before:
                before, seen = now, seen + bool(now)
    time.sleep(rng.choice([0, 0, 0.0005, 0.002, 0.01]))
    return child.kill()


def _pieces(case: Case) -> Any:
    return sorted(path.name for path in case.run.glob(f"{PART}*"))


def _lines(case: Case) -> Any:
    path = case.run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def _cache(case: Case) -> Any:
    return sorted((p.name, p.stat().st_size) for p in case.place.glob("cache/.pixels-*/*"))


def _adapter(case: Case) -> Any:
    return sorted(path.name for path in case.run.glob(".adapter*/*"))


def _anything(case: Case) -> Any:
    return case.run.exists() or any(case.place.glob(f"{PART}*"))


SIGNS: dict[str, tuple[Callable[[Case], Any], int]] = {
    "file": (_pieces, 6),  # by what it is seen, and how many of it a run makes at least
    "line": (_lines, 4),
    "cache": (_cache, 2),
    "adapter": (_adapter, 3),
    "first write": (_anything, 1),
}


def _left(case: Case) -> list[str]:
    """What a kill has left behind."""
    if not RunFolder(case.run).is_run():
        return ["no run yet"]
    found = {
        "a piece of a file": any(case.run.rglob(f"{PART}*")),
        "a piece of a cache": any(case.place.glob("cache/.pixels-*")),
        "a piece of an adapter": any(case.run.glob(".adapter*")),
        "a run that had ended": RunFolder(case.run).is_finished(),
        "a line ahead of its checkpoint": _ahead(case.run),
    }
    return [what for what, there in found.items() if there]


def _ahead(run: Path) -> bool:
    checkpoint, metrics = run / "checkpoint.safetensors", run / "metrics.jsonl"
    if not metrics.exists():
        return False
    return not checkpoint.exists() or checkpoint.stat().st_mtime_ns < metrics.stat().st_mtime_ns


def _ended(case: Case, whole: Undisturbed) -> str | None:
    """Goes on to the end; what differs from the undisturbed one."""
    status = case.start().wait()
    if status != 0:
        return f"ends with {status}: {(case.place / 'said.txt').read_text()[-500:]}"
    files = _files(case.run)
    if files.keys() != whole.files.keys():
        return f"other files: {sorted(files.keys() ^ whole.files.keys())}"
    for name, data in whole.files.items():
        if files[name] != data:
            return f"{name} differs"
    return None if _figures(case.run) == whole.figures else "other figures"


def _files(run: Path) -> dict[str, bytes]:
    """All that must not depend on kills: everything but times."""
    found = (path for path in run.rglob("*") if path.is_file())
    names = {path.relative_to(run).as_posix(): path for path in found}
    return {n: p.read_bytes() for n, p in names.items() if n not in UNLIKE}


def _figures(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    return {key: summary[key] for key in SAME_FIGURES}


if __name__ == "__main__":
    sys.exit(main())
