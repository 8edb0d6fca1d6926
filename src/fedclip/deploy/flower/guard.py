"""Access control for Flower's SuperLink: sites may take part, the control API is local only.

Flower serves three interfaces on one port. Fleet, by which sites take part, asks for a registered
key. Control (start a run, which sends code to every site; register a key) and Runtime (act as the
running app) ask for nothing at all in Flower 1.41. So whoever reached the port could run programs
at the sites. Here all but Fleet and the health check is refused to other machines.
"""

from __future__ import annotations

import base64
import ipaddress
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fedclip.deploy.flower import private

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FOR_SITES = "/v1/fleet/"
FOR_ALL = ("/health",)
PUSH_MESSAGE, PUSH_OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"
KEY_HEADER = b"flwr-public-key"


def install() -> None:
    """Put the guard in front of the SuperLink that this process is going to run."""
    from starlette.middleware import Middleware

    largest = int(os.environ["FEDCLIP_LARGEST_MESSAGE"])
    others = private.load("get_middleware")
    private.replace("get_middleware", lambda: (Middleware(Guard, largest=largest), *others()))


def is_this_machine(scope: Scope) -> bool:
    """Whether a request comes from this machine: by loopback, or from its address."""
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or bool(server and client[0] == server[0])


class Guard:
    """ASGI middleware that lets through what a machine may ask for, in messages of a fair size."""

    def __init__(self, app: App, largest: int) -> None:
        self.app = app
        self.largest = largest
        self.sent: dict[bytes, int] = {}  # bytes of the message under way, by the sender's key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope.get("path", "")
        if not path.startswith(FOR_SITES) and path not in FOR_ALL and not is_this_machine(scope):
            await refuse(scope, send, 403, "only the coordinator's own machine may ask for this")
        elif path.startswith(FOR_SITES):
            await self._measured(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _measured(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        key = headers.get(KEY_HEADER, b"")
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            await refuse(scope, send, 411, "a request must say how long it is")
            return
        total = int(length)
        if scope["path"] == PUSH_OBJECT:
            total += self.sent.get(key, 0)
        if total > self.largest:
            logging.getLogger("flwr").error(
                "fedclip: the site with key %s sends more than %d bytes in one message: refused",
                short_key(key),
                self.largest,
            )
            await refuse(scope, send, 413, f"a message may have {self.largest} bytes")
            return
        if scope["path"] not in (PUSH_MESSAGE, PUSH_OBJECT):
            await self.app(scope, receive, send)
            return

        async def counted(event: MutableMapping[str, Any]) -> None:
            # Only what Flower accepts counts: it checks whether the key is the sender's.
            if event["type"] == "http.response.start" and event["status"] < 400:
                self.sent[key] = total
            await send(event)

        await self.app(scope, receive, counted)


def short_key(header: bytes) -> str:
    """The fingerprint, as `ssh-keygen -l` has it, of the public key in a request's header."""
    from fedclip.deploy.keys.certificates import fingerprint, load_pem_public

    try:
        return fingerprint(load_pem_public(base64.b64decode(header)))
    except ValueError:
        return "(none)"


async def refuse(scope: Scope, send: Send, status: int, why: str) -> None:
    """Answer with a status and a reason, unread."""
    body = why.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
