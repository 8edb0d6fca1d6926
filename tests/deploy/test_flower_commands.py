"""Flower's processes: command lines, what insecure means, environments, and why they ended."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fedclip.deploy.addresses import Address, free_port, is_free
from fedclip.deploy.flower.commands import flower_environment, superlink, supernode
from fedclip.deploy.flower.exit_reasons import explain
from fedclip.deploy.keys import folder as keys
from fedclip.errors import UsageError

HERE = Address("127.0.0.1", 8000)
FAR = Address("coordinator.example.org", 8000)
PROGRAM = (sys.executable, "-P", "-m", "fedclip.deploy.flower.process")


def option(arguments: tuple[str, ...], name: str) -> str:
    return arguments[arguments.index(name) + 1]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keys in the folder `k`, seen from the working folder."""
    monkeypatch.chdir(tmp_path)
    keys.init(Path("k"), ["10.0.0.5"])
    keys.site(Path("k"), "north")
    return Path("k")


def test_a_superlink_with_keys(made: Path, tmp_path: Path) -> None:
    link = superlink(Address("0.0.0.0", 9000), tmp_path / "home", tmp_path / "s.db", made)
    arguments = link.arguments
    assert arguments[:5] == (*PROGRAM, "superlink")
    assert option(arguments, "--host") == "0.0.0.0"
    assert option(arguments, "--port") == "9000"
    assert option(arguments, "--database") == str(tmp_path / "s.db")
    for name, file in (("ca-certfile", "ca.crt"), ("certfile", "server.crt")):
        assert option(arguments, f"--ssl-{name}") == str(Path.cwd() / "k" / file)
    assert option(arguments, "--ssl-keyfile") == str(Path.cwd() / "k/server.key")
    assert "--enable-supernode-auth" in arguments
    assert "--disable-runtime-dependency-installation" in arguments
    assert "--insecure" not in arguments
    assert link.warning is None


def test_a_supernode_with_keys(made: Path, tmp_path: Path) -> None:
    place = made / "sites/north"
    node = supernode("north", FAR, 9100, tmp_path, place, {"MORE": "1"})
    arguments = node.arguments
    assert arguments[:5] == (*PROGRAM, "supernode")
    assert option(arguments, "--superlink") == "coordinator.example.org:8000"
    assert (option(arguments, "--host"), option(arguments, "--port")) == ("127.0.0.1", "9100")
    assert option(arguments, "--root-certificates") == str(Path.cwd() / place / "ca.crt")
    assert option(arguments, "--auth-supernode-private-key") == str(Path.cwd() / place / "site.key")
    assert "--insecure" not in arguments
    assert (node.name, node.environment["MORE"]) == ("site north", "1")


def test_keys_that_do_not_hold_are_refused_before_anything_starts(
    made: Path, tmp_path: Path
) -> None:
    superlink(Address("10.0.0.5", 8000), tmp_path, tmp_path / "s.db", made)
    with pytest.raises(UsageError, match=r"server\.crt is for .*, not for 10\.0\.0\.6"):
        superlink(Address("10.0.0.6", 8000), tmp_path, tmp_path / "s.db", made)
    (made / "sites/north/site.key").chmod(0o644)
    with pytest.raises(UsageError, match=r"site\.key can be read by others"):
        supernode("north", FAR, 9100, tmp_path, made / "sites/north")
    with pytest.raises(UsageError, match=r"ca\.crt is missing"):
        supernode("south", FAR, 9100, tmp_path, made / "sites/south")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_insecure_on_loopback_says_so(tmp_path: Path, host: str) -> None:
    link = superlink(Address(host, 8000), tmp_path, tmp_path / "s.db")
    node = supernode("north", Address(host, 8000), 9000, tmp_path)
    for command in (link, node):
        assert "--insecure" in command.arguments
        assert command.warning is not None
        assert "insecure: without encryption and without keys" in command.warning
        assert not [word for word in command.arguments if "ssl" in word or "auth" in word]


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.5", "coordinator.example.org", "localhost.example.org"]
)
def test_insecure_elsewhere_is_refused(tmp_path: Path, host: str) -> None:
    address = Address(host, 8000)
    with pytest.raises(UsageError, match=r"the coordinator: .* needs keys; `fedclip keys init`"):
        superlink(address, tmp_path, tmp_path / "s.db")
    with pytest.raises(UsageError, match=r"site north: .* needs keys; `fedclip keys init`"):
        supernode("north", address, 9000, tmp_path)


