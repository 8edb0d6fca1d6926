"""Sites on other machines: what a round costs beside Flower's own, what travels, what is lost.

python benchmarks/machines.py [--quick]     # benchmarks/results/machines.json

Coordinator and sites run on loopback, with TLS and keys. The floor is Flower's own round
(`send_and_receive`) with an empty app, on the same SuperLink and the same SuperNodes, right before.
Sites talk to the coordinator through a relay that counts the bytes at their sockets.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import write_result
from benchmarks.relay import Counted, Relay
from fedclip import create_clip_model
from fedclip.config import Config
from fedclip.config.loading import config_from_dict, dump_config
from fedclip.deploy.addresses import Address, free_port
from fedclip.deploy.coordinator import registry
from fedclip.deploy.coordinator.control import Control
from fedclip.deploy.coordinator.coordinate import APP
from fedclip.deploy.coordinator.rounds import DeployProgress, rounds
from fedclip.deploy.coordinator.run_files import DeployFiles
from fedclip.deploy.flower.commands import superlink
from fedclip.deploy.flower.supervisor import Supervised, listening
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.message_sizes import expected_messages
from fedclip.deploy.messages import replies, requests
from fedclip.deploy.remote.roster import Answer
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.trainer import SiteTrainer
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.run import run
from fedclip.records import ClientReport, TrainRequest
from scripts.federation import SITES, TEST, write_images

EMPTY_SERVER = '''
"""Rounds of Flower's own with four numbers, and how long they take."""
import json, time
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < context.run_config["sites"]:
        time.sleep(0.5)
    seconds = []
    for _ in range(context.run_config["rounds"]):
        started = time.monotonic()
        record = ArrayRecord([np.zeros(4, np.float32)])
        letters = [Message(RecordDict({"a": record}), n, "train") for n in grid.get_node_ids()]
        replies = list(grid.send_and_receive(letters, timeout=300))
        assert all(reply.has_content() for reply in replies)
        seconds.append(time.monotonic() - started)
    Path(context.run_config["result"]).write_text(json.dumps(seconds))
