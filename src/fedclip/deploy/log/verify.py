"""Verification of logs: each for itself, and all that are at hand against each other.

A log alone shows that nothing in it was changed. That its end was not cut off, only another node
can tell, whose log holds the heads that came with the messages.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedclip import files
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys.folder import SERVER, SITE_PUBLIC, site_folder
from fedclip.deploy.log.adapter_statement import read_seal
from fedclip.deploy.log.chain import FIRST, KEY, OPENED, canonical, line_digest
from fedclip.deploy.log.places import log_in
from fedclip.deploy.messages.envelope import BadMessage
from fedclip.deploy.messages.heads import Head
from fedclip.errors import UsageError, one_line, shortened
from fedclip.models.adapter_folder import STATEMENT

COORDINATOR = "coordinator"
ADAPTER = "adapter"
MOST_BYTES = 1 << 30


@dataclass
class Verified:
    """A log that holds for itself: its lines' digests, what they say, and who wrote it.

    `confirmed` is the number of its lines that other nodes have seen the end of, by their name.
    """

    path: Path
    digests: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    cut: int = 0  # bytes of a half-written last line
    confirmed: dict[str, int] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """The node's name; a coordinator's has its run behind it."""
        about = self.bodies[0]
        run = about.get("run")
        return str(about.get("who")) + (f" of {run}" if run else "")

    def cited(self) -> Iterator[tuple[int, str, Head]]:
        """Lines that tell another node's head: their number, that node, and the head."""
        run = self.bodies[0].get("run")
        for number, body in enumerate(self.bodies, start=1):
            head = Head.of(body)
            if head is not None:
                peer = body.get("site") if run else f"{COORDINATOR} of {body.get('run')}"
                yield number, str(peer), head


