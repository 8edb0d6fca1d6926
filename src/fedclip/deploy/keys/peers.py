"""The list of peers: the public key of every site, as each site keeps it for itself.

With masked sums the coordinator hands on the sites' keys of each round. A site takes none that is
not signed by a key of its own list, which nobody but the site can change.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fedclip import files
from fedclip.config.names import file_name, is_site_name, no_twins
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys.folder import SITE_KEY, SITE_PUBLIC, site_folder, site_names
from fedclip.errors import UsageError, shortened

PEERS = "peers.pub"
MOST_BYTES = 4_000_000
LEAST = 3
HOW = "`fedclip keys peers` on the coordinator's machine writes it, and it is copied to every site"


def write_peers(folder: Path) -> list[dict[str, Any]]:
    """Write the list of all sites that have keys into each one's folder; gives its rows."""
    names = site_names(folder)
    if len(names) < LEAST:
        raise UsageError(
            f"{folder} has keys of {len(names)} sites, and masked sums need {LEAST}; "
            "`fedclip keys site NAME` makes some"
        )
    keys = {n: certificates.read_public(site_folder(folder, n) / SITE_PUBLIC) for n in names}
    text = b"".join(certificates.public_openssh(key, file_name(n)) for n, key in keys.items())
    for name in names:
        files.replace_file(site_folder(folder, name) / PEERS, text)
    return [
        {
            "site": name,
            "fingerprint": certificates.fingerprint(key),
            "copy_to_the_site": str(site_folder(folder, name) / PEERS),
        }
        for name, key in keys.items()
    ]


def read_peers(path: Path) -> dict[str, str]:
    """Public keys in OpenSSH's form by the site's name; UsageError for a list that is damaged."""
    try:
        with files.open_regular(path) as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: the list of the sites' keys; {HOW}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    found: dict[str, str] = {}
    lines = data.decode("utf-8", "replace").splitlines() if len(data) <= MOST_BYTES else [""]
    for number, line in enumerate(lines, start=1):
        public, _, comment = line.rpartition(" ")
        name = unquote(comment)
        if not is_site_name(name) or name in found or not _is_key(public):
            raise UsageError(
                f"{path}, line {number} is not one site's public key and name, or a second of one "
                f"site: {shortened(line)}; {HOW}"
            )
        found[name] = public
    try:
        no_twins(tuple(found))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if len(set(found.values())) < len(found):
        raise UsageError(f"{path} has one key for two sites; {HOW}")
    return found


def own_peers(keys: Path, name: str) -> dict[str, str]:
    """The list in a site's folder of keys, in which the site itself must stand."""
    found = read_peers(keys / PEERS)
    own = _text(certificates.read_private(keys / SITE_KEY).public_key())
    if found.get(name) != own:
        raise UsageError(
            f"{keys / PEERS} does not have this site's own key under its name, {name}: it is older "
            f"than the key, or of another federation; {HOW}"
        )
    return found


def check_peers(keys: Path) -> dict[str, Any]:
    """What a site's list says, if it has one; UsageError for one that is not for its key."""
    if not (keys / PEERS).exists():
        return {}
    found = read_peers(keys / PEERS)
    if _text(certificates.read_private(keys / SITE_KEY).public_key()) not in found.values():
        raise UsageError(
            f"{keys / PEERS} does not have the key of {keys / SITE_KEY}: it is older than the key, "
            f"or of another federation; {HOW}"
        )
    shown = {name: certificates.openssh_fingerprint(public) for name, public in found.items()}
    return {"peers": [f"{name} {fingerprint}" for name, fingerprint in shown.items()]}


def all_peers(folder: Path) -> dict[str, str]:
    """The keys of all sites, as the coordinator has them."""
    return {
        name: _text(certificates.read_public(site_folder(folder, name) / SITE_PUBLIC))
        for name in site_names(folder)
    }


def verifier(peers: Mapping[str, str]) -> Callable[[str, bytes, bytes], bool]:
    """Whether `(site, message, signature)` is signed by the site's key in a list."""

    def verify(site: str, message: bytes, signature: bytes) -> bool:
        return site in peers and certificates.signed_by(peers[site], message, signature)

    return verify


def signer(keys: Path) -> Callable[[bytes], bytes]:
    """Sign with a site's private key."""
    key = certificates.read_private(keys / SITE_KEY)
    return lambda message: certificates.sign(key, message)


def _text(key: Any) -> str:
    return certificates.public_openssh(key, "").decode().strip()


def _is_key(text: str) -> bool:
    try:
        base64.b64decode(text.split()[1], validate=True)
        certificates.openssh_fingerprint(text)
    except (ValueError, IndexError):
        return False
    return text.startswith("ecdsa-sha2-nistp384 ")
