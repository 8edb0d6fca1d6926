"""The folder of keys: what each file is for, who may have it, and whether it holds.

keys/                    on the coordinator's machine, for nobody else
    ca.crt               the authority's certificate; every site has a copy
    ca.key               the authority's private key; signs new certificates
    server.crt           the coordinator's certificate
    server.key           its private key
    sites/NAME/          what is copied to the site NAME: ca.crt, site.key, site.key.pub, README.txt
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import unquote

from fedclip import files
from fedclip.config.names import file_name, no_twins, site_name
from fedclip.deploy.addresses import host_name
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys.certificates import LOCAL
from fedclip.errors import UsageError

PRIVATE = 0o600
AUTHORITY_DAYS = 3650
"""The authority outlives its certificates, so that renewing them changes nothing at the sites."""

CA, CA_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.crt", "server.key"
SITE_KEY, SITE_PUBLIC = "site.key", "site.key.pub"


def init(
    folder: Path, hosts: Sequence[str], days: int = 365, force: bool = False
) -> dict[str, Any]:
    """Make a new authority and the coordinator's certificate, in a new folder.

    `hosts` are the names and addresses by which sites reach the coordinator; localhost is always
    among them. With `force`, a folder that is there is moved aside, not deleted.
    """
    names = _hosts(hosts)
    _check_days(days)
    ca_key = certificates.new_key()
    ca = certificates.authority(ca_key, max(AUTHORITY_DAYS, days))
    key = certificates.new_key()
    server = certificates.server_certificate(key.public_key(), names, days, (ca, ca_key))
    wanted = {
        CA: certificates.pem(ca),
        CA_KEY: certificates.private_pem(ca_key),
        SERVER: certificates.pem(server),
        SERVER_KEY: certificates.private_pem(key),
    }
    moved = _new_folder(folder, wanted, force)
    return check_coordinator(folder) | ({"moved_aside": str(moved)} if moved else {})


def renew(folder: Path, hosts: Sequence[str] = (), days: int = 365) -> dict[str, Any]:
    """Make the coordinator a new certificate by the same authority; nothing changes at the sites.

    `hosts` are added to those of the old certificate. The private key stays as it is.
    """
    _check_days(days)
    ca, ca_key = _authority(folder)
    left = (ca.not_valid_after_utc - datetime.now(UTC)).days
    if days > left:
        raise UsageError(
            f"--days must be at most {left}, until when the authority is valid, got {days}"
        )
    key = certificates.read_private(folder / SERVER_KEY)
    old = certificates.hosts_of(certificates.read_certificate(folder / SERVER))
    names = _hosts([*old, *hosts])
    server = certificates.server_certificate(key.public_key(), names, days, (ca, ca_key))
    files.replace_file(folder / SERVER, certificates.pem(server))
    return check_coordinator(folder)


def site(
    folder: Path, name: str, public: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Write the folder that is copied to a site, with a new key pair in it.

    With `public`, the site has made its key itself and sent only this public one; then no private
    key is written here.
    """
    name = check_site_name(name)
    _refuse_twin(folder, name)
    ca, _ = _authority(folder)
    wanted = {CA: certificates.pem(ca), "README.txt": _readme(name, public is None)}
    if public is None:
        key = certificates.new_key()
        wanted[SITE_KEY] = certificates.private_openssh(key)
        shown = key.public_key()
    else:
        shown = certificates.read_public(public)
    wanted[SITE_PUBLIC] = certificates.public_openssh(shown, name)
    target = site_folder(folder, name)
    target.parent.mkdir(mode=0o700, exist_ok=True)
    moved = _new_folder(target, wanted, force)
    facts = {
        "site": name,
        "copy_to_the_site": [str(target / file) for file in sorted(wanted)],
        "fingerprint": certificates.fingerprint(shown),
        "never_leave_this_machine": [str(folder / CA_KEY), str(folder / SERVER_KEY)],
        "next": f"copy {target} to the site; a coordinator that starts admits it",
        "if_it_runs_already": f"fedclip keys register {quote(name)} --keys {quote(str(folder))}",
    }
    return facts | ({"moved_aside": str(moved)} if moved else {})


def site_folder(folder: Path, name: str) -> Path:
    """Where the files for a site are."""
    return folder / "sites" / file_name(name)


def site_names(folder: Path) -> list[str]:
    """The sites that have a folder here, in the order of their names."""
    sites = folder / "sites"
    found = [path.name for path in sites.iterdir()] if sites.is_dir() else []
    return sorted(name for name in map(_site_of, found) if name is not None)


def _site_of(file: str) -> str | None:
    """The site whose folder is called so; None for what is no site's, such as one set aside."""
    try:
        name = site_name(unquote(file))
    except ValueError:
        return None
    return name if file_name(name) == unicodedata.normalize("NFC", file) else None


def _refuse_twin(folder: Path, name: str) -> None:
    try:
        no_twins((*(other for other in site_names(folder) if other != name), name))
    except ValueError as error:
        raise UsageError(f"{folder} has keys of such a site already: {error}") from None


def move_aside(folder: Path, name: str) -> Path | None:
    """Move a site's folder to where it is no site's any more; gives that place, if any."""
    place = site_folder(folder, name)
    if not place.is_dir():
        return None
    aside = _aside(place)
    place.rename(aside)
    return aside


