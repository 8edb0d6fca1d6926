"""`init`, `configs`, `schema` and `doctor` as commands."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from fedclip.adapters import doctor
from fedclip.config.loading import config_from_dict
from fedclip.config.ready import ready
from fedclip.experiment.forecast import Line
from tests.conftest import Command
from tests.support.runs import CONFIG

ROOT = Path(__file__).parents[2]


def test_configs_are_listed_and_copied(
    fedclip: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = fedclip("configs", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == [one.name for one in ready()]
    assert fedclip("configs", "quickstart")[0] == 0
    copied = (tmp_path / "quickstart.yaml").read_bytes()
    assert copied == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    code, _, err = fedclip("configs", "quickstart")
    assert (code, "exists" in err) == (2, True)
    code, _, err = fedclip("configs", "quick")
    assert (code, "quickstart" in err) == (2, True)
    assert fedclip("validate", "quickstart.yaml")[0] == 0


def test_init_writes_what_validates_and_overwrites_nothing(
    fedclip: Command, tmp_path: Path
) -> None:
    for site in ("a", "b"):
        (tmp_path / "scans" / site / "cats").mkdir(parents=True)
    file = tmp_path / "mine.yaml"
    code, out, err = fedclip("init", "--data", tmp_path / "scans", "-o", file)
    assert (code, out.strip()) == (0, str(file))
    assert "no images below" in err
    assert f"next: fedclip validate {file} --data" in err
    assert yaml.safe_load(file.read_text())["data"]["partition"] == {"name": "natural"}
    assert fedclip("validate", file)[0] == 0
    before = file.read_bytes()
    assert fedclip("init", "-o", file)[0] == 2
    assert file.read_bytes() == before
    assert fedclip("init", "--data", tmp_path / "none", "-o", tmp_path / "x.yaml")[0] == 2
    assert fedclip("init", "--classes", "a,b", "-o", tmp_path / "x.yaml")[0] == 2
    code, _, err = fedclip("init", "-o", tmp_path / "no" / "x.yaml")
    assert (code, "--output" in err) == (2, True)


@pytest.mark.parametrize(
    ("paths", "told", "partition"),
    [
        (["cat/1.png", "cat/2.png", "dog/1.png"],
         "3 images of 2 classes (cat, dog), to be divided over 5 invented clients", "dirichlet"),
        (["north/cat/1.png", "south/cat/1.png", "south/dog/1.png"],
         "3 images of 2 classes (cat, dog) at 2 sites (north, south), each a client", "natural"),
    ],
    ids=["classes", "sites"],
)  # fmt: skip
def test_init_says_what_it_found(
    fedclip: Command, tmp_path: Path, paths: list[str], told: str, partition: str
) -> None:
    for path in paths:
        (tmp_path / "own" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / path).write_bytes(b"x")
    file = tmp_path / "mine.yaml"
    code, _, err = fedclip("init", "--data", tmp_path / "own", "-o", file)
    assert code == 0
    assert told in err
    assert ("federation.strategy=centralised" in err) == (partition == "dirichlet")
    assert yaml.safe_load(file.read_text())["data"]["partition"]["name"] == partition


def test_init_takes_the_rounds_that_the_time_allows(
    fedclip: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"round_seconds": 4.0, "evaluation_seconds": 1.0, "loading_seconds": 3.0}
    monkeypatch.setattr(doctor, "examine", lambda config, listener: told)
    for minutes, rounds in ((1, 11), (0.1, 1), (1000, 50)):  # (60 - 3 - 1) / 5
        file = tmp_path / f"{rounds}.yaml"
        assert fedclip("init", "--minutes", minutes, "-o", file)[0] == 0
        assert yaml.safe_load(file.read_text())["federation"]["rounds"] == rounds


def test_the_schema_has_every_key(fedclip: Command) -> None:
    code, out, _ = fedclip("schema")
    found = json.loads(out)
    assert code == 0
    assert {"model", "data", "federation"} <= found["properties"].keys()
    assert found["$defs"]["FederationConfig"]["properties"]["rounds"]["minimum"] == 1


def test_doctor_tells_what_a_run_takes(fedclip: Command, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    code, out, err = fedclip("doctor", file, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["trainable_parameters"] == 2048
    assert found["adapted_layers"] == 16
    assert found["evaluations"] == 4
    assert found["data"][0]["sites"] == 3
    assert 0 < found["round_seconds"] < found["run_seconds"]
    assert found["peak_memory_bytes"] > 1e8
    assert found["problems"] == []
    assert not (tmp_path / "runs").exists()
    code, out, _ = fedclip("doctor", file)
    assert (code, "training examples" in out, "peak memory" in out) == (0, True, True)


def test_doctor_says_what_does_not_fit(
    fedclip: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setattr(doctor, "free_memory", lambda device: 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("D", (), {"free": 10})())
    code, _, err = fedclip("doctor", file)
    assert code == 2
    assert "memory: the run will take" in err
    assert "data.batch_size=16" in err
    assert "disk: the run folder" in err


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": {"strategy": "centralised"}},
        {"engine": {"name": "sequential"}, "federation": {"strategy": "flora"}},
        {"privacy": {"unit": "example", "target_epsilon": 20.0, "delta": 1e-3},
         "data": {"name": "digits", "max_train_examples": 200, "batch_size": 4}},
        {"tasks": {"a": {"name": "digits"}, "b": {"name": "digits", "num_clients": 2}}},
    ],
)  # fmt: skip
def test_doctor_examines_all_kinds_of_runs(changes: dict[str, object]) -> None:
    from fedclip.reports.listener import Listener

    common = {"model": CONFIG["model"], "federation": {"rounds": 2, "num_clients": 3}}
    merged = {**common, **changes}
    merged["federation"] = common["federation"] | changes.get("federation", {})  # type: ignore[operator]
    merged.setdefault("data", {"name": "digits", "max_train_examples": 90})
    found = doctor.examine(config_from_dict(merged), Listener())
    assert found["run_seconds"] > 0
    if "privacy" in changes:
        assert 18 < found["epsilon"] <= 20


def test_a_line_goes_through_what_was_measured() -> None:
    assert Line.through((10, 2.0), (30, 4.0)) == Line(1.0, 0.1)
    assert Line.through((10, 2.0), None) == Line(0.0, 0.2)
    assert Line.through((10, 2.0), (30, 1.5)) == Line(0.0, 0.05)  # noise: never falling
    assert Line(1.0, 0.1).at(50) == 6.0


@pytest.mark.slow
def test_a_wheel_has_the_ready_configurations(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # Away from the checkout, with nothing but the wheel's own files.
    work = "from fedclip.config.ready import ready; print(*(one.name for one in ready()))"
    listed = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'site'); {work}"],
        cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.split() == [one.name for one in ready()]
    assert (tmp_path / "site/fedclip/reports/report/page.html").is_file()
