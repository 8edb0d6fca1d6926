"""From Flower's process to the trainer and back, and the app as it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from fedclip.deploy.coordinator.coordinate import APP
from fedclip.deploy.messages.envelope import Envelope, pack_header, read_header
from fedclip.deploy.messages.replies import REFUSAL
from fedclip.deploy.site.handover import SOCKET, TOKEN, hand_over
from fedclip.deploy.site.resident import serve_one
from tests.support.machines import MAY_LEAVE

pytest.importorskip("flwr")
ASKED = pack_header(
    '{"version":1,"site":"north","run":"r","job":"j","round":2,"nonce":"n","base":"b"}'
)


class Echo:
    """A trainer that answers with what it got, twice."""

    def answer(self, data: bytes) -> bytes:
        return data * 2


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    address, token = str(tmp_path / "s"), os.urandom(16)
    monkeypatch.setenv(SOCKET, address)
    monkeypatch.setenv(TOKEN, token.hex())
    with Listener(address, "AF_UNIX", authkey=token) as listener:

        def serve() -> None:
            with suppress(AuthenticationError, OSError, EOFError):
                serve_one(listener, Echo())  # type: ignore[arg-type]

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(5)


@pytest.mark.usefixtures("trainer")
def test_bytes_go_to_the_trainer_and_come_back() -> None:
    assert hand_over(b"x" * 100_000) == b"x" * 200_000


@pytest.mark.usefixtures("trainer")
def test_who_does_not_know_the_token_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "00")
    with pytest.raises(AuthenticationError):
        hand_over(b"x")


def test_without_a_trainer_the_coordinator_hears_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOCKET, str(tmp_path / "none"))
    monkeypatch.setenv(TOKEN, "00")
    answer = Envelope.unpack(hand_over(ASKED, patience=0.0))
    assert answer.kind == REFUSAL
    assert answer.header["site"] == "north"
    assert answer.header["nonce"] == "n"
    assert "its trainer is not there" in answer.header["reason"]
    assert set(answer.header) <= MAY_LEAVE[REFUSAL]
    assert read_header(hand_over(b"noise", patience=0.0))["kind"] == REFUSAL


def test_flowers_process_at_a_site_loads_no_torch() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fedclip_federation.client_app; "
        "print(*{'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(APP)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_the_app_asks_for_flower_alone() -> None:
    """So that nothing is installed at run time, whatever Flower's setting is."""
    project = tomllib.loads((APP / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == ["flwr"]
    assert (APP / "fedclip_federation/server_app.py").is_file()
