"""The resident trainer: a process of the site that keeps model and images in memory.

`python -m fedclip.deploy.site.resident SITE.json`. It listens on a socket in a folder of its
owner's, and takes only bytes, from whoever knows the token; it ends with the process that
started it.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from pathlib import Path

from fedclip.deploy.flower.process import end_with
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.handover import SOCKET, TOKEN
from fedclip.deploy.site.trainer import SiteTrainer
from fedclip.device import keep_freed_memory
from fedclip.errors import harmless

READY = "the trainer is ready"


def main() -> None:
    """Serve the site whose configuration the first argument names, until the parent is gone."""
    keep_freed_memory()  # before the first threads
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    trainer = SiteTrainer(SiteConfig.model_validate_json(text), _say)
    address, token = os.environ[SOCKET], os.environ.pop(TOKEN)
    Path(address).unlink(missing_ok=True)
    with Listener(address, "AF_UNIX", authkey=bytes.fromhex(token)) as listener:
        _say(READY)
        while True:
            with suppress(AuthenticationError, OSError, EOFError):
                serve_one(listener, trainer)


def serve_one(listener: Listener, trainer: SiteTrainer) -> None:
    """Answer one message."""
    with listener.accept() as connection:
        connection.send_bytes(trainer.answer(connection.recv_bytes()))


def _say(text: str) -> None:
    print(harmless(text), flush=True)


if __name__ == "__main__":
    main()
