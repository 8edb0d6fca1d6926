"""The guard of a SuperLink: other machines may take part, and nothing else."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedclip.deploy.flower.guard import Guard, short_key
from fedclip.deploy.keys import certificates

OWN, FAR = "10.0.0.5", "10.0.0.9"


class Inner:
    """The app behind: answers with a status, and remembers what reached it."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def ask(
    guard: Guard,
    path: str,
    client: str = FAR,
    content: Any = b"",
    key: bytes | None = None,
    method: str = "POST",
) -> int:
    async def send() -> int:
        transport = httpx.ASGITransport(guard, client=(client, 5))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{OWN}") as session:
            headers = {} if key is None else {"flwr-public-key": base64.b64encode(key).decode()}
            answer = await session.request(method, path, content=content, headers=headers)
            return answer.status_code

    return asyncio.run(send())


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/health"])
def test_what_sites_may_ask_for(path: str) -> None:
    inner = Inner()
    assert ask(Guard(inner, 100), path) == 200
    assert inner.paths == [path]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task",
        "/v1/responses", "/docs", "/openapi.json", "/", "/v1/fleet", "/healthy",
        "/v1/fleetx/../control/start-run", "//v1/fleet/pull-messages",
    ],
)  # fmt: skip
def test_what_only_this_machine_may_ask_for(path: str) -> None:
    inner = Inner()
    assert ask(Guard(inner, 100), path) == 403
    assert inner.paths == []
    for client in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", OWN):
        assert ask(Guard(inner, 100), path, client) == 200


@pytest.mark.parametrize("client", ["::ffff:10.0.0.9", "testclient", "fe80::1%eth0", ""])
def test_clients_that_are_not_this_machine(client: str) -> None:
    assert ask(Guard(Inner(), 100), "/v1/control/start-run", client) == 403


def test_every_route_of_flower_is_guarded_but_those() -> None:
    """No route of the installed Flower that another machine reaches lies outside of Fleet."""
    main = pytest.importorskip("flwr.superlink.main")
    inner = Inner()
    paths = main.create_app().openapi()["paths"]
    assert {"/v1/control/start-run", "/v1/fleet/push-messages", "/health"} <= set(paths)
    assert [path for path in paths if path.startswith("/v1/runtime/")]
    for path in paths:
        ask(Guard(inner, 100), path.replace("{", "").replace("}", ""))
    assert {path for path in inner.paths if not path.startswith("/v1/fleet/")} == {"/health"}


def test_it_stands_in_front_of_all_that_flower_has(monkeypatch: pytest.MonkeyPatch) -> None:
    main = pytest.importorskip("flwr.superlink.main")
    from flwr.superlink import extensions

    from fedclip.deploy.flower import guard

    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)
    monkeypatch.setenv("FEDCLIP_LARGEST_MESSAGE", "77")
    guard.install()
    app = main.create_app()
    assert app.user_middleware[0].cls is Guard
    assert app.user_middleware[0].kwargs == {"largest": 77}
    assert ask(app, "/v1/control/list-nodes") == 403
    assert ask(app, "/health", method="GET") == 200


# --- size ---

PUSH, OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"


def test_a_message_in_many_pieces_has_a_largest_size(caplog: pytest.LogCaptureFixture) -> None:
    key = certificates.new_key().public_key()
    pem = certificates.public_pem(key)
    guard = Guard(inner := Inner(), largest=100)
    for _ in range(3):  # a new message begins anew
        assert ask(guard, PUSH, content=b"x" * 20, key=pem) == 200
        assert ask(guard, OBJECT, content=b"x" * 40, key=pem) == 200
        assert ask(guard, OBJECT, content=b"x" * 40, key=pem) == 200
        assert ask(guard, OBJECT, content=b"x", key=pem) == 413
    assert len(inner.paths) == 9
    assert certificates.fingerprint(key) in caplog.text
    assert "sends more than 100 bytes in one message: refused" in caplog.text


def test_sites_are_counted_apart() -> None:
    guard = Guard(Inner(), largest=100)
    for key in (b"one", b"two"):
        assert ask(guard, OBJECT, content=b"x" * 90, key=key) == 200


def test_what_flower_refuses_does_not_count() -> None:
    """Otherwise a stranger could use up what a site may send."""
    guard = Guard(Inner(401), largest=100)
    for _ in range(5):
        assert ask(guard, OBJECT, content=b"x" * 90, key=b"one") == 401
    assert guard.sent == {}


def test_one_large_request_is_refused_unread() -> None:
    assert ask(Guard(inner := Inner(), largest=100), PUSH, content=b"x" * 101) == 413
    assert ask(Guard(inner, 101), PUSH, content=b"x" * 101) == 200
    assert inner.paths == [PUSH]


def test_a_request_of_unknown_length_is_refused() -> None:
    async def pieces() -> Any:
        yield b"x" * 1000

    assert ask(Guard(inner := Inner(), largest=100), PUSH, content=pieces()) == 411
    assert inner.paths == []


def test_keys_that_are_none() -> None:
    for header in (b"", b"?", base64.b64encode(b"hello")):
        assert short_key(header) == "(none)"


def test_the_header_is_flowers() -> None:
    constants = pytest.importorskip("flwr.supercore.constant")
    from fedclip.deploy.flower.guard import KEY_HEADER

    assert constants.FLEET_HTTP_PUBLIC_KEY_HEADER.encode() == KEY_HEADER


def test_the_paths_are_flowers() -> None:
    client = pytest.importorskip("flwr.supernode.fleet_http_client")
    text = Path(client.__file__).read_text()
    assert f'path="{PUSH}"' in text
    assert f'path="{OBJECT}"' in text
