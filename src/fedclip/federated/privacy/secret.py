"""Random numbers from a secret: a key of 32 bytes, expanded by ChaCha20 (RFC 8439).

A seed that everybody knows gives no privacy, and a generator that keeps 32 bits of a seed can be
searched. Every draw has a name, and the same name gives the same numbers: what is asked again after
a kill is answered by the same bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedclip.errors import UsageError
from fedclip.files import replace_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY_BYTES = 32
_ONLY_THE_OWNER = 0o600


class Draws:
    """Named draws from one secret; without it none can be told from true randomness."""

    def __init__(self, secret: bytes, *names: str | int) -> None:
        """`names` set these draws apart from others of the same secret."""
        self._key = hmac.digest(secret, _text(names), "sha256")

    def uniforms(self, count: int, *names: str | int) -> NDArray[np.float64]:
        """Numbers `[count]` in [0, 1), of 53 random bits each."""
        words = np.frombuffer(self._stream(8 * count, names), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normals(self, count: int, *names: str | int) -> NDArray[np.float64]:
        """Standard normal numbers `[count]`, by Box and Muller's transform."""
        half = (count + 1) // 2
        first, second = np.split(self.uniforms(2 * half, *names), 2)
        radius = np.sqrt(-2.0 * np.log1p(-first))
        angle = 2.0 * np.pi * second
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def _stream(self, count: int, names: tuple[str | int, ...]) -> bytes:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        # Each name has a key of its own, so a nonce never meets the same key twice.
        key = hmac.digest(self._key, _text(names), "sha256")
        return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(count))


def reproducible_key(seed: int) -> bytes:
    """The key of a run that gives no guarantee: it follows from the seed."""
    return hashlib.sha256(f"fedclip: no guarantee/{seed}".encode()).digest()


def fingerprint(key: bytes) -> str:
    """What tells keys apart without telling anything of them."""
    return hashlib.sha256(b"fedclip: which key/" + key).hexdigest()


def create_key(path: Path) -> bytes:
    """Write a new key of the operating system's randomness that only its owner may read."""
    key = os.urandom(KEY_BYTES)
    try:
        replace_file(path, key, mode=_ONLY_THE_OWNER)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    return key


def read_key(path: Path) -> bytes:
    """Read a key; `UsageError` for a file that is missing, damaged or open to others."""
    mend = "put the run's own key back, or start a new run"
    try:
        key = path.read_bytes() if path.stat().st_size == KEY_BYTES else b""
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; {mend}") from None
    if len(key) != KEY_BYTES:
        raise UsageError(f"{path} is no key of {KEY_BYTES} bytes; {mend}")
    if os.name == "posix" and mode & 0o077:
        raise UsageError(
            f"{path} can be read by others (mode {mode:04o}), who could take the noise away; "
            f"chmod 600 {path} if nobody has, or start a new run"
        )
    return key


def _text(names: tuple[str | int, ...]) -> bytes:
    # Lengths keep ("ab", "c") and ("a", "bc") apart; the separator cannot occur in a number.
    return "/".join(f"{len(str(part))}:{part}" for part in names).encode()