'''
EMPTY_CLIENT = '''
"""Sends back what came."""
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
'''


def tree(folder: Path, rounds_: int, **deploy: Any) -> dict[str, Any]:
    """The run: digits at three sites; tested after the last round only, so that rounds are bare."""
    return {
        "model": {"model_name": "tiny", "lora": {"r": 8, "lora_alpha": 16}},
        "client": {"local_epochs": 1, "learning_rate": 1e-2},
        "optimizer": {"schedule": "cosine"},
        "device": "cpu",
        "data": {"name": "imagefolder", "path": str(folder / "test"), "layout": "classes"},
        "federation": {"rounds": rounds_},
        "evaluation": {"every": rounds_ + 1},
        "deploy": {"sites": list(SITES), "round_deadline": 300.0, **deploy},
    }


def sequential(folder: Path, rounds_: int) -> Config:
    """The same on one machine."""
    values = tree(folder, rounds_) | {"engine": {"name": "sequential"}}
    values["data"] |= {"path": str(folder / "images"), "layout": "sites"}
    return config_from_dict(values)


def empty_app(folder: Path) -> Path:
    """fedclip's app with nothing in it."""
    package = folder / "fedclip_federation"
    package.mkdir(parents=True)
    project = (APP / "pyproject.toml").read_text()
    project = project.replace('folder = ""', 'result = ""\nrounds = 1\nsites = 1')
    (folder / "pyproject.toml").write_text(project)
    (package / "__init__.py").touch()
    (package / "server_app.py").write_text(EMPTY_SERVER)
    (package / "client_app.py").write_text(EMPTY_CLIENT)
    return folder


class Machines:
    """A coordinator's server and three sites on loopback."""

    def __init__(self, folder: Path, resident: bool, stack: ExitStack) -> None:
        self.folder, self.place = folder, folder / ("resident" if resident else "anew")
        self.place.mkdir()
        address = Address("127.0.0.1", free_port())
        self.authority = folder / "keys/ca.crt"
        self.address = address
        command = superlink(
            address, self.place / "home", self.place / "state.db", folder / "keys", 2**28
        )
        ready = listening(address, self.authority)
        stack.enter_context(Supervised(command, self.place / "link.log", ready)).wait(120)
        with Control(address, self.authority) as control:
            registry.register_all(control, folder / "keys")
        door = Address("127.0.0.1", free_port())
        self.relay = stack.enter_context(Relay(door, address))
        for name in SITES:
            own = {
                "name": name,
                "coordinator": str(door),
                "keys": str(folder / "keys/sites" / name),
                "state": str(self.place / name),
                "device": "cpu",
                "resident": resident,
                "data": {"path": str(folder / "images" / name)},
            }
            file = self.place / f"{name}.yaml"
            file.write_text(yaml.safe_dump(own))
            site = subprocess.Popen(
                [sys.executable, "-m", "fedclip", "site", "--config", str(file)],
                stderr=subprocess.DEVNULL,
            )
            stack.callback(site.wait)
            stack.callback(site.terminate)

    def carry_out(
        self, app: Path, settings: Mapping[str, Any], look: Callable[[], object] = lambda: None
    ) -> None:
        """One run of Flower's, to its end; `look` is called again and again meanwhile."""
        with Control(self.address, self.authority) as control:
            number = control.start_run(app, settings)
            while (status := control.run_status(number))[0] != "finished":
                look()
                time.sleep(0.2)
            if status[1] != "completed":
                raise SystemExit(f"the run ended with {status}; {self.place / 'link.log'}")

    def floor(self, count: int) -> list[float]:
        """Seconds of Flower's own rounds with an empty app."""
        result = self.place / "floor.json"
        app = empty_app(self.place / "empty")
        self.carry_out(app, {"result": str(result), "rounds": count, "sites": len(SITES)})
        return list(json.loads(result.read_text()))

    def train(self, count: int) -> tuple[Path, list[float], dict[str, float]]:
        """The run folder, seconds of rounds without training and evaluation, bytes at a socket."""
        folder = self.place / "run"
        keyed = {"keys": str(self.folder / "keys"), "address": str(self.address)}
        RunFolder.create(folder, dump_config(config_from_dict(tree(self.folder, count, **keyed))))
        files = DeployFiles(folder)
        files.create()
        marks: dict[int, Counted] = {}  # the relay's count, by rounds that have ended

        def look() -> None:
            ended = len(files.bytes.read_text().splitlines()) if files.bytes.exists() else 0
            marks.setdefault(ended, self.relay.counted)

        self.carry_out(APP, {"folder": str(folder)}, look)
        lines = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
        # Of the last round the count would have the results in it, which every site is given.
        first, *_, last = sorted(ended for ended in marks if 0 < ended < count)
        between = marks[last].since(marks[first])
        each = (last - first) * len(SITES)
        sockets = {"socket_up": between.up / each, "socket_down": between.down / each}
        # The last round is tested.
        bare = [t["seconds"] - max(t["clients"].values()) for t in lines[1:-1]]
        return folder, bare, sockets


class LocalMail:
    """Sites in this process."""

    def __init__(self, folder: Path, state: Path) -> None:
        self._answers: list[Answer] = []
        self._sites = [
            SiteTrainer(
                SiteConfig.model_validate(
                    {
                        "name": name,
                        "state": str(state / name),
                        "device": "cpu",
                        "data": {"path": str(folder / "images" / name)},
                    }
                ),
                lambda text: None,
            )
            for name in SITES
        ]

    def online(self) -> Mapping[int, str]:
        """All of them."""
        return dict(enumerate(SITES))

    def post(self, letters: Sequence[tuple[int, bytes]]) -> Sequence[str]:
        """Answers at once."""
        tickets = [str(time.monotonic_ns() + i) for i in range(len(letters))]
        for ticket, (node, data) in zip(tickets, letters, strict=True):
            self._answers.append(Answer(ticket, self._sites[node].answer(data)))
        return tickets

    def collect(self, tickets: Sequence[str]) -> Iterable[Answer]:
        """All answers."""
        found, self._answers = self._answers, []
        return found

    def forget(self, tickets: Sequence[str]) -> None:
        """Nothing to forget."""


def accuracy(folder: Path, up: str, seed: int, count: int) -> float:
    """Accuracy on digits after some rounds with this format."""
    from rich.console import Console

    with tempfile.TemporaryDirectory() as place:
        config = config_from_dict(tree(folder, count, up=up) | {"seed": seed})
        new = RunFolder.create(Path(place) / "run", dump_config(config))
        files = DeployFiles(new.path)
        files.create()
        listener = DeployProgress(Console(quiet=True), files)
        mail = LocalMail(folder, Path(place))
        return float(rounds(config, new, files, mail, listener).summary["accuracy"])


def int8_ratio(name: str) -> float:
    """How much shorter the uplink's messages are in int8 than in fp32."""
    model = create_clip_model(
        {"model_name": name, "lora": {"r": 8, "lora_alpha": 16}}, class_names=["a", "b"]
    )
    state = model.get_parameters()
    ticket = requests.Ticket("0" * 16, "0" * 16, 1, "0" * 16, "0" * 64)
    sizes = []
    for form in ("fp32", "int8"):
        _, exchange = requests.train(TrainRequest(1, ("s",), state), "s", ticket, "fp32", form)
        changed = {n: t + 0.01 * torch.randn(t.shape) for n, t in state.items()}
        report = ClientReport("s", 100, 0.5, 10, 1.0)
        sizes.append(len(replies.update(ticket, report, changed, exchange, form)[0]))
    return sizes[0] / sizes[1]


def difference(one: Path, other: Path) -> float:
    """Largest difference of two adapters' tensors, relative to each tensor's largest value."""
    from safetensors.torch import load_file

    a, b = (load_file(p / "adapter/adapter_model.safetensors") for p in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-30)) for n in a)


def bytes_error(folder: Path, count: int) -> tuple[float, dict[str, float]]:
    """How far info's prediction of a round's messages is from what was sent."""
    lines = DeployFiles(folder).bytes.read_text().splitlines()
    last = json.loads(lines[-1])
    config = config_from_dict(tree(folder, count))
    model = create_clip_model(config.model, class_names=["a", "b"])
    foreseen = expected_messages(config, model.get_parameters())
    up, down = last["up"] / len(SITES), last["down"] / len(SITES)
    figures = {
        "up": up, "down": down, "up_foreseen": foreseen.up, "down_foreseen": foreseen.down
    }  # fmt: skip
    return max(abs(foreseen.up - up) / up, abs(foreseen.down - down) / down), figures


def main() -> None:
    """Measures everything and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one seed")
    quick = parser.parse_args().quick
    count, seeds, long = (4, (0,), 4) if quick else (7, (0, 1, 2), 8)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder / "test", *TEST)
        keys.init(folder / "keys", ["localhost"])
        for name, (first, last) in SITES.items():
            write_images(folder / "images" / name, first, last)
            keys.site(folder / "keys", name)
        details: dict[str, Any] = {"cores": os.cpu_count(), "sites": len(SITES), "rounds": count}
        above = {}
        for resident in (True, False):
            with ExitStack() as stack:
                machines = Machines(folder, resident, stack)
                floor = machines.floor(count - 1)
                done, bare, sockets = machines.train(count)
            kind = "resident" if resident else "anew_for_each_message"
            above[kind] = statistics.median(bare) - statistics.median(floor)
            details[kind] = {"floor_seconds": floor, "round_seconds_without_training": bare}
            print(kind, details[kind], flush=True)
            if resident:
                alone = run(sequential(folder, count), output=folder / "alone").folder
                equal = difference(done, alone)
                error, sizes = bytes_error(done, count)
                details["bytes_per_site_and_round"] = sizes | sockets
        details["over_floor_seconds"] = above
        ratios = {n: int8_ratio(n) for n in ("tiny", "random:openai/clip-vit-base-patch32")}
        found = {up: [accuracy(folder, up, s, long) for s in seeds] for up in ("fp32", "int8")}
        details |= {"int8_ratios": ratios, "accuracy": found}
    figures = {
        "flower_equals_sequential": equal,
        "round_seconds_over_flower_floor": above["resident"],
        "int8_bytes_ratio": min(ratios.values()),
        "int8_accuracy_loss": statistics.mean(found["fp32"]) - statistics.mean(found["int8"]),
        "bytes_prediction_error": error,
    }
    print(json.dumps(figures, indent=2))
    print(write_result("machines", figures, details))


if __name__ == "__main__":
    main()
