"""Certificates and keys: how they are made, read and checked.

TLS shows the sites that they talk to their coordinator; a node's key shows the coordinator which
site talks. Both are elliptic curve P-384; Flower asks for the latter in OpenSSH's format.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip.errors import UsageError, install

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    raise UsageError(
        f"keys and certificates need Flower and what comes with it; {install('flower')}"
    ) from None

if TYPE_CHECKING:
    Key = ec.EllipticCurvePrivateKey

CLOCKS = timedelta(minutes=10)
"""A new certificate counts from so long before, for machines whose clocks run behind."""

LOCAL = ("localhost", "127.0.0.1", "::1")
"""What the coordinator's own processes call it."""


def new_key() -> Key:
    """A fresh private key on the curve P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def private_pem(key: Key) -> bytes:
    """A private key as an unencrypted PEM file."""
    return _private(key, serialization.PrivateFormat.PKCS8)


def private_openssh(key: Key) -> bytes:
    """A private key as `ssh-keygen` writes it, without a passphrase."""
    return _private(key, serialization.PrivateFormat.OpenSSH)


def _private(key: Key, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def public_openssh(key: ec.EllipticCurvePublicKey, comment: str) -> bytes:
    """A public key as one line of OpenSSH, with a comment behind it."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {comment}\n".encode()


def load_pem_public(data: bytes) -> ec.EllipticCurvePublicKey:
    """A public key from PEM, the form in which Flower sends it; raises ValueError otherwise."""
    key = serialization.load_pem_public_key(data)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("not an elliptic curve key")
    return key


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as PEM, the form in which Flower keeps it."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """A public key's fingerprint, as `ssh-keygen -l` shows it."""
    blob = base64.b64decode(public_openssh(key, "").split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as a PEM file."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def authority(key: Key, days: int, now: datetime | None = None) -> x509.Certificate:
    """A self-signed certificate for a private certificate authority.

    Its name holds a part of its key, so that two authorities are never taken for each other.
    """
    name = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    subject = _name(f"fedclip authority {name}")
    builder = _builder(subject, subject, key.public_key(), key.public_key(), days, now)
    usage = dict.fromkeys(_USAGES, False) | {"key_cert_sign": True, "crl_sign": True}
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .sign(key, hashes.SHA384())
    )


def server_certificate(
    key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    days: int,
    by: tuple[x509.Certificate, Key],
    now: datetime | None = None,
) -> x509.Certificate:
    """A server's certificate for these names and addresses, signed by an authority."""
    issuer, issuer_key = by
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    subject = _name("fedclip coordinator")
    builder = _builder(subject, issuer.subject, key, issuer_key.public_key(), days, now)
    usage = dict.fromkeys(_USAGES, False) | {"digital_signature": True}
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .sign(issuer_key, hashes.SHA384())
    )


_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime | None,
) -> x509.CertificateBuilder:
    start = now or datetime.now(UTC)
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCKS)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(by, critical=False)
    )


def _name(words: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, words)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a server's certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName) + [
        str(address) for address in names.get_values_for_type(x509.IPAddress)
    ]


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate of a PEM file; raises UsageError where there is none."""
    return _read(path, x509.load_pem_x509_certificate, "a certificate in PEM format")


def read_private(path: Path) -> Key:
    """The private key of a PEM or an OpenSSH file; raises UsageError where there is none."""

    def load(data: bytes) -> Any:
        openssh = b"BEGIN OPENSSH" in data
        reader = serialization.load_ssh_private_key if openssh else None
        return (reader or serialization.load_pem_private_key)(data, None)

    return _curve(_read(path, load, "a private key without a passphrase"), path)


def read_public(path: Path) -> ec.EllipticCurvePublicKey:
    """The public key of an OpenSSH file (`.pub`); raises UsageError where there is none."""
    return _curve(_read(path, serialization.load_ssh_public_key, "a public OpenSSH key"), path)


def _read(path: Path, load: Callable[[bytes], Any], what: str) -> Any:
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; {what} is expected there") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(f"{path} is not {what}") from None


def _curve(key: Any, path: Path) -> Any:
    curve = getattr(key, "curve", None)
    if isinstance(curve, ec.SECP384R1):
        return key
    got = curve.name if curve else type(key).__name__
    raise UsageError(
        f"{path} must be an elliptic curve key on P-384 (ssh-keygen -t ecdsa -b 384), got {got}"
    )


def dates(certificate: x509.Certificate, path: Path, now: datetime | None = None) -> list[str]:
    """What is wrong with a certificate's dates, in sentences; nothing if all is well."""
    moment = now or datetime.now(UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if moment > end:
        return [f"{path} has expired on {end:%Y-%m-%d %H:%M} UTC"]
    if moment < start:
        return [f"{path} is not valid before {start:%Y-%m-%d %H:%M} UTC; is this clock right?"]
    return []


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def sign(key: Key, data: bytes) -> bytes:
    """An ECDSA signature of bytes, over their SHA-384."""
    return key.sign(data, ec.ECDSA(hashes.SHA384()))


@lru_cache(maxsize=4096)
def signed_by(public: str, data: bytes, signature: bytes) -> bool:
    """Whether bytes were signed by the private half of a public key in OpenSSH's form."""
    try:
        key: Any = serialization.load_ssh_public_key(public.encode())
        if not isinstance(getattr(key, "curve", None), ec.SECP384R1):
            return False
        key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return True


def openssh_fingerprint(public: str) -> str:
    """The fingerprint of a public key in OpenSSH's form; ValueError where it is none."""
    try:
        key: Any = serialization.load_ssh_public_key(public.encode())
    except (UnsupportedAlgorithm, TypeError) as error:
        raise ValueError(str(error)) from None
    return fingerprint(key)
