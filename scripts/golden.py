"""Golden figures: does this code still compute, to the byte, what an earlier commit computed?

    python scripts/golden.py b6f3d3e        # the commit to compare with
    python scripts/golden.py --print        # only this code's figures

Six runs (quickstart, groups of tasks, FLoRA, client ranks, two processes, Fed-SB resumed after a
kill) by both sources on this machine, one after the other. Compared are `adapter_sha256` and the
SHA-256 of `metrics.jsonl`, which holds no times. The earlier commit's figures are kept in
`.golden/`, by commit and by the libraries' versions: they hold for one machine and its libraries.
Keys of `metrics.jsonl` that older commits did not write (`LATER`) are left out on both sides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".golden"
LIBRARIES = ("torch", "transformers", "peft", "numpy", "datasets", "flwr-datasets")
SHORT = ["data.max_train_examples=400", "evaluation.max_examples=200", "federation.rounds=3"]
TASKS = {
    "model": {"model_name": "tiny", "lora": {"r": 4}},
    "client": {"learning_rate": 0.01},
    "data": {"batch_size": 16, "max_train_examples": 300},
    "tasks": {"digits": {"name": "digits", "num_clients": 3}, "icons": {"name": "icons"}},
    "federation": {"rounds": 3, "sharing": {"mode": "shared+task"}},
    "evaluation": {"max_examples": 150},
}
LATER = {"validation_loss", "learning_rate", "update_norm", "worst_site"} | {
    f"{start}{name}{end}"
    for name in ("majority_class_rate", "macro_f1", "worst_class")
    for start, end in (("", ""), ("zero_shot_", ""), ("", "_by_task"))
}
QUICKSTART = "configs/quickstart.yaml"


def main() -> int:
    """Compare the figures of this code with those of an earlier commit; 0 if all are equal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", nargs="?", help="the commit to compare with")
    parser.add_argument("--print", action="store_true", help="print this code's figures")
    arguments = parser.parse_args()
    if not arguments.commit and not arguments.print:
        parser.error("name a commit, or --print")
    now = figures(ROOT)
    if arguments.print:
        print(json.dumps(now, indent=2))
    if not arguments.commit:
        return 0
    before = kept_figures(arguments.commit)
    for name, figure in before.items():
        other = [key for key in figure if now[name][key] != figure[key]]
        print(f"{'DIFFERENT' if other else 'same':10} {name}", *other)
    equal = sum(now[name] == figure for name, figure in before.items())
    print(f"{equal} of {len(before)} equal to {arguments.commit}")
    return 0 if now == before else 1


def kept_figures(commit: str) -> dict[str, Any]:
    """The figures of a commit: those kept on this machine, or made now in a worktree."""
    full = _git("rev-parse", commit)
    versions = [platform.processor() or platform.machine(), *map(version, LIBRARIES)]
    key = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:12]
    file = KEPT / f"{full[:12]}-{key}.json"
    if not file.exists():
        with tempfile.TemporaryDirectory() as folder:
            _git("worktree", "add", "--detach", f"{folder}/tree", full)
            try:
                found = figures(Path(folder) / "tree")
            finally:
                _git("worktree", "remove", "--force", f"{folder}/tree")
        KEPT.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=2))
    return dict(json.loads(file.read_text()))


def figures(source: Path) -> dict[str, dict[str, str]]:
    """`adapter_sha256` and the digest of `metrics.jsonl` of all six runs by one checkout."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "tasks.yaml").write_text(json.dumps(TASKS))  # JSON is YAML
        runs = {
            "quickstart": [QUICKSTART],
            "groups of tasks": [str(work / "tasks.yaml")],
            "flora": [QUICKSTART, "federation.strategy=flora", *SHORT],
            "client ranks": [
                QUICKSTART,
                "federation.strategy=hetlora",
                "federation.num_clients=3",
                "federation.client_ranks=[2,4,8]",
                *SHORT,
            ],
            "two processes": [QUICKSTART, *SHORT],
            "fed_sb killed": [QUICKSTART, "federation.strategy=fed_sb", *SHORT],
        }
        return {name: _one_run(source, work, name, run) for name, run in runs.items()}


def _one_run(source: Path, work: Path, name: str, arguments: list[str]) -> dict[str, str]:
    print(f"{name} by {source.name} ...", file=sys.stderr, flush=True)
    folder = work / name.replace(" ", "_")
    python = [sys.executable, "-m"]
    if name == "two processes":
        python += ["torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command = [*python, "fedclip", "run"]
    fresh = [*command, *arguments, "--output", str(folder)]
    if name.endswith("killed"):
        _kill_after_a_round(source, work, fresh, folder / "metrics.jsonl")
        _run(source, work, [*command, "--resume", str(folder)])
    else:
        _run(source, work, fresh)
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "adapter_sha256": json.dumps(_digests(summary)),
        "metrics": hashlib.sha256(_metrics(folder / "metrics.jsonl")).hexdigest(),
    }


def _metrics(file: Path) -> bytes:
    """The lines without the keys of `LATER`, in the bytes in which an older commit wrote them."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    kept = ({k: v for k, v in record.items() if k not in LATER} for record in records)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept).encode()


def _digests(summary: Any) -> Any:
    """Every `adapter_sha256` that a summary holds, of one adapter or of several."""
    if not isinstance(summary, dict):
        return []
    own = [summary["adapter_sha256"]] if "adapter_sha256" in summary else []
    return own + [digest for value in summary.values() for digest in _digests(value)]


def _environment(source: Path, work: Path) -> dict[str, str]:
    paths = {"PYTHONPATH": str(source / "src"), "XDG_CACHE_HOME": str(work / "cache")}
    return {**os.environ, **paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _run(source: Path, work: Path, command: list[str]) -> None:
    done = subprocess.run(
        command, cwd=source, env=_environment(source, work), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _kill_after_a_round(source: Path, work: Path, command: list[str], metrics: Path) -> None:
    environment = _environment(source, work)
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=source, env=environment, stdout=quiet, stderr=quiet)
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.01)
    if process.poll() is not None:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} before its kill")
    process.send_signal(signal.SIGKILL)
    process.wait()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
