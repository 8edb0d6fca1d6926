"""Addresses on a network: what they are, and who answers there."""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from fedclip.config.section import split_address
from fedclip.errors import FedclipError, UsageError

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}$)({_LABEL}\.)*(?!\d+$){_LABEL}")
_BY_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Address:
    """A host, by name or number, and a port from 1 to 65535."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, key: str = "address") -> Address:
        """Read `host:port` or `[::1]:port`; raises UsageError that names the key."""
        try:
            return cls(*split_address(text))
        except ValueError as error:
            raise UsageError(f"{key} {error}") from None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def from_here(self) -> Address:
        """Where this machine itself reaches it: by loopback, if it is all addresses there are."""
        return Address(_BY_LOOPBACK.get(self.host, self.host), self.port)

    @property
    def is_loopback(self) -> bool:
        """Whether nothing but this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class Unreachable(FedclipError):
    """Nobody answers; it may be too early, or the network is down."""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free at this moment; for tests, as another may take it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def is_free(address: Address) -> bool:
    """Whether a process of this machine could listen there."""
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
        except OSError:
            return False
    return True


def client_context(authority: Path) -> ssl.SSLContext:
    """TLS that trusts one authority and nobody else, and checks the host's name."""
    try:
        return ssl.create_default_context(cafile=str(authority))
    except FileNotFoundError:
        raise UsageError(
            f"{authority} is missing; it is the coordinator's ca.crt, which `fedclip keys site` "
            "puts into the folder for each site"
        ) from None
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"{authority} is not a certificate in PEM format ({error})") from None


def check(address: Address, authority: Path | None, timeout: float = 10.0) -> None:
    """Ask a SuperLink whether it is well; with an authority by TLS, else in plain text.

    Raises UsageError for a certificate that does not hold or another protocol, in words that say
    what to do, and Unreachable if nobody answers.
    """
    context = None if authority is None else client_context(authority)
    connection = (
        http.client.HTTPConnection(address.host, address.port, timeout=timeout)
        if context is None
        else http.client.HTTPSConnection(
            address.host, address.port, timeout=timeout, context=context
        )
    )
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except ssl.SSLCertVerificationError as error:
        raise UsageError(f"{address}: {certificate_trouble(error.verify_message)}") from None
    except ssl.SSLError as error:
        raise UsageError(f"{address}: {certificate_trouble(str(error))}") from None
    except (http.client.BadStatusLine, ConnectionResetError) as error:
        if context is not None:
            raise Unreachable(f"{address}: the connection broke off ({error})") from None
        raise UsageError(
            f"{address} does not answer in plain text; it speaks TLS, which needs the "
            "coordinator's ca.crt"
        ) from None
    except OSError as error:
        raise Unreachable(f"{address} does not answer: {error.strerror or error}") from None
    except http.client.HTTPException as error:
        raise Unreachable(f"{address} answers with something else ({error})") from None
    finally:
        connection.close()
    if status != http.client.OK:
        raise Unreachable(f"{address} answers with status {status}")


def answers(address: Address, authority: Path | None, timeout: float = 2.0) -> bool:
    """Whether a SuperLink that can be trusted is there."""
    try:
        check(address, authority, timeout)
    except FedclipError:
        return False
    return True


def certificate_trouble(words: str) -> str:
    """What OpenSSL's words about a handshake mean, and what to do."""
    lower = words.lower()
    if "expired" in lower:
        return (
            "the coordinator's certificate has expired; on its machine `fedclip keys renew` makes "
            "a new one"
        )
    if "not yet valid" in lower:
        return "the coordinator's certificate is not valid yet; one of the two clocks is wrong"
    if "mismatch" in lower or "not valid for" in lower:
        return (
            "the coordinator's certificate is for other names; on its machine "
            f"`fedclip keys renew --host NAME` adds one ({words})"
        )
    if "unable to get local issuer" in lower or "self-signed" in lower or "self signed" in lower:
        return (
            "the certificate is not signed by the authority in this ca.crt: it is another "
            "coordinator, or ca.crt is not the one that it has now"
        )
    if "wrong version number" in lower or "record layer" in lower or "unknown protocol" in lower:
        return "speaks no TLS there; is this the coordinator's port?"
    return f"TLS failed: {words}"


def host_name(text: str) -> str:
    """A host as a certificate has it: an address, or a name in lower case."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if _HOST_NAME.fullmatch(text):
            return text.lower()
    raise UsageError(
        '--host must be a name or an address, such as "coordinator.example.org" or "10.0.0.5", '
        f'without a port, got "{text}"'
    )
