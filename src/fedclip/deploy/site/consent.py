"""Consent of a site: which runs it takes part in, compared before an image is read.

With `policy.approved` a run's base, code and recipe must be those of an approval in that file
(`fedclip site approve`). Without it the first job of a run is pinned, and may not change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedclip import files
from fedclip.deploy.job import APP
from fedclip.deploy.messages.requests import Ticket
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.policy import Against
from fedclip.errors import UsageError, first_fault

ASKED, PINNED, RUNNING = "asked.json", "pinned.json", "app.json"
"""In the site's state: the last job that was asked for, those of known runs, the app that runs."""
PINS = 20
"""Runs whose first job is remembered."""
LARGEST_JOB = 10_000_000
_SHOWN = 5
_DIGEST = re.compile(r"[0-9a-f]{64}")
HOW = "`fedclip site approve --config FILE` at the site shows what is asked for and approves it"


@dataclass(frozen=True)
class Terms:
    """What a run asks a site for: a base model, the code of the app, and the recipe (its job)."""

    run: str
    base: str
    app: str
    job: Mapping[str, Any]

    @classmethod
    def of(cls, ticket: Ticket, job: Mapping[str, Any], state: Path) -> Terms:
        """The terms of a job; its app is the one that Flower's node has started, if any."""
        told, running = str(job.get(APP)), state / RUNNING
        if not _DIGEST.fullmatch(told) or not _DIGEST.fullmatch(ticket.base):
            raise Against("the job does not name its base model and its code by their SHA-256")
        if len(json.dumps(job)) > LARGEST_JOB:
            raise Against(f"the job has more than {LARGEST_JOB} characters")
        if running.exists():
            actual = str(files.read_json(running).get("sha256"))
            if actual != told:
                raise Against(
                    f"the code that was sent ({actual[:16]}) is not the one that the job names "
                    f"({told[:16]})"
                )
            told = actual
        return cls(ticket.run, ticket.base, told, {k: v for k, v in job.items() if k != APP})

    def facts(self) -> dict[str, str]:
        """Every term by name, as text."""
        whole = {"base model (sha256)": self.base, "code of the app (sha256)": self.app}
        return whole | dict(_flat(self.job))

    def differences(self, asked: Terms) -> list[str]:
        """How other terms differ from these, one sentence for each."""
        mine, theirs = self.facts(), asked.facts()
        return [
            f"{name.removeprefix('config.')}: approved {_short(mine.get(name))}, asked for "
            f"{_short(theirs.get(name))}"
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        ]


class _Terms(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    run: str
    base: str
    app: str
    job: dict[str, Any]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    terms: list[_Terms]


def read_terms(path: Path) -> list[Terms]:
    """The terms in a file; none where there is no file, UsageError for a damaged one."""
    if not path.exists():
        return []
    try:
        found = _File.model_validate(files.read_json(path))
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: {first_fault(error)}; put it back") from None
    return [Terms(**dict(one)) for one in found.terms]


def write_terms(path: Path, terms: list[Terms]) -> None:
    """Write a file of terms, for its owner alone."""
    text = json.dumps({"terms": [asdict(one) for one in terms]}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    files.replace_file(path, f"{text}\n".encode(), mode=0o600)


def require_consent(site: SiteConfig, asked: Terms) -> str:
    """Raise Against unless the site agrees to these terms; says in words why it does."""
    state = Path(site.state)
    write_terms(state / ASKED, [asked])
    if site.policy.approved is not None:
        _require_approval(read_terms(Path(site.policy.approved)), asked)
        return "approved by the site"
    known = read_terms(state / PINNED)
    first = next((one for one in known if one.run == asked.run), None)
    if first is None:
        write_terms(state / PINNED, [*known, asked][-PINS:])
        return f"first job of the run {asked.run}, pinned: base {asked.base}, app {asked.app}"
    if changed := first.differences(asked):
        raise Against(
            f"the run asks for something else than when it began here: {_some(changed)}; if that "
            f"is right, remove {PINNED} from the site's state"
        )
    return "as when it began here"


def _require_approval(approved: list[Terms], asked: Terms) -> None:
    found = sorted((one.differences(asked) for one in approved), key=len)
    if not found:
        raise Against(f"the site has approved no run yet; {HOW}")
    if found[0]:
        raise Against(f"the site has not approved this: {_some(found[0])}; {HOW}")


def require_base(asked: Terms, base: str) -> None:
    """Raise Against where the base model that is loaded here is not the one that was agreed on."""
    if base != asked.base:
        raise Against(
            f"it has another base model ({base[:12]}) than the coordinator ({asked.base[:12]})"
        )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value, ensure_ascii=False, sort_keys=True)


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 70 else f"{text[:66]} ..."


def _some(differences: list[str]) -> str:
    rest = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
