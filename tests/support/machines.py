"""What the tests of federations over machines share: folders of images, sites without a network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fedclip.config import Config
from fedclip.config.loading import config_from_dict, dump_config
from fedclip.deploy.coordinator.rounds import DeployProgress, rounds
from fedclip.deploy.coordinator.run_files import DeployFiles
from fedclip.deploy.messages.replies import (
    MASK_KEYS,
    MASK_OPENED,
    MASK_SHARES,
    MASK_SIGNATURE,
    MASKED,
    READY,
    REFUSAL,
    TESTED,
    UPDATE,
)
from fedclip.deploy.remote.roster import Answer
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.trainer import SiteTrainer
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.run import Run

REMOTE = ("engine", "mask_steps", "masked", "roster")
NAMES = ("north", "south", "west")
SIZES = {"north": 24, "south": 16, "west": 30}


COMMON = {"version", "kind", "site", "run", "job", "round", "nonce", "base", "log"}
MAY_LEAVE = {
    READY: COMMON | {"num_examples", "software"},
    UPDATE: COMMON
    | {"layout", "ranks", "form"}
    | {"num_examples", "loss", "steps", "seconds", "rate_sum", "start_loss"},
    TESTED: COMMON | {"tests", "correct"},
    REFUSAL: COMMON | {"code", "reason"},
    MASK_KEYS: COMMON | {"keys"},
    MASK_SHARES: COMMON | {"shares"},
    MASKED: COMMON | {"num_examples", "steps", "seconds", "epsilon", "keys"},
    MASK_SIGNATURE: COMMON | {"signature"},
    MASK_OPENED: COMMON | {"opened", "shares"},
}
"""All that the header of a site's message may hold, by kind."""


def write_images(root: Path, sizes: Mapping[str, int] = SIZES, tests: int = 20) -> Path:
    """Digits 0 to 4 in `<root>/sites/<site>/<class>/*.png` and `<root>/test/<class>/*.png`."""
    digits = load_digits(n_class=5)
    position = 0
    for place, count in [*((f"sites/{n}", c) for n, c in sizes.items()), ("test", tests)]:
        for index in range(position, position + count):
            folder = root / place / f"digit_{digits.target[index]}"
            folder.mkdir(parents=True, exist_ok=True)
            picture = (digits.images[index] * 255 / 16).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"{index:04}.png")
        position += count
    return root


def tree(images: Path, **sections: Any) -> dict[str, Any]:
    """A short run on these images: three sites, two rounds; sections are laid over it."""
    values: dict[str, Any] = {
        "model": {"model_name": "tiny", "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}},
        "client": {"learning_rate": 5e-3},
        "device": "cpu",
        "data": {"name": "imagefolder", "path": str(images / "test"), "layout": "classes"},
        "federation": {"rounds": 2, "num_clients": 3},
        "evaluation": {"max_examples": 5},
    }
    for name, section in sections.items():
        old = values.get(name)
        values[name] = {**old, **section} if isinstance(old, dict) else section
    return values


def sequential(images: Path, **sections: Any) -> Config:
    """The same run on one machine, by the sequential engine."""
    values = tree(images, **sections)
    values["data"] |= {"path": str(images / "sites"), "layout": "sites"}
    values.pop("deploy", None)
    return config_from_dict(values | {"engine": {"name": "sequential"}})


def trainer(images: Path, state: Path, name: str, **keys: Any) -> SiteTrainer:
    """A site's trainer in this process."""
    config = SiteConfig.model_validate(
        {
            "name": name,
            "state": str(state / name),
            "device": "cpu",
            "data": {"path": str(images / "sites" / name)},
            **keys,
        }
    )
    return SiteTrainer(config, lambda text: None)


Change = Callable[[bytes], bytes | None]


@dataclass
class FakeMail:
    """Sites in this process, each a function from message to answer, or None for silence."""

    sites: dict[str, Callable[[bytes], bytes | None]]
    keyed: bool = True
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    received: list[tuple[str, bytes]] = field(default_factory=list)
    _answers: dict[str, Answer] = field(default_factory=dict)
    _count: int = 0

    def online(self) -> Mapping[int, str]:
        return {1 + i: name if self.keyed else "" for i, name in enumerate(self.sites)}

    def post(self, letters: Sequence[tuple[int, bytes]]) -> Sequence[str]:
        tickets = []
        for node, data in letters:
            name = list(self.sites)[node - 1]
            self._count += 1
            ticket = str(self._count)
            tickets.append(ticket)
            self.sent.append((name, data))
            answer = self.sites[name](data)
            if answer is not None:
                self.received.append((name, answer))
                self._answers[ticket] = Answer(ticket, answer)
        return tickets

    def collect(self, tickets: Sequence[str]) -> Iterable[Answer]:
        return [self._answers.pop(t) for t in tickets if t in self._answers]

    def forget(self, tickets: Sequence[str]) -> None:
        pass


class Clock:
    """Stands still while anybody works, and goes on only while the coordinator waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@contextmanager
def clock_by_hand() -> Iterator[Clock]:
    """Whatever a busy machine does, an answer is in time, and silence lasts until the deadline."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        for module in (*(f"remote.{name}" for name in REMOTE), "coordinator.rounds"):
            patch.setattr(f"fedclip.deploy.{module}.time", clock)
        yield clock


class Lines(DeployProgress):
    """Keeps what is said."""

    def __init__(self, files: DeployFiles) -> None:
        from rich.console import Console

        super().__init__(Console(quiet=True), files)
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def coordinate_here(config: Config, folder: Path, mail: FakeMail) -> tuple[Run, list[str]]:
    """The coordinator's rounds in this process; a folder that is there is gone on with."""
    run = RunFolder(folder)
    if not run.is_run():
        RunFolder.create(folder, dump_config(config))
    files = DeployFiles(folder)
    files.create()
    listener = Lines(files)
    with clock_by_hand():
        return rounds(config, run, files, mail, listener), listener.said
