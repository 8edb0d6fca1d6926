"""A site: checks what it can, keeps its trainer and Flower's node running, and stops with both."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fedclip.deploy.addresses import Address, free_port
from fedclip.deploy.flower.app_guard import APPROVED, RECORD
from fedclip.deploy.flower.commands import Command, supernode
from fedclip.deploy.flower.supervisor import FOR_NODES, START_PATIENCE, BackOff, Supervised, joined
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.consent import RUNNING
from fedclip.deploy.site.handover import SITE_FILE, SOCKET, TOKEN
from fedclip.deploy.site.policy import preflight
from fedclip.deploy.site.resident import READY
from fedclip.deploy.site.signed_result import check_policy
from fedclip.errors import FedclipError

LOOK_EVERY = 0.5


def run_site(
    config: SiteConfig, say: Callable[[str], None], stop: threading.Event | None = None
) -> None:
    """Takes part in what the coordinator asks for and the site's policy allows, until stopped.

    Raises UsageError before it joins if something is wrong, and ProcessFailed if Flower's node
    cannot be kept running.
    """
    check_policy(config)
    facts = preflight(config)
    say(
        f"site {config.name}: {facts['images']} images of {len(facts['classes'])} classes, "
        f"{facts['free_memory_gb']} GB of memory and {facts['free_disk_gb']} GB of disk are free"
    )
    key_folder = None if config.keys is None else Path(config.keys)
    if key_folder is not None:
        keys.check_site(key_folder)
    stop = stop or threading.Event()
    state = Path(config.state)
    with tempfile.TemporaryDirectory(prefix="fedclip-") as place:  # short, and its owner's alone
        file = Path(place) / "site.json"
        file.write_text(config.model_dump_json(), encoding="utf-8")
        environment = {SITE_FILE: str(file), RECORD: str(state / RUNNING)}
        if config.policy.approved is not None:
            environment[APPROVED] = config.policy.approved
        if config.resident:
            environment |= {
                SOCKET: str(Path(place) / "trainer"),
                TOKEN: secrets.token_hex(32),
            }
        node = supernode(
            config.name,
            Address.parse(config.coordinator, "coordinator"),
            config.port or free_port(),
            state / "flower",
            key_folder,
            environment,
        )
        back_off = FOR_NODES if key_folder is not None else BackOff(first=2.0)
        with ExitStack() as stack:
            if config.resident:
                trainer = Supervised(
                    _trainer(config, file, environment), state / "trainer.log", _is_ready, say=say
                )
                if not stack.enter_context(trainer).wait(START_PATIENCE):
                    raise FedclipError(f"the trainer does not start; its log: {trainer.log}")
            flower = Supervised(node, state / "supernode.log", joined, back_off, say)
            _stay(stack.enter_context(flower), trainer if config.resident else None, stop, say)


def _stay(
    flower: Supervised,
    trainer: Supervised | None,
    stop: threading.Event,
    say: Callable[[str], None],
) -> None:
    was_ready = False
    while not stop.wait(LOOK_EVERY):
        flower.check()
        if trainer is not None:
            trainer.check()
        if flower.is_ready and not was_ready:
            say(f"{flower.command.name} has joined")
        was_ready = flower.is_ready


def _trainer(config: SiteConfig, file: Path, environment: dict[str, str]) -> Command:
    program: tuple[str, ...]
    program = (sys.executable, "-P", "-m", "fedclip.deploy.site.resident", str(file))
    return Command(f"trainer of {config.name}", program, {**os.environ, **environment})


def _is_ready(log: str) -> bool:
    return READY in log
