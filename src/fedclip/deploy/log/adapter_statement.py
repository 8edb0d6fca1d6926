"""The statement beside an adapter, and the seal that binds it to the folder's files.

A coordinator and a site each save the adapter, a site's with factors that nobody else has. So each
signs, with its own key, which files belong to the coordinator's statement, and its log's head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedclip import files
from fedclip.deploy.keys import certificates
from fedclip.deploy.log.chain import canonical, line_digest
from fedclip.deploy.log.statement import (
    Digest,
    Signed,
    Signer,
    Strict,
    check_signature,
    read_signed,
    vouch,
)
from fedclip.deploy.messages.heads import Head
from fedclip.errors import UsageError, first_fault
from fedclip.models.adapter_folder import CARD, FILES, STATEMENT


class LogHead(Strict):
    """The head of the holder's log when the folder was sealed."""

    n: int
    sha256: str = Digest


class Seal(Strict):
    """What the holder of a folder signs."""

    holder: str
    statement: str = Digest
    files: dict[str, str]
    log: LogHead


class Sealed(Strict):
    """The whole of the file."""

    signed: dict[str, Any]
    seal: Seal
    signature: str
    key: str


def seal_folder(
    folder: Path, signed: Mapping[str, Any], holder: str, signer: Signer, head: Head
) -> None:
    """Write the statement beside an adapter, bound to the folder's files as they are now."""
    seal = {
        "holder": holder,
        "statement": line_digest(canonical(signed["statement"])),
        "files": _digests(folder),
        "log": asdict(head),
    }
    whole = {
        "signed": dict(signed),
        "seal": seal,
        "signature": signer.sign(seal),
        "key": signer.public,
    }
    text = json.dumps(whole, indent=1, sort_keys=True)
    files.replace_file(folder / STATEMENT, f"{text}\n".encode())


def read_seal(folder: Path) -> tuple[Signed, Sealed]:
    """The statement and the seal of an adapter folder, which both hold; UsageError otherwise."""
    path = folder / STATEMENT
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {STATEMENT}: it is no adapter of a federation over machines, or was "
            "saved by an older version"
        )
    value = files.read_json(path)
    try:
        sealed = Sealed.model_validate(value)
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: {first_fault(error)}") from None
    signed = read_signed(value["signed"], str(path))
    check_signature(value["seal"], sealed.signature, sealed.key, f"{path}: the seal")
    seal, statement = sealed.seal, signed.statement
    if seal.statement != line_digest(canonical(value["signed"]["statement"])):
        raise UsageError(f"{path}: the seal belongs to another statement")
    if sealed.key != signed.key:
        known = [site.key for site in statement.sites if site.name == seal.holder]
        if not known or known[0] not in (None, sealed.key):
            raise UsageError(
                f"{path}: {seal.holder} has sealed this folder with the key "
                f"{certificates.openssh_fingerprint(sealed.key)}, which is not that of a site in "
                "the statement"
            )
    if seal.files != (now := _digests(folder)):
        other = sorted(set(seal.files.items()) ^ set(now.items()))[0][0]
        raise UsageError(
            f"{folder / other} is not the file that was sealed: the statement is of another "
            "adapter, or the file was changed"
        )
    return signed, sealed


def verify_adapter(folder: Path, trusted: Sequence[Path] = ()) -> dict[str, Any]:
    """What the statement of an adapter says, which holds, and is by a trusted key if any is given.

    Raises UsageError that says what does not hold.
    """
    signed, sealed = read_seal(folder)
    if trusted:
        vouch(signed, trusted, str(folder / STATEMENT))
    statement = signed.statement
    sites = [
        site.name + ("" if site.examples is None else f" ({site.examples} examples)")
        for site in statement.sites
    ]
    left_out = sorted({name for one in statement.rounds for name in one.left_out})
    return {
        "adapter": str(folder),
        "run": statement.run,
        "base_model": statement.base.name,
        "base_sha256": statement.base.sha256,
        "strategy": statement.configuration.get("strategy"),
        "sites": sites,
        "rounds": len(statement.rounds),
        "left_out_of_a_round": left_out or "none",
        "epsilon": "none promised" if statement.epsilon is None else statement.epsilon,
        "code": ", ".join(f"{name} {value[:16]}" for name, value in statement.code.items()),
        "saved_by": sealed.seal.holder,
        "signed_by": certificates.openssh_fingerprint(signed.key),
        "trusted": ", ".join(map(str, trusted)) if trusted else "NOT COMPARED with a key (--key)",
    }


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that make the adapter; its card may be written anew."""
    names = [name for name in FILES if name not in (CARD, STATEMENT)]
    return {name: files.file_sha256(folder / name) for name in names if (folder / name).is_file()}
