"""What `fedclip serve` does."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from fedclip.errors import UsageError, install

_EXTRA = ("fastapi", "starlette", "uvicorn", "h11")


def serve(
    folder: Path,
    *,
    host: str,
    port: int,
    max_mb: float,
    labels: Sequence[str] | None,
    allow_hosts: Sequence[str] = (),
    best: bool = False,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Serve a run's model by HTTP until Ctrl-C; port 0 takes a free one.

    It is the last round's, or with `best` that of the best round by validation.

    It answers to addresses in numbers, to localhost, and to the machine's name, the host that it
    listens at and `allow_hosts`.

    UsageError where the extra packages are missing, the run does not fit, or the address is taken.
    """
    if not math.isfinite(max_mb):
        raise UsageError(f"--max-mb must be a number from 0.001 to 1000, got {max_mb}")
    try:
        import uvicorn

        from fedclip.adapters.serve.app import create_app
        from fedclip.adapters.serve.guard import MAX_CONNECTIONS, PromptRequests, known_hosts
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise UsageError(
            f"fedclip serve needs the package {error.name}; {install('serve')}"
        ) from None
    from fedclip.adapters.predict import Predictor
    from fedclip.device import return_freed_memory

    return_freed_memory()  # between requests nobody needs it
    with _listening(host, port) as listener:  # a taken port is reported before the model is loaded
        hosts = known_hosts(host, allow_hosts)
        predictor = Predictor.of_run(folder, labels, best=best)
        app = create_app(predictor, max_bytes=int(max_mb * 1e6), hosts=hosts)
        place = f"[{host}]" if ":" in host else host
        say(f"{folder} at http://{place}:{listener.getsockname()[1]} (interface at /docs)")
        if host not in ("127.0.0.1", "::1", "localhost"):
            warn(f"whoever reaches {host} can use this model: the server asks for no password")
        config = uvicorn.Config(
            app,
            http=PromptRequests,
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=5,
            log_level="warning",
            lifespan="off",
        )
        server = uvicorn.Server(config)
        server.run(sockets=[listener])
    if getattr(server, "should_exit", False):
        raise KeyboardInterrupt  # by a signal, which uvicorn may keep to itself


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: {error.strerror or error}; choose another, or 0 for "
            "any free port"
        ) from None