def check_site_name(name: str) -> str:
    """The name as it is kept; UsageError unless a site may be called so."""
    try:
        return site_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_coordinator(
    folder: Path, hosts: Sequence[str] = (), now: datetime | None = None
) -> dict[str, Any]:
    """Check all of the coordinator's files; gives what is in them.

    Certificates must be current, the server's signed by this authority and for all of `hosts`, and
    private keys those of the certificates, readable by their owner alone. Raises UsageError with
    everything that is wrong.
    """
    ca = certificates.read_certificate(folder / CA)
    server = certificates.read_certificate(folder / SERVER)
    troubles = certificates.dates(ca, folder / CA, now)
    troubles += certificates.dates(server, folder / SERVER, now)
    if not certificates.issued_by(server, ca):
        troubles.append(f"{folder / SERVER} is not signed by {folder / CA}")
    for name, certificate, needed in ((CA_KEY, ca, False), (SERVER_KEY, server, True)):
        path = folder / name
        if not needed and not path.exists():
            continue  # kept elsewhere: only new certificates and sites need it
        if certificates.read_private(path).public_key() != certificate.public_key():
            troubles.append(f"{path} is not the key of {path.with_suffix('.crt')}")
        troubles += _open_to_others(path)
    known = certificates.hosts_of(server)
    troubles += [
        f"{folder / SERVER} is for {', '.join(known)}, not for {host}; "
        f"`fedclip keys renew --host {host}` adds it"
        for host in map(host_name, hosts)
        if host not in known
    ]
    _raise(troubles)
    end = server.not_valid_after_utc
    return {
        "folder": str(folder),
        "hosts": known,
        "valid_until": f"{end:%Y-%m-%d}",
        "days_left": (end - (now or datetime.now(UTC))).days,
        "authority_valid_until": f"{ca.not_valid_after_utc:%Y-%m-%d}",
        "sites": site_names(folder),
    }


def check_site(folder: Path, now: datetime | None = None) -> dict[str, Any]:
    """Check a site's files: a current authority, and a key pair that belongs together.

    Raises UsageError with everything that is wrong.
    """
    ca = certificates.read_certificate(folder / CA)
    key = certificates.read_private(folder / SITE_KEY)
    troubles = certificates.dates(ca, folder / CA, now) + _open_to_others(folder / SITE_KEY)
    public = folder / SITE_PUBLIC
    if public.exists() and certificates.read_public(public) != key.public_key():
        troubles.append(f"{public} does not belong to {folder / SITE_KEY}")
    _raise(troubles)
    return {
        "folder": str(folder),
        "fingerprint": certificates.fingerprint(key.public_key()),
        "authority_valid_until": f"{ca.not_valid_after_utc:%Y-%m-%d}",
    }


def _authority(folder: Path) -> tuple[Any, Any]:
    if not (folder / CA).exists():
        raise UsageError(
            f"{folder} holds no keys ({CA} is missing); `fedclip keys init {folder} --host NAME` "
            "makes them, --keys names another folder"
        )
    return certificates.read_certificate(folder / CA), certificates.read_private(folder / CA_KEY)


def _new_folder(target: Path, wanted: dict[str, bytes], force: bool) -> Path | None:
    """Write a folder whole; one that is there is moved aside if allowed, and its place given."""
    there = target.is_dir() and any(target.iterdir())
    if there and not force:
        raise UsageError(
            f"{target} is there already; --force moves it aside and makes new keys, after which "
            "the old ones are refused"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.draft_folder(target.parent) as draft:
            for name, data in wanted.items():
                files.replace_file(draft / name, data, PRIVATE if name.endswith(".key") else None)
            draft.chmod(0o700)
            aside = _aside(target) if there else None
            if aside:
                target.rename(aside)
            draft.rename(target)
            files.sync(target.parent)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from None
    return aside


def _aside(target: Path) -> Path:
    number = 1
    while (place := target.with_name(f"{target.name}.old-{number}")).exists():
        number += 1
    return place


def _hosts(hosts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*map(host_name, hosts), *LOCAL]))


def _check_days(days: int) -> None:
    if not 1 <= days <= AUTHORITY_DAYS:
        raise UsageError(f"--days must be between 1 and {AUTHORITY_DAYS}, got {days}")


def _open_to_others(path: Path) -> list[str]:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        return [f"{path} can be read by others (mode {mode:o}); chmod 600 {path}"]
    return []


def _raise(troubles: Sequence[str]) -> None:
    if troubles:
        raise UsageError("\n".join(troubles))


def _readme(name: str, with_key: bool) -> bytes:
    key = (
        f"{SITE_KEY}      this site's private key: for this machine and its owner alone"
        if with_key
        else f"(the private key was made at the site; it goes here as {SITE_KEY}, mode 600)"
    )
    return f"""Keys of the site {name}
{"=" * (13 + len(name) + 4)}

{CA}        the authority that signs the coordinator's certificate; shows that it is the right one
{key}
{SITE_PUBLIC}  its public half; the coordinator has it already

1. Copy this folder to the site by a way that nobody else can read, and delete other copies.
2. Name the folder as `keys` in the site's configuration, beside `name: {name}`.
3. `fedclip keys check FOLDER` says whether the files are whole and current.

Whoever has {SITE_KEY} can take part in this site's name. If it may have been seen, the coordinator
revokes it: fedclip keys revoke {quote(name)}
""".encode()
