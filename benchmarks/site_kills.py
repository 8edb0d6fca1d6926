"""A private site that is killed (SIGKILL) and asked again: the same answers, and counted once?

`python -m benchmarks.site_kills --kills 50 --result benchmarks/results` records what a coordinator
asks one site in a private run, then has the site answer it in a process of its own, which is killed
at a drawn moment and started anew. Half of the time the coordinator has lost the last answer and
asks for it again. Every tensor and the site's ledger must be those of a site that nobody kills; all
draw from one key.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a fork keeps no other threads

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import write_result
from benchmarks.kills import KEY, Child
from fedclip.config.loading import config_from_dict
from fedclip.deploy.messages.envelope import Envelope
from fedclip.deploy.site import privacy
from fedclip.files import replace_file
from tests.support.machines import NAMES, FakeMail, coordinate_here, trainer, tree, write_images
from tests.support.small import SMALL

SITE = "north"
TIMES = ("seconds", "log")
"""Of an answer's header, what has times in it."""


def main(arguments: list[str] | None = None) -> int:
    """Kills the site, prints and writes the counts; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, metavar="DIR", help="write site_kills.json there")
    options = parser.parse_args(arguments)
    privacy.create_key = _one_key
    rng, faults, kills = random.Random(options.seed), [], 0
    with tempfile.TemporaryDirectory(prefix="fedclip-site-kills-") as name:
        place = Path(name)
        images = write_images(place / "images")
        requests = _recorded(images, place / "recorded")
        started = time.perf_counter()
        assert _asked(images, place / "whole", requests).wait() == 0
        seconds, whole = time.perf_counter() - started, _ended(place / "whole")
        while kills < options.kills:
            case = place / "case"
            shutil.rmtree(case, ignore_errors=True)
            if not _killed(_asked(images, case, requests), rng.uniform(0, seconds)):
                continue
            kills += 1
            answers = sorted(case.glob("answer-*"))
            if answers and rng.random() < 0.5:
                answers[-1].unlink()
            status = _asked(images, case, requests).wait()
            fault = f"ends with {status}" if status else _difference(_ended(case), whole)
            faults += [fault] if fault else []
            print(f"{kills}: after {len(answers)} answers: {fault or 'identical'}", flush=True)
    figures = {"site_kills": kills, "site_kills_identical": kills - len(faults)}
    print(figures)
    if options.result:
        details = {"command": "python -m benchmarks.site_kills", "seed": options.seed}
        write_result("site_kills", figures, details | {"faults": faults}, options.result)
    return int(bool(faults))


def _one_key(path: Path) -> bytes:
    replace_file(path, KEY, mode=0o600)
    return KEY


def _recorded(images: Path, state: Path) -> list[bytes]:
    """All that the coordinator asks the site in a run."""
    values = tree(
        images,
        privacy={"unit": "example", "noise_multiplier": 0.5, "delta": 1e-3},
        federation={"strategy": "ffa", "rounds": 4},
    )
    values["model"] |= {"model_name": SMALL, "lora": {"r": 2, "last_layers": 1}}
    values["data"] |= {"batch_size": 4}
    mail = FakeMail({name: trainer(images, state, name).answer for name in NAMES})
    coordinate_here(config_from_dict(values), state / "run", mail)
    return [data for to, data in mail.sent if to == SITE]


def _asked(images: Path, state: Path, requests: list[bytes]) -> Child:
    """A process in which the site answers what it has not answered yet."""

    def work() -> None:
        state.mkdir(exist_ok=True)
        site = trainer(images, state, SITE)
        for number, data in enumerate(requests):
            path = state / f"answer-{number:02}"
            if not path.exists():
                answer = site.answer(data)
                assert answer is not None
                replace_file(path, answer)

    return _forked(work)


def _forked(work: Callable[[], None]) -> Child:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Child(pid)
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _killed(child: Child, seconds: float) -> bool:
    """Kills after so many seconds; False where all was answered before."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and child.poll() is None:
        time.sleep(0.001)
    return child.kill()


def _ended(state: Path) -> tuple[list[Any], bytes]:
    """The answers, without times, and the ledger."""
    found = [Envelope.unpack(path.read_bytes()) for path in sorted(state.glob("answer-*"))]
    plain = [
        (
            {k: v for k, v in one.header.items() if k not in TIMES},
            {n: t.numpy().tobytes() for n, t in one.tensors.items()},
        )
        for one in found
    ]
    (ledger,) = (state / SITE / "privacy").glob("*/ledger.json")
    return plain, ledger.read_bytes()


def _difference(found: tuple[list[Any], bytes], whole: tuple[list[Any], bytes]) -> str | None:
    if found[1] != whole[1]:
        return "another ledger"
    for number, (own, its) in enumerate(zip(found[0], whole[0], strict=True)):
        if own != its:
            keys = [k for k in its[0] if own[0].get(k) != its[0][k]]
            return f"answer {number} differs: {keys or 'tensors'}"
    return None


if __name__ == "__main__":
    sys.exit(main())
