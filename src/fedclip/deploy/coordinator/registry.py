"""Which sites a running coordinator admits: one key for each name.

The SuperLink keeps this in its database. A site is found there by its key, and by its name.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from fedclip.deploy.coordinator.control import Control, ControlRefused, Node
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys.folder import (
    SITE_PUBLIC,
    check_site_name,
    move_aside,
    site_folder,
    site_names,
)
from fedclip.errors import UsageError

GONE = "unregistered"


def register(control: Control, keys: Path, name: str) -> dict[str, Any]:
    """Admit a site with the key in its folder; any other key of that name is sent away.

    Nothing happens if it is admitted already. A key that was revoked stays so.
    """
    name = check_site_name(name)
    public = _public(keys, name)
    node_id, before = None, control.nodes()
    for node in before:
        if node.public_key == public and node.status != GONE:
            node_id = node.node_id
    news = node_id is None
    if news:
        try:
            node_id = control.register(public, name)
        except ControlRefused as error:
            if not any(node.public_key == public for node in before):
                raise
            raise UsageError(
                f"the key of site {name} has been revoked; `{_make_key(name, keys)} --force` "
                f"makes a new one, which must be copied to the site ({error})"
            ) from None
    for node in before:
        if node.name == name and node.public_key != public and node.status != GONE:
            control.unregister(node.node_id)
    return {"site": name, "registered": "now" if news else "already", "node_id": str(node_id)}


def register_all(control: Control, keys: Path) -> list[str]:
    """Admit all sites that have a folder; gives, in words, which were not and why."""
    refused = []
    for name in site_names(keys):
        try:
            register(control, keys, name)
        except UsageError as error:
            refused.append(str(error))
    return refused


def revoke(control: Control, keys: Path, name: str) -> dict[str, Any]:
    """Send a site away, for good: its key is never admitted again.

    Its folder is moved aside, so that a coordinator with a new database does not admit it either.
    """
    name = check_site_name(name)
    path = site_folder(keys, name) / SITE_PUBLIC
    public = _public(keys, name) if path.exists() else b""
    found = [
        node
        for node in control.nodes()
        if node.status != GONE and (node.name == name or node.public_key == public)
    ]
    if not found:
        raise UsageError(f"site {name} is not registered, so there is nothing to revoke")
    for node in found:
        control.unregister(node.node_id)
    facts = {"site": name, "revoked": len(found)}
    try:
        aside = move_aside(keys, name)
    except OSError as error:
        raise UsageError(
            f"site {name} is sent away, but {path.parent} cannot be moved aside "
            f"({error.strerror}); remove it, or the next coordinator admits its key"
        ) from None
    return facts | ({"moved_aside": str(aside)} if aside else {})


def sites(control: Control, keys: Path) -> list[dict[str, Any]]:
    """Every site that has a folder or is registered, with its status and its key's fingerprint.

    The status is online, offline, registered (never seen yet), unregistered, or unknown to the
    coordinator.
    """
    nodes = control.nodes()
    rows = [_row(node.name, node.status, node.public_key, node) for node in nodes]
    seen = {node.public_key for node in nodes}
    for name in site_names(keys):
        public = _public(keys, name)
        if public not in seen:
            rows.append(_row(name, "unknown to the coordinator", public))
    return sorted(rows, key=lambda row: (row["site"], row["status"]))


def _row(name: str, status: str, public: bytes, node: Node | None = None) -> dict[str, Any]:
    key = certificates.fingerprint(certificates.load_pem_public(public)) if public else None
    return {
        "site": name,
        "status": status,
        "fingerprint": key,
        "node_id": None if node is None else str(node.node_id),
    }


def _make_key(name: str, keys: Path) -> str:
    """The command that makes a site's key, as it can be typed."""
    folder = "" if keys == Path("keys") else f" --keys {quote(str(keys))}"
    return f"fedclip keys site {quote(name)}{folder}"


def _public(keys: Path, name: str) -> bytes:
    path = site_folder(keys, name) / SITE_PUBLIC
    if not path.exists():
        known = ", ".join(site_names(keys)) or "none"
        raise UsageError(
            f"site {name} has no key in {keys} (there are: {known}); "
            f"`{_make_key(name, keys)}` makes one"
        )
    return certificates.public_pem(certificates.read_public(path))
