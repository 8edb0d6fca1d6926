"""What Flower starts anew for each message: it hands bytes to the trainer, and the answer back.

Loads no torch, so that a message costs what Flower costs.
"""

from __future__ import annotations

import json
import os
import time
from multiprocessing.connection import Client

from fedclip.deploy.messages.envelope import BadMessage, pack_header, read_header

SOCKET, TOKEN, SITE_FILE = "FEDCLIP_TRAINER", "FEDCLIP_TRAINER_TOKEN", "FEDCLIP_SITE"
PATIENCE = 60.0
"""Seconds to wait for a trainer that is being started again."""


def hand_over(message: bytes, patience: float = PATIENCE) -> bytes:
    """The trainer's answer to a message; a refusal where there is no trainer."""
    if SOCKET not in os.environ:
        return _without_resident(message)
    end = time.monotonic() + patience
    while True:
        try:
            token = bytes.fromhex(os.environ[TOKEN])
            with Client(os.environ[SOCKET], "AF_UNIX", authkey=token) as connection:
                connection.send_bytes(message)
                return connection.recv_bytes()
        except (ConnectionError, FileNotFoundError):
            if time.monotonic() >= end:
                return _refusal(message, "its trainer is not there; its own log says why")
            time.sleep(0.2)
        except EOFError:  # it died of this message, or was killed: a second time may be too many
            return _refusal(message, "its trainer ended while it worked on this")


def _without_resident(message: bytes) -> bytes:
    """The answer of a trainer made for this message alone, which loads everything."""
    from pathlib import Path

    from fedclip.deploy.site.config import SiteConfig
    from fedclip.deploy.site.trainer import SiteTrainer

    text = Path(os.environ[SITE_FILE]).read_text(encoding="utf-8")
    return SiteTrainer(SiteConfig.model_validate_json(text)).answer(message)


def _refusal(message: bytes, reason: str) -> bytes:
    """A refusal as `wire.replies` has it."""
    try:
        asked = read_header(message)
    except BadMessage:
        asked = {}
    header = {key: asked.get(key) for key in ("version", "site", "run", "job", "round", "nonce")}
    header |= {"base": asked.get("base"), "kind": "refusal", "code": "trainer", "reason": reason}
    return pack_header(json.dumps(header))
