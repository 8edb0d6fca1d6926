"""Consent and logs: are doctored jobs and changed logs found, and what does a log cost a round?

`python -m benchmarks.consent_log` runs a federation of three sites in this process, changes its
four logs in a thousand ways, verifies them together, and counts what is not found. Then it times
rounds with logs and without, in turn, with all four nodes in one process. Doctored jobs are those
of `tests/deploy/test_site_consent.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import write_result
from fedclip.config.loading import config_from_dict
from fedclip.deploy.log.chain import LOG_FILE, Log
from fedclip.deploy.log.verify import verify_folders
from fedclip.deploy.messages.heads import Head
from fedclip.deploy.remote.journal import Journal
from fedclip.errors import UsageError
from fedclip.records import TrainRequest
from tests.deploy import test_site_consent as consent
from tests.support.machines import NAMES, FakeMail, coordinate_here, trainer, tree, write_images

NOWHERE = Head(1, "0" * 64)


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _remove(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    del lines[draw.randrange(len(lines) - 1)]  # of the last, see truncate
    return b"".join(lines)


def _insert(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
    return b"".join(lines)


def _reorder(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    one, other = draw.sample(range(len(lines)), 2)
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def _truncate(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return data[: draw.randrange(len(data) - 1)]
    lines = data.splitlines(keepends=True)
    return b"".join(lines[: draw.randrange(len(lines))])


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": _flip,
    "remove": _remove,
    "insert": _insert,
    "reorder": _reorder,
    "truncate": _truncate,
}


def mutated(data: bytes, kind: str, draw: random.Random) -> bytes:
    """A log's bytes, changed in one way."""
    return MUTATIONS[kind](data, draw)


def federation(place: Path, images: Path, rounds: int) -> tuple[list[Path], list[float]]:
    """Folders with the four logs of a run, and the seconds of its rounds."""
    mail = FakeMail({name: trainer(images, place, name).answer for name in NAMES})
    config = config_from_dict(
        tree(images, federation={"rounds": rounds}, deploy={"join_deadline": 1.0})
    )
    coordinate_here(config, place / "run", mail)
    lines = (place / "run/timing.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines[1:]]
    return [place / "run", *(place / name for name in NAMES)], seconds


def missed(folders: list[Path], cases: int) -> tuple[dict[str, int], dict[str, int]]:
    """How many changes of each kind were tried, and how many were not found."""
    verify_folders(folders)
    tried, not_found = dict.fromkeys(MUTATIONS, 0), dict.fromkeys(MUTATIONS, 0)
    logs = [folders[0] / "deploy" / LOG_FILE, *(folder / LOG_FILE for folder in folders[1:])]
    for case in range(cases):
        draw = random.Random(case)
        kind, path = list(MUTATIONS)[case % len(MUTATIONS)], draw.choice(logs)
        whole = path.read_bytes()
        changed = mutated(whole, kind, draw)
        path.write_bytes(changed)
        tried[kind] += 1
        try:
            verify_folders(folders)
            not_found[kind] += 1
        except UsageError:
            pass
        finally:
            path.write_bytes(whole)
    return tried, not_found


def doctored_accepted(place: Path) -> tuple[int, int]:
    """Doctored jobs that were tried, and those that a site took up."""
    jobs: list[tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = [
        (consent.changed(path, value), {}, {}) for path, value, _ in consent.DOCTORED.values()
    ]
    jobs.append((consent.changed("app", consent.OTHER), {}, {}))
    jobs.append((consent.JOB, {"policy": {"require": ["masked"]}}, {}))
    jobs.append((consent.JOB, {}, {"base": "0" * 64}))
    jobs.append((consent.JOB, {"model": str(consent.doctored_base(place))}, {}))
    accepted = 0
    for number, (job, keys, ticket) in enumerate(jobs):
        own = place / str(number)
        own.mkdir()
        answer = consent.answer(consent.site(own, **keys), consent.asked(job, **ticket))
        # The folder of images does not exist, so that reading it would be another refusal.
        about_consent = any(word in answer["reason"] for word in ("approved", "base", "masked"))
        accepted += answer["kind"] != "refusal" or not about_consent
    return len(jobs), accepted


def overhead(images: Path, rounds: int) -> tuple[float, float]:
    """Median seconds of a round with logs and heads, and without: every other round of one run."""
    whole, logged = (Journal.round, Log.add, Log.head), [True]

    def begin(journal: Journal, request: TrainRequest) -> None:
        logged[0] = request.server_round % 2 == 0
        whole[0](journal, request)

    def add(log: Log, /, event: str, **facts: Any) -> Head:
        return whole[1](log, event, **facts) if logged[0] else NOWHERE

    def head(log: Log) -> Head | None:
        return whole[2].fget(log) if logged[0] else None  # type: ignore[attr-defined, no-any-return]

    Journal.round, Log.add = begin, add  # type: ignore[method-assign, assignment]
    Log.head = property(head)  # type: ignore[assignment, method-assign]
    try:
        with tempfile.TemporaryDirectory(prefix="fedclip-log-") as place:
            seconds = federation(Path(place), images, 2 * rounds)[1]
    finally:
        Journal.round, Log.add, Log.head = whole  # type: ignore[method-assign]
    # The first round warms up, the last has the end of the run in it.
    return statistics.median(seconds[1:-1:2]), statistics.median(seconds[2:-1:2])


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and writes `consent_log.json`; 1 where something was not found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--result", type=Path, metavar="DIR", help="write consent_log.json there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fedclip-log-") as place:
        images = write_images(Path(place) / "images", dict.fromkeys(NAMES, 10))
        tried, accepted = doctored_accepted(Path(place))
        folders, _ = federation(Path(place) / "federation", images, 2)
        mutations, not_found = missed(folders, options.mutations)
        logged, bare = overhead(images, options.rounds)
    figures = {
        "doctored_jobs": tried,
        "doctored_accepted": accepted,
        "log_mutations": sum(mutations.values()),
        "log_mutations_missed": sum(not_found.values()),
        "overhead_seconds_a_round": logged - bare,
        "round_seconds": bare,
    }
    print(figures, not_found)
    if options.result:
        details = {"mutations": mutations, "missed": not_found, "sites": len(NAMES)}
        write_result("consent_log", figures, details, options.result)
    return 1 if accepted or sum(not_found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
