"""The command line: what it says, where it says it, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from fedclip.config import Config
from fedclip.errors import FedclipError, FedclipWarning, TrainingFailed
from fedclip.runs import RunFolder
from tests.conftest import Command


class Experiment(types.ModuleType):
    """Stands in for fedclip.experiment and fedclip.inspection, and records how it was called."""

    def __init__(self) -> None:
        super().__init__("fedclip.experiment")
        self.calls: list[tuple[Any, ...]] = []
        self.failure: BaseException | None = None

    def run(self, config: Config, *, output: Path, listener: Any) -> Any:
        self.calls.append(("run", config, output))
        return self._work(output)

    def resume(self, folder: Path, *, listener: Any) -> Any:
        self.calls.append(("resume", folder))
        return self._work(folder)

    def info(self, target: Path, overrides: list[str]) -> dict[str, Any]:
        self.calls.append(("info", target, overrides))
        return {
            "base_parameters": 151277313,
            "bytes_up_per_client_round": 2359296,
            "times_less_traffic": 256.48,
            "summary": {"model": "[b]tiny", "best": None},
        }

    def evaluate(self, folder: Path, listener: object = None) -> dict[str, Any]:
        self.calls.append(("evaluate", folder))
        return {"accuracy": 0.5}

    def predict(self, folder: Path, images: list[Path], labels: Any) -> list[dict[str, Any]]:
        self.calls.append(("predict", folder, images, labels))
        return [
            {"image": str(i), "label": "a [b]", "confidence": 0.9, "scores": {}} for i in images
        ]

    def _work(self, folder: Path) -> Any:
        if not Path(folder).exists():
            RunFolder.create(folder, "seed: 0\n")
        if self.failure is not None:
            raise self.failure
        summary = {"accuracy": 0.9, "zero_shot_accuracy": 0.4, "rounds": 3}
        return types.SimpleNamespace(folder=folder, summary=summary)


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    fake = Experiment()
    for name in ("experiment", "inspection"):
        monkeypatch.setitem(sys.modules, f"fedclip.{name}", fake)
        monkeypatch.setattr(f"fedclip.{name}", fake, raising=False)
    return fake


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
    assert err.strip() == (
        f"stopped; the last finished round is kept. Go on by: fedclip run --resume {tmp_path / 'r'}"
    )


@pytest.mark.parametrize("error", [FedclipError("disk [full]"), TrainingFailed("disk [full]")])
def test_a_failed_run_exits_with_1(
    fedclip: Command, experiment: Experiment, config: Path, tmp_path: Path, error: Exception
) -> None:
    experiment.failure = error
    code, _, err = fedclip("run", config, "--output", tmp_path / "out")
    assert (code, err) == (1, "error: disk [full]\n")


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
    assert err == (
        "error: ValueError: odd thing (unforeseen; FEDCLIP_DEBUG=1 shows the traceback)\n"
    )
    monkeypatch.setenv("FEDCLIP_DEBUG", "1")
    assert "Traceback" in fedclip("run", config, "--output", tmp_path / "b")[2]


def test_advice_is_one_line(fedclip: Command, config: Path) -> None:
    code, out, err = fedclip("validate", config, "model.lora.lora_alpha=64")
    assert code == 0
    assert out == f"{config}: valid\n"
    assert err == (
        "warning: model.lora.lora_alpha is usually 1 to 2 times r (8 to 16), got 64 "
        "(command line: model.lora.lora_alpha=64)\n"
    )


def test_other_warnings_stay_as_they_are(
    fedclip: Command, experiment: Experiment, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(folder: Path, listener: object = None) -> dict[str, Any]:
        warnings.warn("ours", FedclipWarning, stacklevel=2)
        warnings.warn("ours", FedclipWarning, stacklevel=2)
        return {}

    monkeypatch.setattr(experiment, "evaluate", evaluate)
    assert fedclip("evaluate", "r")[2] == "warning: ours\n" * 2


def test_validate_reports_every_file(fedclip: Command, config: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("seed: x\n")
    code, out, err = fedclip("validate", bad, config, tmp_path / "none.yaml")
    assert code == 2
    assert out == f"{config}: valid\n"
    assert f"seed must be a whole number >= 0, got the text 'x' ({bad}, line 1)" in err
    assert "there is no configuration file" in err


def test_info_as_a_table_and_as_json(
    fedclip: Command, experiment: Experiment, config: Path
) -> None:
    code, out, _ = fedclip("info", config, "seed=1")
    assert code == 0
    assert experiment.calls == [("info", config, ["seed=1"])]
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    assert {key: value.strip() for key, value in rows.items()} == {
        "base parameters": "151,277,313",
        "bytes up per client round": "2.359 MB",
        "times less traffic": "256.5",
        "summary: model": "[b]tiny",
        "summary: best": "-",
    }
    assert json.loads(fedclip("info", config, "--json")[1])["base_parameters"] == 151277313


def test_a_run_cannot_be_changed_by_info(
    fedclip: Command, experiment: Experiment, tmp_path: Path
) -> None:
    assert fedclip("info", tmp_path, "seed=1")[0] == 2
    assert fedclip("info", tmp_path)[0] == 0


def test_evaluate_and_predict(fedclip: Command, experiment: Experiment) -> None:
    assert "accuracy  0.5" in fedclip("evaluate", "r")[1]
    code, out, _ = fedclip("predict", "r", "x.png", "y.png", "--labels", "a, b")
    assert code == 0
    assert experiment.calls[-1] == (
        "predict",
        Path("r"),
        [Path("x.png"), Path("y.png")],
        ["a", "b"],
    )
    assert [line.split() for line in out.splitlines()] == [
        ["image", "label", "confidence"],
        ["x.png", "a", "[b]", "0.9"],
        ["y.png", "a", "[b]", "0.9"],
    ]
    assert json.loads(fedclip("predict", "r", "x.png", "--json")[1])[0]["label"] == "a [b]"


def test_help_and_version(fedclip: Command) -> None:
    for command in ("run", "validate", "info", "evaluate", "predict"):
        assert command in fedclip("--help")[1]
        assert fedclip(command, "--help")[0] == 0
    assert fedclip("--version")[1].startswith("fedclip 0.")
    assert fedclip()[0] == 2


def test_a_closed_pipe_is_no_traceback(config: Path) -> None:
    code = (
        "import sys; sys.argv = ['fedclip', 'validate'] + [sys.argv[1]] * 2000;"
        "from fedclip.cli import main; main()"
    )
    command = [sys.executable, "-c", code, str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
