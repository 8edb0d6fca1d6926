"""Digest of the Flower app: the code that a coordinator sends and that runs at every site."""

from __future__ import annotations

import hashlib
import io
import json
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

APP = Path(__file__).parent / "app"
PROJECT = "pyproject.toml"
_MANIFEST = ".info/CONTENT"
LARGEST = 20_000_000
"""Bytes of all files of a bundle, unpacked; fedclip's has 2 kB."""


def installed_app() -> str:
    """Digest of the app of the fedclip that is installed here."""
    paths = [APP / PROJECT, *APP.glob("*/*.py")]
    return _digest({path.relative_to(APP).as_posix(): path.read_bytes() for path in paths})


def source_sha256() -> str:
    """Digest of all of fedclip's source that is installed here."""
    root = APP.parents[1]
    return _digest({p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.py")})


def bundle_digest(bundle: bytes) -> str | None:
    """Digest of the files in a Flower app bundle (a zip); None if it is damaged or too large.

    It is of names and contents, as another version of zlib packs other bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename != _MANIFEST]
            names = [entry.filename for entry in entries]
            if len(set(names)) < len(names) or sum(e.file_size for e in entries) > LARGEST:
                return None
            return _digest({name: archive.read(name) for name in names})
    except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, OSError, EOFError):
        return None


def _digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 of files by name; the project's table without its layout, which Flower changes."""
    found = dict(files)
    if PROJECT in found:
        table = tomllib.loads(found[PROJECT].decode())
        found[PROJECT] = json.dumps(table, sort_keys=True, default=str).encode()
    lines = [f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(found.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
