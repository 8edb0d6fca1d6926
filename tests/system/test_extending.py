"""How many files a change touches, and what an installed package adds without any.

Each change below is made on a copy of the package, whose own commands then use it. To add one:
write its files in `CHANGES`, say in `MOST_FILES` how many they may be, and use it in `PROBE`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

STRATEGY = '''"""A strategy: half of the way to the mean."""

from dataclasses import replace

from fedclip.federated.strategies.base import Strategy


class Halfway(Strategy):
    def round(self, state, request, train):
        share = self.setting.options["ridge"]
        means = train(request).mean()
        moved = {n: state.shared[n] + share * (m - state.shared[n]) for n, m in means.items()}
        return replace(state, shared={**state.shared, **moved})
'''

FADED = '''"""A strategy whose clients multiply their gradients."""

from dataclasses import replace

from fedclip.federated.strategies.averaging import FedAvg


class Faded(FedAvg):
    def round(self, state, request, train):
        return super().round(state, replace(request, fade=0.0), train)
'''

DATA_SET = '''"""A data set: bright and dark squares."""

import numpy as np

from fedclip.data.source import ArrayImages, ImageSource


def squares(path=None, layout="auto"):
    pixels = np.repeat(np.arange(0, 240, 4, dtype=np.uint8), 64).reshape(60, 8, 8)
    labels = (np.arange(60) >= 30).astype(np.int64)
    return ImageSource(
        name="squares",
        images=ArrayImages(pixels, "squares"),
        labels=labels,
        class_names=("dark", "bright"),
        templates=("a {} square",),
    )
'''

ENGINE = '''"""An engine: the clients in turn, of which it keeps count."""

from fedclip.federated.engines.sequential import SequentialEngine


class Counting(SequentialEngine):
    trained = 0

    def train(self, request):
        for cohort in super().train(request):
            Counting.trained += len(cohort.reports)
            yield cohort


def counting(parts, **common):
    return Counting(parts.model, **common)
'''

METRIC = '''"""A metric of a package of its own."""


def hits(predictions):
    return 1.0
'''

COMMAND = '''"""What `fedclip hello` does."""

import typer

from fedclip.cli.console import echo


def hello(name: str) -> None:
    """Greets."""
    echo(f"hello {name}")
'''

LISTENER = '''"""A listener that leaves a line for each round."""

from pathlib import Path

from fedclip.reports.listener import Listener


class Beats(Listener):
    def round(self, record):
        with Path("beats.txt").open("a") as file:
            file.write(f"{record['server_round']}\\n")
'''

METRIC_AND_ROW = """def wrong(found: Predictions) -> float | None:
    return float(1 - found.correct.mean())


