"""Whole federations on loopback: the commands, Flower's processes, TLS, keys, and kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fedclip.deploy.addresses import free_port
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.keys.peers import write_peers
from fedclip.experiment.run import run
from tests.support.machines import NAMES, SIZES, sequential, tree, write_images
from tests.support.wheel import install_wheel

pytestmark = pytest.mark.federation
pytest.importorskip("flwr")

PATIENCE = 400.0


class Lab:
    """A folder with images, keys and configurations, and the commands that use them."""

    def __init__(
        self,
        folder: Path,
        keyed: bool,
        python: Path = Path(sys.executable),
        sizes: Mapping[str, int] = SIZES,
        **sections: Any,
    ) -> None:
        self.folder = folder
        self.names = tuple(sizes)
        self.python = python
        self.port = free_port()
        self.sections = sections
        self.started: list[subprocess.Popen[bytes]] = []
        deploy: dict[str, Any] = {"address": f"127.0.0.1:{self.port}", "sites": list(sizes)}
        write_images(folder, sizes)
        if keyed:
            keys.init(folder / "keys", ["localhost"])
            deploy["keys"] = str(folder / "keys")
        more = dict(sections)
        deploy |= more.pop("deploy", {})
        values = tree(folder, deploy=deploy, **more)
        (folder / "coordinator.yaml").write_text(yaml.safe_dump(values))
        for name in self.names:
            own = {
                "name": name,
                "coordinator": f"127.0.0.1:{self.port}",
                "state": f"state-{name}",
                "device": "cpu",
                "data": {"path": f"sites/{name}"},
            }
            if keyed:
                keys.site(folder / "keys", name)
                own["keys"] = f"keys/sites/{name}"
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
        if keyed:
            write_peers(folder / "keys")

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, log: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{log}.log").open("ab") as file:
            process = subprocess.Popen(
                [self.python, "-m", "fedclip", *arguments],
                stdout=file,
                stderr=file,
                cwd=self.folder,
            )
        self.started.append(process)
        return process

    def coordinator(self) -> subprocess.Popen[bytes]:
        return self.start(
            "coordinator", "coordinate", str(self.folder / "coordinator.yaml"), "-o", str(self.run)
        )

    @contextmanager
    def sites(self) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
        started = {
            name: self.start(name, "site", "--config", str(self.folder / f"{name}.yaml"))
            for name in self.names
        }
        try:
            yield started
        finally:
            for process in self.started:
                process.terminate()
            for process in self.started:
                process.wait(60)

    def said(self, log: str = "coordinator") -> str:
        path = self.folder / f"{log}.log"
        return path.read_text() if path.exists() else ""

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.said()
            time.sleep(0.2)

    def finished_rounds(self) -> int:
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) - 1 if path.exists() else -1

    def reference(self) -> dict[str, Any]:
        """The summary of the same run by the sequential engine."""
        more = {name: value for name, value in self.sections.items() if name != "deploy"}
        return run(sequential(self.folder, **more), output=self.folder / "reference").summary

    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.run / "summary.json").read_text()))


def descendant(process: subprocess.Popen[bytes], words: str) -> psutil.Process:
    """A process that this one has started, by a word of its command line."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it may be ending just now
            if words in " ".join(child.cmdline()):
                return child
    raise AssertionError(f"no {words} below {process.pid}")


def test_sites_with_keys_end_as_the_sequential_engine_whatever_is_killed(tmp_path: Path) -> None:
    """kill -9 of the coordinator before and between rounds, and of Flower's server alone."""
    lab = Lab(tmp_path, keyed=True, federation={"rounds": 4})
    with lab.sites():
        first = lab.coordinator()
        lab.until(lambda: "waiting for 3 sites" in lab.said())
        first.kill()
        first.wait()
        second = lab.coordinator()
        lab.until(lambda: lab.finished_rounds() >= 1)
        time.sleep(2)  # in training
        second.kill()
        second.wait()
        done = lab.finished_rounds()
        third = lab.coordinator()
        lab.until(lambda: lab.finished_rounds() > done)
        descendant(third, "flower.process superlink").kill()
        lab.until(lambda: third.poll() is not None)
    assert third.returncode == 0, lab.said()
    assert "was killed by signal 9" in lab.said()
    assert lab.summary()["adapter_sha256"] == lab.reference()["adapter_sha256"]
    assert lab.summary()["clients"] == 3


