"""Who may talk to the server: the names it answers to, and how long a request may take to begin."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""Time for the lines before a request's body, so that no client holds a connection by them."""
MAX_CONNECTIONS = 200

Scope = MutableMapping[str, Any]


class KnownHosts:
    """Refuse requests that name another host (Host header), which DNS rebinding depends on.

    A page of another origin can have its own name resolve to this machine, and then reads what it
    likes of the server; its requests still carry that name. Numbers cannot be rebound.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = {host.lower().rstrip(".") for host in hosts}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer, or hand the request on."""
        named = [value for key, value in scope.get("headers", ()) if key == b"host"]
        if scope["type"] == "http" and not (len(named) == 1 and self._knows(named[0])):
            text = (
                "this server does not answer to the host that the request names; "
                "fedclip serve --allow-host NAME adds one"
            )
            await JSONResponse({"error": text}, 421)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, header: bytes) -> bool:
        host = header.decode("latin-1").lower()
        host = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        return bare.rstrip(".") in self._hosts or _is_number(bare)


def known_hosts(bound: str, more: Iterable[str] = ()) -> set[str]:
    """The names that a server bound to an address answers to, numbers left out."""
    return {"localhost", socket.gethostname(), bound, *more}


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class PromptRequests(H11Protocol):
    """uvicorn's protocol, but a request whose headers do not come in time ends the connection."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the clock of the first request."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Start the clock at the first byte of a request, and stop it when its headers are here."""
        if self._deadline is None and self._between_requests():
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        super().data_received(data)
        if not self._between_requests():
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is left to wait for."""
        self._stop()
        super().connection_lost(exc)

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
