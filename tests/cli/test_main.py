"""The command line: what it refuses, what a run says, and how it exits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedclip.errors import FedclipError, TrainingFailed
from fedclip.experiment.folder import RunFolder
from tests.conftest import Command
from tests.support.cli import Experiment


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    return Experiment.put_in_place(monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("federation:\n  rounds: 3\n")
    return path


def test_run_passes_configuration_and_output(
    fedclip: Command, experiment: Experiment, config: Path, tmp_path: Path
) -> None:
    code, out, _ = fedclip(
        "run", config, "seed=1", "--set", "federation.rounds=5", "--set=data.batch_size=8",
        "client.learning_rate=1e-2", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    (_, seen, output) = experiment.calls[0]
    assert (seen.seed, seen.federation.rounds, seen.data.batch_size) == (1, 5, 8)
    assert seen.optimizer.learning_rate == 0.01
    assert output == tmp_path / "out"
    assert out == f"accuracy 0.900 (zero-shot 0.400) after 3 rounds\nrun folder: {output}\n"


def test_run_picks_a_fresh_folder(
    fedclip: Command,
    experiment: Experiment,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    fedclip("run", config)
    fedclip("run", config)
    assert [call[2] for call in experiment.calls] == [Path("runs/mine-1"), Path("runs/mine-2")]


def test_a_file_with_an_equals_sign_is_a_file(
    fedclip: Command, experiment: Experiment, config: Path, tmp_path: Path
) -> None:
    odd = config.rename(tmp_path / "lr=1.yaml")
    assert fedclip("run", odd, "--output", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "fedclip run needs a CONFIG file"),
        (["run", "seed=1"], "fedclip run needs a CONFIG file"),
        (["run", "a.yaml", "b.yaml"], "fedclip run takes one CONFIG, got a.yaml, b.yaml"),
        (["run", "none.yaml"], "there is no configuration file none.yaml"),
        (["run", "--resume", "r", "seed=1"], "--resume takes only the run folder"),
        (["run", "--resume", "r", "--output", "s"], "--resume takes only the run folder"),
        (["run", "--resume", "nowhere"], "nowhere is not a run folder: it does not exist"),
        (["run", "--outptu", "x"], "No such option"),
        (["train"], "No such command 'train'"),
        (["validate"], "Missing argument"),
        (["validate", "seed=1"], "fedclip validate needs a CONFIG file"),
        (["predict", "r"], "Missing argument"),
        (["predict", "r", "i.png", "--labels", "a,,b"], "must be names separated by commas"),
        (["predict", "r", "i.png", "--labels", "a,b,a"], "--labels names a class twice"),
    ],
)
def test_bad_usage_exits_with_2_and_no_traceback(
    fedclip: Command, experiment: Experiment, arguments: list[str], message: str
) -> None:
    code, out, err = fedclip(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert experiment.calls == []


def test_a_bad_configuration_exits_with_2_and_runs_nothing(
    fedclip: Command, experiment: Experiment, config: Path, tmp_path: Path
) -> None:
    config.write_text("federation:\n  round: 3\nseed: x\n")
    code, _, err = fedclip("run", config, "--output", tmp_path / "out")
    assert code == 2
    assert (
        f"unknown key federation.round; did you mean federation.rounds? ({config}, line 2)" in err
    )
    assert f"seed must be a whole number >= 0, got the text 'x' ({config}, line 3)" in err
    assert experiment.calls == []
    assert not (tmp_path / "out").exists()


def test_resume_goes_on_with_the_folder(
    fedclip: Command, experiment: Experiment, tmp_path: Path
) -> None:
    RunFolder.create(tmp_path / "r", "seed: 0\n")
    assert fedclip("run", "--resume", tmp_path / "r")[0] == 0
    assert experiment.calls == [("resume", tmp_path / "r")]


def test_resume_of_a_finished_run_says_so(
    fedclip: Command, experiment: Experiment, tmp_path: Path
) -> None:
    RunFolder.create(tmp_path / "r", "seed: 0\n").write_json("summary.json", {})
    code, _, err = fedclip("run", "--resume", tmp_path / "r")
    assert code == 0
    assert "is finished; there is nothing left to do" in err


@pytest.mark.parametrize(
    "arguments", [["run", "CONFIG", "--output", "RUN"], ["run", "--resume", "RUN"]]
)
def test_ctrl_c_says_how_to_go_on(
    fedclip: Command, experiment: Experiment, config: Path, tmp_path: Path, arguments: list[str]
) -> None:
    if "--resume" in arguments:
        RunFolder.create(tmp_path / "r", "seed: 0\n")
    experiment.failure = KeyboardInterrupt()
    places = {"CONFIG": str(config), "RUN": str(tmp_path / "r")}
    code, _, err = fedclip(*(places.get(a, a) for a in arguments))
    assert code == 130
    assert err.removeprefix(BEGINS).strip() == (
        f"stopped; the last finished round is kept. Go on by: fedclip run --resume {tmp_path / 'r'}"
    )


BEGINS = "run of mine: loading libraries\n"  # where they are not loaded yet


@pytest.mark.parametrize("error", [FedclipError("disk [full]"), TrainingFailed("disk [full]")])
def test_a_failed_run_exits_with_1(
    fedclip: Command, experiment: Experiment, config: Path, tmp_path: Path, error: Exception
) -> None:
    experiment.failure = error
    code, _, err = fedclip("run", config, "--output", tmp_path / "out")
    assert (code, err.removeprefix(BEGINS)) == (1, "error: disk [full]\n")


def test_the_unforeseen_is_one_line_unless_asked(
    fedclip: Command,
    experiment: Experiment,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment.failure = ValueError("odd\nthing")
    code, _, err = fedclip("run", config, "--output", tmp_path / "a")
    assert code == 1
    assert err.removeprefix(BEGINS) == (
        "error: ValueError: odd thing (unforeseen; FEDCLIP_DEBUG=1 shows the traceback)\n"
    )
    monkeypatch.setenv("FEDCLIP_DEBUG", "1")
    assert "Traceback" in fedclip("run", config, "--output", tmp_path / "b")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(["--version"], 0, "fedclip 0."), (["train"], 2, "No such command 'train'")],
)
def test_python_m_is_the_command(arguments: list[str], code: int, message: str) -> None:
    command = [sys.executable, "-m", "fedclip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
