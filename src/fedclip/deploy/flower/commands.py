"""Flower's processes: their command lines and their environment.

A SuperLink is the coordinator's server, a SuperNode a site's client. Both run encrypted and with
keys, or, on one machine alone, without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedclip.deploy.addresses import Address
from fedclip.deploy.keys.folder import (
    CA,
    SERVER,
    SERVER_KEY,
    SITE_KEY,
    check_coordinator,
    check_site,
)
from fedclip.errors import UsageError

INSECURE = (
    "insecure: without encryption and without keys, so only for a try on this machine; "
    "`fedclip keys init` makes the keys for real machines"
)
NODE_WINDOW = 60.0
"""Seconds for which Flower takes a SuperNode for online after its last heartbeat: twice 30."""

ANYWHERE = ("0.0.0.0", "::")
"""To listen there is to listen on all of a machine's addresses."""

LARGEST_MESSAGE = 1_000_000_000
"""Bytes of one message of a site, if nothing less is said: more than any adapter."""


@dataclass(frozen=True)
class Command:
    """A process to start: what it is called, its command line, its environment, a word of warning.

    `authority` is the certificate that shows that the SuperLink is the right one, None if insecure.
    `listens` is where the process answers.
    """

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    authority: Path | None = None
    warning: str | None = None
    listens: Address | None = None


def superlink(
    address: Address,
    home: Path,
    database: Path,
    keys: Path | None = None,
    largest_message: int = LARGEST_MESSAGE,
) -> Command:
    """The coordinator's server.

    `address` is what it listens on; `keys` is the folder that `keys.init` makes, None for the
    insecure mode; `home` is Flower's own folder, `database` keeps registered sites and runs.
    A site that sends more than `largest_message` bytes in one message is cut off.
    Raises UsageError if the keys do not hold, or if none are given where other machines can reach.
    """
    options = ["--host", address.host, "--port", str(address.port), "--database", str(database)]
    options += ["--disable-runtime-dependency-installation"]
    if keys is None:
        _only_loopback(address, "the coordinator")
        options += ["--insecure"]
    else:
        # The SuperLink's own helpers call it by the address it listens on, if it is a certain one.
        check_coordinator(keys, [] if address.host in ANYWHERE else [address.host])
        options += ["--ssl-ca-certfile", _absolute(keys / CA)]
        options += ["--ssl-certfile", _absolute(keys / SERVER)]
        options += ["--ssl-keyfile", _absolute(keys / SERVER_KEY), "--enable-supernode-auth"]
    more = {"FEDCLIP_LARGEST_MESSAGE": str(largest_message)}
    return _command("coordinator", "superlink", address, options, home, keys, more)


def supernode(
    name: str,
    coordinator: Address,
    port: int,
    home: Path,
    keys: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Command:
    """A site's client, called by the site's name.

    `port` is where it talks to its own app, on loopback; `keys` is the folder that `keys.site`
    makes, None for the insecure mode; the app finds `environment` in `os.environ`.
    Raises UsageError if the keys do not hold, or if none are given for a coordinator elsewhere.
    """
    address = Address("127.0.0.1", port)
    options = ["--superlink", str(coordinator), "--host", address.host, "--port", str(port)]
    if keys is None:
        _only_loopback(coordinator, f"site {name}")
        options += ["--insecure"]
    else:
        check_site(keys)
        options += ["--root-certificates", _absolute(keys / CA)]
        options += ["--auth-supernode-private-key", _absolute(keys / SITE_KEY)]
    return _command(f"site {name}", "supernode", address, options, home, keys, environment or {})


def _command(
    name: str,
    what: str,
    listens: Address,
    options: list[str],
    home: Path,
    keys: Path | None,
    more: Mapping[str, str],
) -> Command:
    # -P: what lies in the working folder is not imported.
    program = (sys.executable, "-P", "-m", "fedclip.deploy.flower.process", what)
    return Command(
        name,
        (*program, *options),
        flower_environment(home) | dict(more),
        None if keys is None else keys / CA,
        f"{name}: {INSECURE}" if keys is None else None,
        listens,
    )


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of Flower's processes: a separate home, and telemetry off.

    Variables by which Flower is told otherwise are not handed on.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLWR_") and name != "FORWARDED_ALLOW_IPS"
    }
    here = str(Path(sys.executable).parent)  # flower-superexec is started by its name
    return kept | {
        "PATH": os.pathsep.join([here, kept.get("PATH", os.defpath)]),
        "FLWR_HOME": _absolute(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": ",".join(filter(None, [kept.get("NO_PROXY"), "localhost,127.0.0.1,::1"])),
        "PYTHONUNBUFFERED": "1",
    }


def _only_loopback(address: Address, who: str) -> None:
    if not address.is_loopback:
        raise UsageError(
            f"{who}: {address} can be reached from other machines, which needs keys; `fedclip keys "
            "init` makes them. Without keys only 127.0.0.1, ::1 and localhost are allowed"
        )


def _absolute(path: Path) -> str:
    return str(path.expanduser().absolute())
