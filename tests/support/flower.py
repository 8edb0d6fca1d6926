"""What the tests that start Flower's processes share: a coordinator, sites, and a small app."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedclip.deploy.addresses import Address, free_port
from fedclip.deploy.coordinator import registry
from fedclip.deploy.coordinator.control import Control
from fedclip.deploy.flower.commands import LARGEST_MESSAGE, superlink, supernode
from fedclip.deploy.flower.supervisor import FOR_NODES, BackOff, Supervised, joined, listening
from fedclip.deploy.keys import folder as keys

PATIENCE = 90.0

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "small"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedclip"

[tool.flwr.app.components]
serverapp = "small.parts:server"
clientapp = "small.parts:client"

[tool.flwr.app.config]
numbers = 10
wait = 60
result = ""
"""

PARTS = '''
"""Asks the first site that comes for an array, and writes down what it got."""
import json
import os
import time
from pathlib import Path

import numpy as np
from fedclip.deploy.flower.mail import FlowerMail
from fedclip.deploy.flower.record import bytes_of, record_of
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    numbers = np.arange(int(bytes_of(message.content)), dtype=np.float32)
    name = os.environ["SITE"].encode()
    return Message(record_of(name + b"|" + numbers.tobytes()), reply_to=message)


@server.main()
def main(grid, context):
    mail = FlowerMail(grid, ttl=600)
    while not (nodes := list(mail.online())):
        time.sleep(0.5)
    start, found = time.monotonic(), {"replies": 0, "sites": [], "sum": 0.0}
    tickets = mail.post([(nodes[0], str(context.run_config["numbers"]).encode())])
    slowest = 0.0
    while found["replies"] == 0 and time.monotonic() - start < context.run_config["wait"]:
        asked = time.monotonic()
        for answer in mail.collect(tickets):
            name, numbers = answer.data.split(b"|", 1)
            found["replies"] += 1
            found["sites"].append(name.decode())
            found["sum"] += float(np.frombuffer(numbers, np.float32).sum(dtype=np.float64))
        slowest = max(slowest, time.monotonic() - asked)
        time.sleep(0.5)
    found["slowest"] = slowest
    Path(context.run_config["result"]).write_text(json.dumps(found))
'''


def small_app(folder: Path) -> Path:
    """The folder of an app in which a site sends so many numbers, 0, 1, 2, ..."""
    (folder / "small").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "small/__init__.py").touch()
    (folder / "small/parts.py").write_text(PARTS)
    return folder


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for something that is bound to happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "time is up"
        time.sleep(0.2)


@dataclass
class Federation:
    """A folder with keys for a coordinator on loopback, and what to start and ask there."""

    folder: Path
    address: Address
    largest_message: int = LARGEST_MESSAGE
    said: list[str] = field(default_factory=list)

    @classmethod
    def create(
        cls, folder: Path, sites: tuple[str, ...], largest_message: int = LARGEST_MESSAGE
    ) -> Federation:
        keys.init(folder / "keys", ["localhost"])
        for name in sites:
            keys.site(folder / "keys", name)
        return cls(folder, Address("127.0.0.1", free_port()), largest_message)

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    def coordinator(self) -> Supervised:
        command = superlink(
            self.address, self.folder / "home", self.folder / "state.db", self.keys,
            self.largest_message,
        )  # fmt: skip
        ready = listening(self.address, self.keys / "ca.crt")
        quick = BackOff(first=0.5)
        return Supervised(command, self.folder / "link.log", ready, quick, self.said.append)

    def site(self, name: str, place: Path | None = None) -> Supervised:
        command = supernode(
            name, self.address, free_port(), self.folder / name,
            place or keys.site_folder(self.keys, name), {"SITE": name},
        )  # fmt: skip
        log = self.folder / f"{name}.log"
        return Supervised(command, log, joined, FOR_NODES, self.said.append)

    def control(self) -> Control:
        return Control(self.address, self.keys / "ca.crt")

    def statuses(self) -> dict[str, str]:
        with self.control() as control:
            return {row["site"]: row["status"] for row in registry.sites(control, self.keys)}

    def run(self, app: Path, **settings: int | str) -> tuple[str, str, str]:
        """Run an app until it is finished; gives how it ended."""
        with self.control() as control:
            run = control.start_run(app, settings)
            until(lambda: control.run_status(run)[0] == "finished")
            return control.run_status(run)