def test_the_environment_reports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_OIDC_ENABLED", "1")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    monkeypatch.setenv("NO_PROXY", "intranet")
    seen = flower_environment(tmp_path)
    assert {name: seen[name] for name in seen if name.startswith("FLWR_")} == {
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    assert "FORWARDED_ALLOW_IPS" not in seen
    assert seen["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert seen["NO_PROXY"] == "intranet,localhost,127.0.0.1,::1"
    assert seen["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("a.example:80", "a.example", 80), ("[::1]:8000", "::1", 8000), ("10.0.0.1:1", "10.0.0.1", 1)],
)
def test_addresses(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, text)


@pytest.mark.parametrize(
    "text", ["", "a", ":8000", "a:", "a:0", "a:65536", "a:b", "https://a:1", "::1:8000", "a:+1"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="coordinator must be a host and a port"):
        Address.parse(text, "coordinator")


def test_free_ports() -> None:
    import socket

    address = Address("127.0.0.1", free_port())
    assert is_free(address)
    with socket.socket() as listener:
        listener.bind((address.host, address.port))
        listener.listen()
        assert not is_free(address)


# --- endings ---

REFUSED = """ERROR : Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: 2004] Failed to activate SuperNode.
"""
FOREIGN = """ERROR : SSL/TLS handshake error detected.
ERROR : Exit Code: 305
[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate \
(_ssl.c:1006)
"""


@pytest.mark.parametrize(
    ("status", "log", "code", "words", "lasts"),
    [
        (1, REFUSED, 305, "site north was not admitted: its key is not registered", False),
        (1, FOREIGN, 305, "site north: the certificate is not signed by the authority", True),
        (1, "Exit Code: 305\n[SSL: WRONG_VERSION_NUMBER] wrong", 305, "speaks no TLS there", True),
        (1, "Exit Code: 305\nTimed out", 305, "could not connect to the coordinator (Timed", False),
        (1, "Exit Code: 302", 302, "site north: the private key is not one on the curve", True),
        (1, "Exit Code: 606", 606, "have different versions of Flower", True),
        (-9, "SuperNode ID: 1", None, "site north was killed by signal 9", False),
        (0, "terminated gracefully", None, "revoked or the clocks of the two differ", False),
        (0, "Exit Code: 605\nSuperNode terminated gracefully", None, "by a signal", False),
        (-9, "Exit Code: 605\n", None, "was killed by signal 9", False),
        (1, "[Errno 98] error while attempting to bind on address", None, "has its port", True),
        (
            2,
            "usage: flower-supernode\nerror: what",
            None,
            "is it the extra `flower`'s version",
            True,
        ),
        (7, "a\n\nlast words\n", None, "site north ended with status 7 (last words)", False),
        (7, "", None, "site north ended with status 7", False),
    ],
)
def test_endings(status: int, log: str, code: int | None, words: str, lasts: bool) -> None:
    ending = explain("site north", status, log)
    assert (ending.code, ending.lasts) == (code, lasts)
    assert words in ending.message
    assert "north" in ending.message


def test_the_command_to_register_names_the_site() -> None:
    assert "`fedclip keys register north`" in explain("site north", 1, REFUSED).message


def test_codes_are_flowers_own() -> None:
    flower = pytest.importorskip("flwr.supercore.exit.exit_code")
    from fedclip.deploy.flower.exit_reasons import _CODES

    known = {value for value in vars(flower.ExitCode).values() if isinstance(value, int)}
    assert set(_CODES) <= known
    assert flower.ExitCode.SUPERNODE_CONNECTION_ERROR == 305