def test_a_site_that_is_killed_in_training_is_left_out_and_comes_back(tmp_path: Path) -> None:
    lab = Lab(
        tmp_path,
        keyed=False,
        federation={"rounds": 4},
        deploy={"round_deadline": 40.0, "quorum": 2},
    )
    with lab.sites() as sites:
        coordinator = lab.coordinator()
        lab.until(lambda: lab.finished_rounds() == 1)
        time.sleep(2)
        os.kill(descendant(sites["south"], "flower.process supernode").pid, signal.SIGKILL)
        os.kill(descendant(sites["south"], "deploy.resident").pid, signal.SIGKILL)
        lab.until(lambda: coordinator.poll() is not None)
    assert coordinator.returncode == 0, lab.said()
    lines = [json.loads(line) for line in (lab.run / "metrics.jsonl").read_text().splitlines()]
    took_part = [set(line.get("clients", ())) for line in lines]
    assert took_part[1] == set(NAMES)
    assert {"north", "west"} in took_part  # without the one that was killed
    assert took_part[4] == set(NAMES)
    assert "south has not answered within 40 s" in lab.said() or "south has failed" in lab.said()
    assert "site south was killed by signal 9" in lab.said("south")


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python far from the repository that has fedclip by its wheel, and all else from here."""
    return install_wheel(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_has_all_that_coordinator_and_sites_need(from_wheel: Path, tmp_path: Path) -> None:
    where = [from_wheel, "-c", "import fedclip; print(fedclip.__file__)"]
    found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert Path(found.stdout.strip()).is_relative_to(from_wheel.parents[1])
    lab = Lab(tmp_path, keyed=True, python=from_wheel, federation={"rounds": 2})
    with lab.sites():
        coordinator = lab.coordinator()
        lab.until(lambda: coordinator.poll() is not None)
    assert coordinator.returncode == 0, lab.said()
    assert lab.summary()["adapter_sha256"] == lab.reference()["adapter_sha256"]


def test_sites_join_once_a_person_has_approved_the_run(tmp_path: Path) -> None:
    """Refused at first, approved by the command, and all that happened can be verified."""
    lab = Lab(tmp_path, secure=True, federation={"rounds": 1})
    for name in NAMES:
        path = tmp_path / f"{name}.yaml"
        policy = {"approved": f"approved-{name}.json", "signed_result": True}
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "policy": policy}))
    coordinator = lab.coordinator()
    with lab.sites():
        for name in NAMES:
            lab.until(lambda name=name: "has approved no run yet" in lab.said(name))  # type: ignore[misc]
            approving = lab.start(
                "approve", "site", "approve", "--config", f"{tmp_path}/{name}.yaml", "--yes"
            )
            assert approving.wait(PATIENCE) == 0, lab.said("approve")
        lab.until(lambda: coordinator.poll() is not None)
        assert coordinator.returncode == 0, lab.said()
        lab.until(lambda: "the run has ended" in lab.said("north"))
        second = lab.start("second", "site", "--config", f"{tmp_path}/north.yaml")
        assert second.wait(PATIENCE) == 2
        assert "another `fedclip site` works on" in lab.said("second")
    assert "OTHER CODE" not in lab.said("approve")
    assert "approved by the site" in lab.said("north")
    folders = ["run", *(f"state-{name}" for name in NAMES)]
    verified = lab.start("verified", "log", "verify", *folders, "--keys", "keys")
    assert verified.wait(PATIENCE) == 0, lab.said("verified")
    assert lab.said("verified").count("nothing is missing") == 4
    adapter = lab.start("adapter", "verify", "state-north/adapter", "--key", "keys/ca.crt")
    assert adapter.wait(PATIENCE) == 0, lab.said("adapter")
