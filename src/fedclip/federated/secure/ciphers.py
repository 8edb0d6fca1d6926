"""X25519, HKDF, ChaCha20 and ChaCha20-Poly1305, by the package `cryptography`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedclip.errors import UsageError, install

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    from cryptography.hazmat.primitives.hashes import SHA256, Hash
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError:
    raise UsageError(
        f"secure.aggregation: masked needs the package cryptography; {install('privacy')}"
    ) from None

if TYPE_CHECKING:
    from numpy.typing import NDArray

PUBLIC_BYTES, TAG_BYTES = 32, 16
_BLOCK = 1 << 16  # words: keystream, zeros and sum stay in the cache
_ZEROS = bytes(4 * _BLOCK)


def packed(*parts: str | int | bytes | Sequence[str]) -> bytes:
    """Parts as bytes that no other parts give: each with its kind and its length in front."""
    out = []
    for part in parts:
        if isinstance(part, str | int | bytes):
            data = part if isinstance(part, bytes) else str(part).encode()
            kind = type(part).__name__[0]
        else:
            data, kind = packed(*part), "l"
        out.append(f"{kind}{len(data)}:".encode() + data)
    return b"".join(out)


def digest(*parts: str | int | bytes | Sequence[str]) -> bytes:
    """SHA-256 of packed parts."""
    found = Hash(SHA256())
    found.update(packed(*parts))
    return found.finalize()


class KeyPair:
    """An X25519 key, from its 32 secret bytes."""

    def __init__(self, secret: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()

    def agreed(self, public: bytes) -> bytes:
        """The secret shared with another; ValueError for a public key that gives none."""
        return self._key.exchange(X25519PublicKey.from_public_bytes(public))


def derive(secret: bytes, *purpose: str | int | bytes | Sequence[str]) -> bytes:
    """A key of 32 bytes for one purpose."""
    return HKDF(SHA256(), 32, None, packed(*purpose)).derive(secret)


def seal(key: bytes, text: bytes, bound: bytes) -> bytes:
    """Encrypts with a key that is used once."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, bound)


def unseal(key: bytes, sealed: bytes, bound: bytes) -> bytes:
    """Decrypts; ValueError where a bit is not as it was sealed."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, bound)
    except InvalidTag:
        raise ValueError("the seal is broken") from None


def add_stream(total: NDArray[np.uint32], key: bytes, subtract: bool = False) -> None:
    """Adds the keystream of a key that is used once to words `[n]`, in place, modulo 2^32."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    buffer = bytearray(4 * _BLOCK)
    words = np.frombuffer(buffer, dtype="<u4")
    combine = np.subtract if subtract else np.add
    for start in range(0, len(total), _BLOCK):
        part = total[start : start + _BLOCK]
        stream.update_into(memoryview(_ZEROS)[: 4 * len(part)], buffer)
        combine(part, words[: len(part)], out=part)