METRICS: Mapping[str, Metric] = {
    "wrong": wrong,"""


def row(after: str, entry: str) -> tuple[str, str, str]:
    """A row of the catalogue, after the line that begins its dictionary."""
    return ("catalog.py", after, f"{after}\n    {entry}")


def followed_by(line: str, next_line: str) -> tuple[str, str]:
    """A line of a file, and that line with another one below it."""
    return line, f"{line}\n{next_line}"


# change -> its files: a new one by its text, or a place in one that is there and what stands then.
CHANGES: dict[str, list[tuple[str, str] | tuple[str, str, str]]] = {
    "strategy": [
        ("federated/strategies/halfway.py", STRATEGY),
        row(
            "STRATEGIES: dict[str, StrategyEntry] = {",
            '"halfway": _strategy("halfway:Halfway", steps_in_place=True, '
            'options=("federation.ridge",)),',
        ),
    ],
    "client-side action": [
        ("federated/strategies/faded.py", FADED),
        row(
            "STRATEGIES: dict[str, StrategyEntry] = {",
            '"faded": _strategy("faded:Faded", steps_in_place=True),',
        ),
        (
            "records.py",
            *followed_by(
                '    purpose: str = field(default="client", metadata=PLAIN)',
                "    fade: float = field(default=1.0, metadata=PLAIN)",
            ),
        ),
        (
            "federated/client.py",
            *followed_by(
                "        correct()",
                "        for leaf in leaves.values():\n"
                "            leaf.grad.mul_(task.request.fade)",
            ),
        ),
        (
            "federated/engines/gradient_terms.py",
            *followed_by("    mu: float = 0.0", "    fade: float = 1.0"),
        ),
        (
            "federated/engines/gradient_terms.py",
            *followed_by("            mu=mu,", "            fade=request.fade,"),
        ),
        (
            "federated/engines/gradient_terms.py",
            "        if max_norm is not None:",
            "        grads.mul_(self.fade)\n        if max_norm is not None:",
        ),
    ],
    "data set": [
        ("data/sources/squares.py", DATA_SET),
        row(
            "DATA_SETS: dict[str, DataSetEntry] = {",
            '"squares": DataSetEntry("fedclip.data.sources.squares:squares"),',
        ),
    ],
    "engine": [
        ("federated/engines/counting.py", ENGINE),
        row(
            "ENGINES: dict[str, EngineEntry] = {",
            '"counting": EngineEntry("fedclip.federated.engines.counting:counting"),',
        ),
    ],
    "metric": [
        ("evaluation/metrics.py", "METRICS: Mapping[str, Metric] = {", METRIC_AND_ROW),
    ],
    "command": [
        ("cli/hello.py", COMMAND),
        ("cli/main.py", *followed_by("app.command()(cli_deploy.site)", "app.command()(hello)")),
        (
            "cli/main.py",
            *followed_by(
                "from fedclip.cli import keys as cli_keys", "from fedclip.cli.hello import hello"
            ),
        ),
    ],
    "listener": [
        ("reports/beats.py", LISTENER),
        (
            "cli/runs.py",
            "    return [make_progress()]",
            "    from fedclip.reports.beats import Beats\n\n    return [make_progress(), Beats()]",
        ),
    ],
}
MOST_FILES = {
    "strategy": 2,
    "client-side action": 5,
    "data set": 2,
    "engine": 2,
    "metric": 1,
    "command": 2,
    "listener": 2,
}

PROBE = """
import json, sys
import fedclip
from fedclip.adapters.inspect import evaluate
from fedclip.cli.main import main

answers = {"source": fedclip.__file__}
jobs = json.loads(sys.argv[1])
for job in jobs:  # before anything that loads torch
    sys.argv = ["fedclip", "validate", job["file"]]
    try:
        main()
    except SystemExit as end:
        job["code"] = end.code
for job in jobs:
    run = fedclip.run(job["config"], output=job["output"])
    answers[job["name"]] = {
        "validated": job["code"] == 0,
        "summary": run.summary,
        "evaluated": evaluate(run.folder)["accuracy"],
    }
from fedclip.deploy.messages.envelope import Envelope
from fedclip.deploy.messages.requests import Ticket, read_train, train
from fedclip.federated.engines.counting import Counting
from fedclip.records import TrainRequest
import torch
asked = TrainRequest(1, ("a",), {"x": torch.zeros(1)}, fade=0.25)
data, _ = train(asked, "a", Ticket("run", "job", 1, "nonce", "base"), "fp32", "fp32")
answers["arrived"] = read_train(Envelope.unpack(data), "a")[0].fade
answers["trained"] = Counting.trained
for name in ("hello", "run"):
    told = {"hello": ["world"], "run": [jobs[0]["file"], "--output", jobs[0]["output"] + "-told"]}
    sys.argv = ["fedclip", name, *told[name]]
    try:
        main()
    except SystemExit as end:
        answers[name] = end.code
print(json.dumps(answers))
"""


def make(change: str, package: Path) -> int:
    """Make a change on a copy of the package; how many files it touches."""
    for path, *texts in CHANGES[change]:
        file = package / path
        if len(texts) == 1:
            assert not file.exists()
            file.write_text(texts[0], encoding="utf-8")
        else:
            before, after = texts
            text = file.read_text("utf-8")
            assert text.count(before) == 1, (path, before)
            file.write_text(text.replace(before, after), encoding="utf-8")
    return len({path for path, *_ in CHANGES[change]})


def tiny(strategy: str, data: str, engine: str, **federation: Any) -> dict[str, Any]:
    """One round of few clients on a model of random weights."""
    return {
        "model": {"model_name": "random:tiny", "lora": {"r": 2, "lora_alpha": 4}},
        "data": {
            "name": data,
            "max_train_examples": 40,
            "test_fraction": 0.2,
            "validation_fraction": 0.0,
            "partition": {"name": "iid"},
        },
        "federation": {"strategy": strategy, "rounds": 1, "num_clients": 2, **federation},
        "engine": {"name": engine},
        "device": "cpu",
    }


def install(site: Path) -> None:
    """A package of somebody else, as pip would leave it."""
    said = "class Halfway(Strategy):\n    options = ('federation.ridge',)\n"
    way = STRATEGY.replace("class Halfway(Strategy):\n", said)
    files = {
        "others/__init__.py": "",
        "others/way.py": way,
        "others/squares.py": DATA_SET,
        "others/engine.py": ENGINE,
        "others/metric.py": METRIC,
        "others-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: others\nVersion: 1.0\n",
        "others-1.0.dist-info/entry_points.txt": "[fedclip.strategies]\n"
        "other-way = others.way:Halfway\n[fedclip.data_sets]\nother-data = others.squares:squares\n"
        "[fedclip.engines]\nother-engine = others.engine:counting\n"
        "[fedclip.metrics]\nhits = others.metric:hits\n",
    }
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text, encoding="utf-8")


JOBS = {
    "changed": tiny("halfway", "squares", "counting", ridge=0.5, server_optimizer={"name": "avgm"})
    | {"evaluation": {"metrics": ["wrong"]}},
    "installed": tiny("other-way", "other-data", "other-engine", ridge=0.5)
    | {"evaluation": {"metrics": ["hits"]}},
}


for engine in ("sequential", "batched"):
    JOBS[f"faded {engine}"] = tiny("faded", "squares", engine) | {
        "optimizer": {"name": "sgd", "weight_decay": 0.0}
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process says of all jobs, on a copy of the sources with all changes made."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    touched = {change: make(change, folder / "src/fedclip") for change in MOST_FILES}
    install(folder / "site")
    jobs = []
    for name, config in JOBS.items():
        file = folder / f"{name}.json"  # which is YAML, too
        file.write_text(json.dumps(config), encoding="utf-8")
        output = str(folder / name)
        jobs.append({"name": name, "config": config, "file": str(file), "output": output})
    path = os.pathsep.join([str(folder / "site"), str(folder / "src")])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    assert found["source"].startswith(str(folder))
    beats = (folder / "beats.txt").read_text("utf-8")
    return found | {"touched": touched, "said": done.stdout.splitlines(), "beats": beats}


@pytest.mark.parametrize("change", MOST_FILES)
def test_a_change_touches_few_files(answers: dict[str, Any], change: str) -> None:
    assert answers["touched"][change] <= MOST_FILES[change]


@pytest.mark.parametrize("name", JOBS)
def test_a_strategy_a_data_set_and_an_engine_are_used(answers: dict[str, Any], name: str) -> None:
    """As rows of the changed package, and as entry points of an installed one."""
    answer, config = answers[name], JOBS[name]
    assert answer["validated"]
    for key, section in {"strategy": "federation", "data": "data", "engine": "engine"}.items():
        named = config[section]["strategy" if section == "federation" else "name"]
        assert answer["summary"][key] == named
    assert answer["evaluated"] == answer["summary"]["accuracy"]


def test_a_new_client_side_action_is_taken_in_both_engines_and_travels(
    answers: dict[str, Any],
) -> None:
    """Gradients times nothing: the clients stay at their start, here as there."""
    found = {
        answers[f"faded {engine}"]["summary"]["adapter_sha256"]
        for engine in ("sequential", "batched")
    }
    assert len(found) == 1
    assert answers["arrived"] == 0.25


def test_the_new_engine_has_trained_the_clients(answers: dict[str, Any]) -> None:
    assert answers["trained"] == 2


def test_a_new_and_an_installed_metric_are_measured(answers: dict[str, Any]) -> None:
    assert answers["installed"]["summary"]["hits"] == 1.0
    changed = answers["changed"]["summary"]
    assert "hits" not in changed
    assert changed["wrong"] == pytest.approx(1 - changed["accuracy"])


def test_the_new_command_answers(answers: dict[str, Any]) -> None:
    assert answers["hello"] == 0
    assert "hello world" in answers["said"]


def test_the_new_listener_hears_of_the_rounds_of_a_run(answers: dict[str, Any]) -> None:
    assert answers["run"] == 0
    assert answers["beats"] == "0\n1\n"
