"""What a SuperLink or SuperNode runs in: `python -m fedclip.deploy.flower.process superlink ...`.

The process ends when the one that started it is gone, so that nothing is left behind by a `kill -9`
of a coordinator or a site; and a SuperLink keeps its control to its own machine (`guard`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from fedclip.deploy.flower import app_guard, guard, private

LOOK_EVERY = 1.0
GRACE = 8.0


def main() -> None:
    """Run the Flower process that the first argument names, with the other arguments."""
    what, *options = sys.argv[1:]
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    sys.argv = [f"flower-{what}", *options]
    if what == "superlink":
        guard.install()
        private.load("flower_superlink")()
    else:
        app_guard.install()
        private.load("flower_supernode")()


def end_with(parent: int) -> None:
    """End this process politely, then firmly, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


if __name__ == "__main__":
    main()
