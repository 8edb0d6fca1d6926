"""The signed statement of a federation: what its adapter was made of, and what is promised.

The coordinator signs it with its key; its certificate shows whose key that is. It goes to every
site with the result, and lies beside the adapter (`adapter_statement`).
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from cryptography.x509 import load_pem_x509_certificate
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedclip.deploy.app_code import source_sha256
from fedclip.deploy.job import APP, EPSILON
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys.folder import SERVER, SERVER_KEY, SITE_PUBLIC, site_folder
from fedclip.deploy.log.chain import canonical, log_key
from fedclip.errors import UsageError, first_fault, shortened
from fedclip.experiment.identity import PACKAGES

Digest = Field(pattern=r"^[0-9a-f]{64}$")


class Strict(BaseModel):
    """A record that another machine may have written: these keys alone, of these types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Site(Strict):
    """A site that took part; its number of examples is null where it was not told."""

    name: str
    examples: int | None
    key: str | None


class Round(Strict):
    """A round: the digest of the state that it began with, and who was left out."""

    round: int = Field(ge=1)
    state: str = Digest
    left_out: list[str]


class Base(Strict):
    """The base model."""

    name: str
    sha256: str = Digest


class Statement(Strict):
    """What a federation's adapter was made of."""

    format: Literal[1]
    run: str
    time: float
    job: str
    base: Base
    app: str = Digest
    configuration: dict[str, Any]
    sites: list[Site]
    epsilon: float | None
    rounds: list[Round]
    code: dict[str, str]
    state_sha256: str = Digest


class Signed(Strict):
    """A statement as it is written: signed by `key`, whose certificate may be there as well."""

    statement: Statement
    signature: str
    key: str
    certificate: str | None


@dataclass(frozen=True)
class Signer:
    """Whoever signs: a private key, its public half as text, and a certificate of it."""

    key: certificates.Key
    certificate: str | None = None

    @property
    def public(self) -> str:
        """The public key, as a line of OpenSSH."""
        return public_text(self.key.public_key())

    @classmethod
    def coordinator(cls, keys: Path | None, folder: Path) -> Signer:
        """The coordinator's, by its folder of keys, or a key that is made in `folder`."""
        key = log_key(keys, SERVER_KEY, folder)
        if keys is None:
            return cls(key)
        return cls(key, certificates.pem(certificates.read_certificate(keys / SERVER)).decode())

    def sign(self, value: Mapping[str, Any]) -> str:
        """The signature of a value in its one form."""
        return base64.b64encode(certificates.sign(self.key, canonical(value))).decode()


def make_statement(
    *,
    run: str,
    digest: str,
    job: Mapping[str, Any],
    base: str,
    sites: Mapping[str, int],
    keys: Path | None,
    log: Iterable[Mapping[str, Any]],
    state_sha256: str,
) -> dict[str, Any]:
    """The statement of a run that has come to its end; `log` is what its coordinator's log says.

    `sites` are their numbers of examples, 0 where nobody was told.
    """
    return {
        "format": 1,
        "run": run,
        "time": round(time.time(), 3),
        "job": digest,
        "base": {"name": job["config"]["model"]["model_name"], "sha256": base},
        "app": job[APP],
        "configuration": {k: v for k, v in job.items() if k not in (APP, EPSILON)},
        "sites": [
            {"name": name, "examples": count or None, "key": _site_key(keys, name)}
            for name, count in sorted(sites.items())
        ],
        "epsilon": job[EPSILON],
        "rounds": _rounds(log),
        "code": {**{name: version(name) for name in PACKAGES}, "source_sha256": source_sha256()},
        "state_sha256": state_sha256,
    }


def sign_statement(statement: Mapping[str, Any], signer: Signer) -> dict[str, Any]:
    """The statement with its signature, as it goes to sites and into files."""
    return {
        "statement": dict(statement),
        "signature": signer.sign(statement),
        "key": signer.public,
        "certificate": signer.certificate,
    }


def read_signed(value: Any, where: str) -> Signed:
    """A signed statement that holds for itself, else UsageError; whose it is, `vouch` says."""
    try:
        signed = Signed.model_validate(value)
    except ValidationError as error:
        raise UsageError(f"{where} is damaged: {first_fault(error)}") from None
    check_signature(value["statement"], signed.signature, signed.key, f"{where}: the statement")
    if signed.certificate is not None:
        certificate = _certificate(signed.certificate.encode(), where)
        text = certificates.pem(certificate).decode()
        if text != signed.certificate or public_text(certificate.public_key()) != signed.key:
            raise UsageError(f"{where}: the certificate is not that of the key that has signed")
    return signed


def check_signature(value: Any, signature: str, key: str, what: str) -> None:
    """Raise UsageError unless a key has signed a value, and both are in their one form."""
    try:
        data = base64.b64decode(signature, validate=True)
    except ValueError:
        data = b""
    fits = base64.b64encode(data).decode() == signature and key == key.strip()
    if not fits or not certificates.signed_by(key, canonical(value), data):
        raise UsageError(f"{what} is not what was signed: it was changed, or its signature was")


def vouch(signed: Signed, trusted: Sequence[Path], where: str) -> None:
    """Raise UsageError unless one of the files vouches for the signer.

    A file is a public key in OpenSSH's form, or a certificate: the signer's, or an authority's that
    has issued the signer's.
    """
    for path in trusted:
        known = _known(path)
        if isinstance(known, str):
            if known == signed.key:
                return
            continue
        if public_text(known.public_key()) == signed.key:
            return
        if signed.certificate is not None:
            theirs = _certificate(signed.certificate.encode(), where)
            if certificates.issued_by(theirs, known):
                return
    raise UsageError(
        f"{where} is signed by {certificates.openssh_fingerprint(signed.key)}, for which none of "
        f"{', '.join(map(str, trusted))} vouches"
    )


def public_text(key: Any) -> str:
    """A public key as a line of OpenSSH without a comment."""
    return certificates.public_openssh(key, "").decode().strip()


def _known(path: Path) -> Any:
    """The public key in a file as text, or its certificate."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    if b"BEGIN CERTIFICATE" in data:
        return _certificate(data, str(path))
    return public_text(certificates.read_public(path))


def _certificate(data: bytes, where: str) -> Any:
    try:
        return load_pem_x509_certificate(data)
    except ValueError:
        raise UsageError(f"{where}: the certificate cannot be read") from None


def _site_key(keys: Path | None, name: str) -> str | None:
    path = None if keys is None else site_folder(keys, name) / SITE_PUBLIC
    return public_text(certificates.read_public(path)) if path and path.exists() else None


def _rounds(log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rounds by a log: of one that was begun again, the last time."""
    found: dict[int, dict[str, Any]] = {}
    for body in log:
        number: Any = body.get("round")
        if body.get("event") == "round" and body.get("purpose") == "client":
            found[number] = {"round": number, "state": body["state"], "left_out": []}
        elif body.get("event") == "left_out" and number in found:
            left_out = found[number]["left_out"]
            left_out += [body["site"]] if body["site"] not in left_out else []
        elif body.get("event") == "answered" and number in found:  # in another attempt
            rest = [name for name in found[number]["left_out"] if name != body["site"]]
            found[number]["left_out"] = rest
    return [found[number] for number in sorted(found)]


def require_about(key: str, found: object, expected: object, where: str) -> None:
    """Raise UsageError where a statement is about something else."""
    if found != expected:
        raise UsageError(
            f"{where} is of something else: its {key} is {shortened(found, 80)}, here it is "
            f"{shortened(expected, 80)}"
        )
