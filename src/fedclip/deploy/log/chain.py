"""An append-only log: each line holds the digest of the line before it, and is signed.

A line is `{"body": {...}, "sig": "..."}` in one exact form. Several processes of a node may write
to its log; a line is on the disk before anything is sent that its head stands in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedclip import files
from fedclip.deploy.keys import certificates
from fedclip.deploy.messages.heads import Head
from fedclip.errors import FedclipError, UsageError
from fedclip.records import plain_json

try:
    import fcntl
except ImportError:  # not on Windows: there, a node's processes do not wait for each other
    fcntl = None  # type: ignore[assignment]

LOG_FILE, OWN_KEY = "log.jsonl", "log.key"
FIRST = "0" * 64
"""What the first line has for the digest of the one before it."""
LONGEST = 64_000
OPENED, KEY, MENDED = "opened", "key", "mended"


def log_key(keys: Path | None, name: str, folder: Path) -> certificates.Key:
    """The key that signs a node's log: `name` among its keys, else one that is made in `folder`."""
    if keys is not None:
        return certificates.read_private(keys / name)
    own = folder / OWN_KEY
    if not own.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.replace_file(own, certificates.private_pem(certificates.new_key()), mode=0o600)
    return certificates.read_private(own)


class Log:
    """The log of one node, which is called `who`; a coordinator's is that of one `run`."""

    def __init__(
        self,
        path: Path,
        key: certificates.Key,
        who: str,
        run: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self._key = key
        self._public = certificates.public_openssh(key.public_key(), "").decode().strip()
        self._about = {"who": who, "run": run, "key": self._public}
        self._now = now
        self._size = -1  # of the file when this process last looked
        self._head: Head | None = None

    def add(self, event: str, **facts: Any) -> Head:
        """Append an event; its facts must be plain. It is on the disk when this returns."""
        with self._exclusive():
            return self._append(event, facts)

    @property
    def head(self) -> Head:
        """The log's head as it is on the disk."""
        with self._exclusive():
            assert self._head is not None
            return self._head

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep the node's other processes out, and take up what they have written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self.path.open("a+b") as handle:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX)
                if handle.seek(0, 2) != self._size:
                    self._take_up(handle)
                yield
        except OSError as error:
            raise FedclipError(
                f"{self.path} cannot be written: {error.strerror or error}"
            ) from None

    def _take_up(self, handle: Any) -> None:
        """Read the last line; mend what a kill has left half-written, and begin an empty log."""
        size = handle.tell()
        handle.seek(max(0, size - LONGEST))
        tail = handle.read()
        whole, _, cut = tail.rpartition(b"\n")
        if cut:
            handle.truncate(size - len(cut))
        last = whole.rpartition(b"\n")[2]
        self._size = size - len(cut)
        self._head = None
        if last:
            try:
                body = files.parse_json(last, "the last line")["body"]
                self._head = Head(int(body["n"]), line_digest(last))
            except (UsageError, KeyError, TypeError, ValueError):
                raise UsageError(
                    f"{self.path} is damaged: its last line cannot be read; `fedclip log verify` "
                    "says more. Move the file away to begin a new log"
                ) from None
        elif self._size:
            raise UsageError(f"{self.path} is damaged: it holds no lines; move it away")
        if self._head is None:
            self._append(OPENED, self._about)
        elif self._last_key() != self._public:
            self._append(KEY, self._about)
        if cut:
            self._append(MENDED, {"bytes": len(cut), "sha256": hashlib.sha256(cut).hexdigest()})

    def _last_key(self) -> str:
        keys = [body["key"] for body in bodies(self.path) if body.get("event") in (OPENED, KEY)]
        return str(keys[-1]) if keys else ""

    def _append(self, event: str, facts: Mapping[str, Any]) -> Head:
        n, previous = (0, FIRST) if self._head is None else (self._head.n, self._head.sha256)
        body = plain_json(
            {**facts, "n": n + 1, "time": round(self._now(), 3), "event": event, "prev": previous}
        )
        text = canonical(body)
        signature = base64.b64encode(certificates.sign(self._key, text)).decode()
        line = canonical({"body": body, "sig": signature})
        assert len(line) < LONGEST
        files.append_line(self.path, line + b"\n")
        self._size += len(line) + 1
        self._head = Head(n + 1, line_digest(line))
        return self._head


def canonical(value: Any) -> bytes:
    """JSON in its one form: what else stands in a log was not written by `Log`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def line_digest(line: bytes) -> str:
    """SHA-256 of a line without its end."""
    return hashlib.sha256(line).hexdigest()


def bodies(path: Path) -> Iterator[dict[str, Any]]:
    """What the lines of a log say, unverified; what cannot be read is left out."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and (body := body_of(line)) is not None:
                    yield body


def body_of(line: bytes) -> dict[str, Any] | None:
    """What a line of a log says, unverified; None where it cannot be read."""
    try:
        value = files.parse_json(line, "a line")
        body = value["body"] if isinstance(value, dict) else None
    except (UsageError, KeyError):
        return None
    return body if isinstance(body, dict) else None


def message_facts(key: str, data: bytes) -> dict[str, Any]:
    """The length and digest of a message, under "sent" or "received"."""
    return {"bytes": len(data), key: hashlib.sha256(data).hexdigest()}
