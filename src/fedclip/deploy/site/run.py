"""A site: checks what it can, keeps its trainer and Flower's node running, and stops with both."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from fedclip.deploy.addresses import Address, free_port
from fedclip.deploy.flower.app_guard import APPROVED, KEYS, NAME, RECORD
from fedclip.deploy.flower.commands import Command, supernode
from fedclip.deploy.flower.supervisor import FOR_NODES, START_PATIENCE, BackOff, Supervised, joined
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.keys.peers import check_peers
from fedclip.deploy.log.chain import LOG_FILE
from fedclip.deploy.log.places import SITE_LOCK
from fedclip.deploy.log.words import Follower, in_words
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.consent import RUNNING
from fedclip.deploy.site.handover import SITE_FILE, SOCKET, TOKEN
from fedclip.deploy.site.policy import preflight
from fedclip.deploy.site.resident import READY
from fedclip.deploy.site.signed_result import check_policy
from fedclip.errors import FedclipError, UsageError
from fedclip.experiment import lock

LOOK_EVERY = 0.5


def run_site(
    config: SiteConfig, say: Callable[[str], None], stop: threading.Event | None = None
) -> None:
    """Takes part in what the coordinator asks for and the site's policy allows, until stopped.

    Raises UsageError before it joins if something is wrong, or where the policy says that a refusal
    ends it, and ProcessFailed if Flower's node cannot be kept running.
    """
    check_policy(config)
    state = Path(config.state)
    with ExitStack() as stack:
        _be_alone(state, stack)
        facts = preflight(config)
        say(
            f"site {config.name}: {facts['images']} images of {len(facts['classes'])} classes, "
            f"{facts['free_memory_gb']} GB of memory and {facts['free_disk_gb']} GB of disk are "
            "free"
        )
        key_folder = None if config.keys is None else Path(config.keys)
        if key_folder is not None:
            keys.check_site(key_folder)
            check_peers(key_folder)
        follower = Follower(state / LOG_FILE)
        # Short, and its owner's alone.
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedclip-")))
        node, trainer = _processes(config, place, key_folder)
        kept = []
        if config.resident:
            kept.append(Supervised(trainer, state / "trainer.log", _is_ready, say=say))
            if not stack.enter_context(kept[0]).wait(START_PATIENCE):
                raise FedclipError(f"the trainer does not start; its log: {kept[0].log}")
        back_off = FOR_NODES if key_folder is not None else BackOff(first=2.0)
        flower = Supervised(node, state / "supernode.log", joined, back_off, say)
        kept.append(stack.enter_context(flower))
        _stay(kept, stop or threading.Event(), _teller(config, follower, say), say)


def _be_alone(state: Path, stack: ExitStack) -> None:
    """Raises UsageError where another `fedclip site` works on the same state."""
    taken = (
        f"another `fedclip site` works on {state}; two of them would write one private state. Stop "
        "the other, or give this one a state of its own"
    )
    with suppress(OSError):  # `preflight` says what is wrong with the folder
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        stack.enter_context(lock.exclusive(state / SITE_LOCK, taken))


def _processes(config: SiteConfig, place: Path, key_folder: Path | None) -> tuple[Command, Command]:
    """Flower's node, and the trainer that stays in memory."""
    file, state = place / "site.json", Path(config.state)
    file.write_text(config.model_dump_json(), encoding="utf-8")
    environment = {SITE_FILE: str(file), RECORD: str(state / RUNNING), NAME: config.name}
    if config.policy.approved is not None:
        environment[APPROVED] = config.policy.approved
    if key_folder is not None:
        environment[KEYS] = str(key_folder)
    if config.resident:
        environment |= {SOCKET: str(place / "trainer"), TOKEN: secrets.token_hex(32)}
    address = Address.parse(config.coordinator, "coordinator")
    port = config.port or free_port()
    node = supernode(config.name, address, port, state / "flower", key_folder, environment)
    return node, _trainer(config, file, environment)


def _teller(
    config: SiteConfig, follower: Follower, say: Callable[[str], None]
) -> Callable[[], None]:
    """A function that says what the site's processes have logged since it was last called."""

    def tell() -> None:
        for body in follower.news():
            if text := in_words(body):
                say(text)
            if body.get("event") == "refused" and config.policy.when_refused == "end":
                raise UsageError(
                    f"the site has refused a run and ends (policy.when_refused: end): "
                    f"{body.get('reason')}"
                )

    return tell


def _stay(
    kept: Sequence[Supervised],
    stop: threading.Event,
    tell: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Keeps trainer and node (the last) running, and tells what happens, until it is stopped."""
    flower, was_ready = kept[-1], False
    while not stop.wait(LOOK_EVERY):
        for process in kept:
            process.check()
        if flower.is_ready and not was_ready:
            say(f"{flower.command.name} has joined")
        was_ready = flower.is_ready
        tell()


def _trainer(config: SiteConfig, file: Path, environment: dict[str, str]) -> Command:
    program: tuple[str, ...]
    program = (sys.executable, "-P", "-m", "fedclip.deploy.site.resident", str(file))
    return Command(f"trainer of {config.name}", program, {**os.environ, **environment})


def _is_ready(log: str) -> bool:
    return READY in log
