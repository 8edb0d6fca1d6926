"""Names of sites and classes: what they may be, when two are the same, what files they become.

Sites: one rule for a folder, a column of a data set, a key and a machine's own configuration.
Classes: names that CLIP's tokenizer reads alike are one class, wherever they come from.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import quote

from fedclip.errors import UsageError, shortened

LONGEST_SITE = 63
"""Characters of a site's name."""
LONGEST_FILE = 200
"""Bytes of a file's name that is made of a name; file systems allow 255, and drafts add some."""

_NO_SITE = frozenset('/\\:*?"<>|')  # file systems forbid them
_ASIDE = re.compile(r"\.old-\d+$")  # folders of keys that were moved aside are called so
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?$")  # of Windows
# How CLIP's tokenizer divides a text, before which it is put in lower case.
_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W_]+|(?:[^\w\s]|_)+")


# --- sites ---


def site_name(text: str) -> str:
    """A site's name in Unicode's composed form (NFC); ValueError where it cannot be one."""
    name = unicodedata.normalize("NFC", text)
    strange = sorted({c for c in name if c in _NO_SITE or not c.isprintable()})
    if (
        not 1 <= len(name) <= LONGEST_SITE
        or strange
        or name.strip() != name
        or name[0] in ".-"
        or name[-1] == "."
        or _ASIDE.search(name)
        or len(_quoted(name).encode()) > LONGEST_FILE
    ):
        raise ValueError(
            f"a site's name must be 1 to {LONGEST_SITE} printable characters without "
            f'/ \\ : * ? " < > |, with no blank or dot at either end, no - in front and no '
            f".old-1 behind, got {shortened(text)}"
        )
    return name


def is_site_name(text: str) -> bool:
    """Whether a site may be called so, exactly."""
    try:
        return site_name(text) == text
    except ValueError:
        return False


def site_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """The names of all sites of a federation, checked; `UsageError` begins with `where`.

    Two that differ in case or Unicode form only are refused: as files they may be one.
    """
    try:
        return no_twins(tuple(map(site_name, names)))
    except ValueError as error:
        raise UsageError(f"{where}: {error}; rename it") from None


def no_twins(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names; ValueError where two differ in case or Unicode form only."""
    for first, other in _twins(names, same_file_key):
        raise ValueError(
            f"{shortened(first)} and {shortened(other)} are one name but for case or Unicode form"
        )
    return names


def is_twin(name: str, other: str) -> bool:
    """Whether two different names differ in case or Unicode form only."""
    return name != other and same_file_key(name) == same_file_key(other)


def same_file_key(name: str) -> str:
    """Equal for names that a file system may take for one: it may ignore case and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def file_name(owner: str) -> str:
    """One part of a path for what belongs to `owner`; different owners have different ones.

    Letters and digits of any script and `_ - ~ .` stay. All else is percent-encoded, as are a dot
    at either end and the first letter of what Windows takes for a device; what is too long ends in
    a digest in place of the rest.
    """
    text = _quoted(owner)
    if len(text.encode()) > LONGEST_FILE:
        digest = hashlib.sha256(owner.encode(errors="surrogatepass")).hexdigest()[:16]
        kept = text.encode()[: LONGEST_FILE - 17].decode(errors="ignore")
        text = f"{kept}~{digest}"
    return text


def _quoted(owner: str) -> str:
    text = "".join(c if _stays(c) else quote(c, "", errors="surrogatepass") for c in owner)
    text = re.sub(r"^\.|\.$", "%2E", text)
    return f"%{ord(text[0]):02X}{text[1:]}" if _DEVICES.match(text) else text


def _stays(character: str) -> bool:
    return character in "_-~." or unicodedata.category(character)[0] in "LNM"


# --- classes ---


def clean_class_name(raw: str) -> str:
    """`golden_retriever` -> `golden retriever`: a folder's name as a word of a prompt, in NFC."""
    name = unicodedata.normalize("NFC", " ".join(raw.replace("_", " ").split()) or raw)
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise UsageError(
            f"a class cannot be called {shortened(raw)}: that holds bytes that are not UTF-8, or "
            "control characters; rename it"
        )
    return name


def class_key(name: str) -> str:
    """Equal for names of one class: those whose prompts CLIP's tokenizer reads alike.

    It takes no notice of case, of Unicode's composed and decomposed forms, and of blanks between
    letters, digits and other signs; `_` counts as a blank.
    """
    return text_key(name.replace("_", " "))


def text_key(text: str) -> str:
    """Equal for texts that CLIP's tokenizer reads alike (all of them: it cuts long ones later)."""
    lower = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    apart = "".join(f" {c} " if unicodedata.category(c)[0] == "N" else c for c in lower)
    return " ".join(_PIECES.findall(apart))


def check_classes_differ(names: Sequence[str], where: str) -> None:
    """Refuse two names of the same class where names must be distinct classes."""
    for first, other in _twins(names, class_key):
        raise UsageError(
            f"{where}: {shortened(first)} and {shortened(other)} are the same class: a text "
            "tower reads both names alike; give names that differ in more than case, blanks or "
            "Unicode form"
        )


def each_class_once(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """The classes of several lists, each under the name by which it comes first."""
    found: dict[str, str] = {}
    for names in lists:
        for name in names:
            found.setdefault(class_key(name), name)
    return tuple(found.values())


def _twins(names: Sequence[str], key: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Pairs of names with one key: the first one, and each later one."""
    known: dict[str, str] = {}
    for name in names:
        if key(name) in known:
            yield known[key(name)], name
        known.setdefault(key(name), name)
