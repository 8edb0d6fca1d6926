"""Why a process of Flower's has ended, read from its last words.

Flower's own exit codes do not reach the system, where they are 0 or 1; they stand in the log as
`Exit Code: 305`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from shlex import quote

from fedclip.deploy.addresses import certificate_trouble


@dataclass(frozen=True)
class Ending:
    """How a process ended: Flower's code if it gave one, in words, and whether that will last.

    What lasts needs somebody's hand; the rest is worth another try.
    """

    code: int | None
    message: str
    lasts: bool = False


_CODES = {
    104: "Flower does not take these options; is it the extra `flower`'s version?",
    105: "the database is of another version of Flower; move it away to begin a new one",
    302: "the private key is not one on the curve P-384; `fedclip keys site` makes it",
    303: "a key was given, but TLS is off",
    600: "the address is not a host and a port",
    603: "a certificate was given, but TLS is off",
    604: "a certificate or a key is not where it should be",
    605: "the coordinator's certificate cannot be used; `fedclip keys check` says why",
    606: "site and coordinator have different versions of Flower; install the same fedclip, with "
    "its extra `flower`",
}

_TLS = re.compile(r"\[SSL[^\]]*\]|CERTIFICATE_VERIFY_FAILED|SSL/TLS handshake error")
_WORDS = re.compile(r"certificate verify failed: ([^(\n]*)|\[SSL: ([A-Z_]+)\]")
_BUSY = re.compile(r"address already in use|while attempting to bind", re.IGNORECASE)

NOT_ADMITTED = (
    "was not admitted: its key is not registered with this coordinator (`fedclip keys register "
    "NAME` there), or it was stopped hard and still counts as online for a minute"
)
SENT_AWAY = (
    "ended without an error: by a signal, or sent away by the coordinator, because its key has "
    "been revoked or the clocks of the two differ by more than five minutes"
)


def explain(name: str, status: int, log: str) -> Ending:
    """Why the process called `name` ended with this status, its log being `log`.

    `status` is as subprocess has it: negative for a signal.
    """
    # The apps that it had started write into the same log, and have codes of their own.
    found = re.findall(r"Exit Code: (\d+)", log) if status == 1 else []
    code = int(found[-1]) if found else None
    short = name.removeprefix("site ")
    if status < 0:
        return Ending(code, f"{name} was killed by signal {-status}")
    if code == 305 and _TLS.search(log):
        found_words = _WORDS.findall(log)
        words = " ".join(filter(None, found_words[-1])).strip() if found_words else "handshake"
        return Ending(code, f"{name}: {certificate_trouble(words.replace('_', ' '))}", lasts=True)
    if code == 305 and "activate SuperNode" in log:
        return Ending(code, f"{name} {NOT_ADMITTED.replace('NAME', quote(short))}")
    if code == 305:
        return Ending(code, f"{name} could not connect to the coordinator{_last_words(log)}")
    if code in _CODES:
        return Ending(code, f"{name}: {_CODES[code]}", lasts=True)
    if _BUSY.search(log):
        return Ending(code, f"{name}: another process has its port", lasts=True)
    if status == 2 and "usage:" in log:
        return Ending(code, f"{name}: {_CODES[104]}{_last_words(log)}", lasts=True)
    if status == 0:
        return Ending(code, f"{name} {SENT_AWAY if name != short else 'ended without an error'}")
    return Ending(code, f"{name} ended with status {status}{_last_words(log)}")


def _last_words(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f" ({lines[-1][:200]})" if lines else ""