def read_log(path: Path) -> Verified:
    """A log whose every line is as it was written; raises UsageError that names the first other."""
    try:
        with files.open_regular(path) as file:
            data = file.read(MOST_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    lines = data.split(b"\n")
    found = Verified(path, cut=len(lines.pop()))
    if not lines:
        raise UsageError(f"{path} holds no line of a log")
    previous, key = FIRST, ""
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        body, key = _line(line, number, previous, key, where)
        if key not in found.keys:
            found.keys.append(key)
        found.bodies.append(body)
        previous = line_digest(line)
        found.digests.append(previous)
    return found


def _line(
    line: bytes, number: int, previous: str, key: str, where: str
) -> tuple[dict[str, Any], str]:
    """What a line says, and the key from then on; UsageError unless it follows the one before."""
    value = files.parse_json(line, where)
    if not isinstance(value, dict) or value.keys() != {"body", "sig"} or canonical(value) != line:
        raise UsageError(f"{where} is damaged: it is not in the form in which lines are written")
    body, signature = value["body"], value["sig"]
    if not isinstance(body, dict) or not isinstance(signature, str):
        raise UsageError(f"{where} is damaged: it is not in the form in which lines are written")
    if number == 1 and (body.get("n") != 1 or body.get("event") != OPENED):
        raise UsageError(f"{where} is not the first of a log: the log's beginning is missing")
    if type(body.get("n")) is not int or body["n"] != number:
        raise UsageError(
            f"{where} is number {shortened(body.get('n'))} of the log: lines before it were "
            "removed, put in or moved"
        )
    if body.get("prev") != previous:
        raise UsageError(f"{where} does not follow the line before it: one of the two was changed")
    if body.get("event") in (OPENED, KEY):
        key = str(body.get("key"))
    if not certificates.signed_by(key, canonical(body), _signature(signature, where)):
        raise UsageError(f"{where} is not signed by the log's key: it was changed")
    try:
        Head.of(body)
    except BadMessage as error:
        raise UsageError(f"{where}: {error}") from None
    return body, key


def _signature(text: str, where: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        data = b""
    if base64.b64encode(data).decode() != text:
        raise UsageError(f"{where} is damaged: its signature cannot be read")
    return data


def compare(logs: Sequence[Verified], seals: Mapping[str, Sequence[Head]] | None = None) -> None:
    """Hold logs against each other, and note what is confirmed; UsageError for what does not fit.

    `seals` are heads that are known by other ways, by the node's name.
    """
    by_name: dict[str, Verified] = {}
    for log in logs:
        if log.who in by_name:
            raise UsageError(f"{by_name[log.who].path} and {log.path} are both logs of {log.who}")
        by_name[log.who] = log
    troubles = []
    for log in logs:
        for number, peer, head in log.cited():
            if (other := by_name.get(peer)) is not None:
                troubles += _confirm(other, head, log.who, f"line {number} of {log.path}")
    for name, heads in (seals or {}).items():
        for head in heads:
            if (other := by_name.get(name)) is not None:
                troubles += _confirm(other, head, "the adapter's seal", "the adapter's seal")
    troubles += _strange_messages(by_name)
    if troubles:
        raise UsageError("\n".join(map(one_line, troubles[:10])))


def _confirm(log: Verified, head: Head, by: str, where: str) -> list[str]:
    """Why a log does not have a head that another node has seen; notes it where it does."""
    if head.n > len(log.digests):
        return [
            f"{log.path} ends at line {len(log.digests)}, but {where} has seen line {head.n}: its "
            "end was cut off"
        ]
    if log.digests[head.n - 1] != head.sha256:
        return [
            f"{log.path}, line {head.n} is not the line that {where} has seen: it was rewritten"
        ]
    log.confirmed[by] = max(log.confirmed.get(by, 0), head.n)
    return []


def _strange_messages(logs: Mapping[str, Verified]) -> list[str]:
    """Messages that one side says it has received, and the other has not sent."""
    troubles = []
    for log in logs.values():
        run = log.bodies[0].get("run")
        for number, body in enumerate(log.bodies, start=1):
            received = body.get("received")
            if received is None:
                continue
            peer = str(body.get("site")) if run else f"{COORDINATOR} of {body.get('run')}"
            other = logs.get(peer)
            if other is not None and received not in {line.get("sent") for line in other.bodies}:
                troubles.append(
                    f"{log.path}, line {number}: a message has come from {peer} that {other.path} "
                    "does not tell of"
                )
    return troubles


def told(log: Verified) -> dict[str, Any]:
    """What is known of a log after `compare`, for a person."""
    most, total = max(log.confirmed.values(), default=0), len(log.digests)
    by = ", ".join(sorted(log.confirmed)) or "nobody here"
    note = "nothing is missing" if most == total else (
        f"lines {most + 1} to {total} are confirmed by nobody here: more may be missing after them"
        if most
        else "a cut end would not be seen: verify it together with the other side's log"
    )  # fmt: skip
    if log.cut:
        note += f"; {log.cut} bytes of a half-written line at the end"
    return {
        "log": log.who,
        "lines": total,
        "confirmed": f"{most} confirmed by {by}",
        "keys": ", ".join(map(certificates.openssh_fingerprint, log.keys)),
        "note": note,
    }


def verify_folders(folders: Sequence[Path], keys: Path | None = None) -> list[dict[str, Any]]:
    """What is known of the logs in these folders; UsageError for all that does not hold."""
    paths = dict.fromkeys(log_in(folder).resolve() for folder in folders)
    logs = [read_log(path) for path in paths]
    if keys is not None:
        for log in logs:
            _check_keys(log, keys)
    compare(logs, {log.who: heads for log in logs if (heads := _sealed(log))})
    return [told(log) for log in logs]


def _sealed(log: Verified) -> list[Head]:
    """The head in the seal beside the node's adapter, which shows that the log's end is there."""
    parent = log.path.parent
    places = (parent / ADAPTER, parent.parent / ADAPTER)
    folder = next((place for place in places if (place / STATEMENT).is_file()), None)
    if folder is None:
        return []
    _, sealed = read_seal(folder)
    if sealed.key not in log.keys:
        raise UsageError(f"{folder / STATEMENT} is not sealed with a key of {log.path}")
    return [Head(sealed.seal.log.n, sealed.seal.log.sha256)]


def _check_keys(log: Verified, keys: Path) -> None:
    """Raise unless a log is signed by the key that its node has in the coordinator's folder."""
    about = log.bodies[0]
    if about.get("run"):
        certificate = certificates.read_certificate(keys / SERVER)
        known = certificates.public_openssh(certificate.public_key(), "").decode().strip()  # type: ignore[arg-type]
    else:
        path = site_folder(keys, str(about.get("who"))) / SITE_PUBLIC
        known = certificates.public_openssh(certificates.read_public(path), "").decode().strip()
    if log.keys != [known]:
        shown = ", ".join(map(certificates.openssh_fingerprint, log.keys))
        raise UsageError(
            f"{log.path} is signed by {shown}, which is not the key of {log.who} in {keys} "
            f"({certificates.openssh_fingerprint(known)})"
        )
