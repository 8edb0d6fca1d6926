"""What a run has spent of privacy, on disk: written before an answer leaves.

A mechanism is a client's DP-SGD, or the mean over clients; an entry says how many of its steps a
request took. A request that is asked again is answered by the same bytes and not counted again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedclip.errors import FedclipError, UsageError, first_fault
from fedclip.federated.privacy.accounting import Epsilon, Spent, largest
from fedclip.files import read_json, replace_file
from fedclip.records import TrainRequest

FORMAT = 1


class BudgetSpent(FedclipError):
    """The next round would exceed the run's epsilon; what was trained before it stays."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Mechanism(_Strict):
    """A sampling rate and a noise multiplier, which stay the same over the run."""

    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    noise_multiplier: Annotated[float, Field(gt=0)]


class Entry(_Strict):
    """Steps by mechanism that one request took."""

    server_round: Annotated[int, Field(ge=1)]
    purpose: str
    request_sha256: str
    steps: dict[str, Annotated[int, Field(ge=1)]]

    def is_of(self, request: TrainRequest) -> bool:
        """Whether it is of this request, which has a digest."""
        key = (self.server_round, self.purpose, self.request_sha256)
        return key == (request.server_round, request.purpose, request.digest)


class Books(_Strict):
    """The file's contents except its digest."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    run: str
    key_sha256: str
    delta: Annotated[float, Field(gt=0, lt=1)]
    largest_epsilon: Annotated[float, Field(gt=0)] | None
    mechanisms: dict[str, Mechanism]
    entries: list[Entry]

    @model_validator(mode="after")
    def _of_known_mechanisms(self) -> Books:
        """Steps of a mechanism that is not in the books would count for nothing."""
        strange = {name for entry in self.entries for name in entry.steps} - set(self.mechanisms)
        if strange:
            raise ValueError(f"steps of {min(strange)!r}, whose noise they do not say")
        return self


class Ledger:
    """The books of one run and the file that they are in."""

    def __init__(self, path: Path, books: Books) -> None:
        """Takes the books as they are in the file."""
        self.path = path
        self.books = books

    @classmethod
    def create(cls, path: Path, books: Books) -> Ledger:
        """Open new books."""
        ledger = cls(path, books)
        ledger._write(books)
        return ledger

    @classmethod
    def read(cls, path: Path, *, run: str | None = None, key_sha256: str | None = None) -> Ledger:
        """Read the books of a run; `UsageError` where they are damaged or another run's.

        Nothing is spent out of books that cannot be read. Without `run` or `key_sha256` any run's
        or key's are taken.
        """
        mend = "what they say counts as spent: put the file back, or start a new run"
        values = read_json(path)
        digest = values.pop("sha256", None)
        try:
            books = Books.model_validate(values)
        except ValidationError as error:
            raise UsageError(f"{path} are no privacy books: {first_fault(error)}; {mend}") from None
        if digest != _sha256(books):
            raise UsageError(f"{path}: privacy books are damaged; {mend}")
        if run is not None and books.run != run:
            raise UsageError(f"{path}: privacy books of another run; {mend}")
        if key_sha256 is not None and books.key_sha256 != key_sha256:
            raise UsageError(
                f"{path}: noise.key is not the one that these books began with; {mend}"
            )
        return cls(path, books)

    def charge(self, request: TrainRequest, steps: Mapping[str, int]) -> None:
        """Note what a request takes, on disk, before any of it is taken.

        Raises BudgetSpent, and notes nothing, where that is more than the run may spend.
        """
        books, limit = self._with(request, steps), self.books.largest_epsilon
        if books is self.books:
            return
        if limit is not None:
            after = _epsilon(books).least
            if after > limit:
                raise BudgetSpent(
                    f"the next round would take privacy.target_epsilon from "
                    f"{self.epsilon().least:.4g} to {after:.4g}, above {limit:g}"
                )
        self._write(books)
        self.books = books

    def after(self, request: TrainRequest, steps: Mapping[str, int]) -> Epsilon:
        """The largest epsilon by mechanism once a request is noted."""
        return _epsilon(self._with(request, steps))

    def epsilon(self) -> Epsilon:
        """The largest epsilon spent so far, by mechanism."""
        return _epsilon(self.books)

    def epsilon_with(self, request: TrainRequest) -> Epsilon:
        """The largest epsilon that was spent when a request was noted, be it asked again later."""
        last = max(n for n, entry in enumerate(self.books.entries) if entry.is_of(request))
        entries = self.books.entries[: last + 1]
        return _epsilon(self.books.model_copy(update={"entries": entries}))

    def steps(self, name: str) -> int:
        """Steps of a mechanism so far."""
        return _spent(self.books, name).steps

    def _with(self, request: TrainRequest, steps: Mapping[str, int]) -> Books:
        """The ledger with a request's new entries; unchanged if there are none."""
        assert request.digest is not None
        own = (entry for entry in self.books.entries if entry.is_of(request))
        known = {name for entry in own for name in entry.steps}
        new = {name: count for name, count in steps.items() if name not in known and count}
        if not new:
            return self.books
        entry = Entry(
            server_round=request.server_round,
            purpose=request.purpose,
            request_sha256=request.digest,
            steps=new,
        )
        return self.books.model_copy(update={"entries": [*self.books.entries, entry]})

    def _write(self, books: Books) -> None:
        whole = {**books.model_dump(), "sha256": _sha256(books)}
        try:
            replace_file(self.path, json.dumps(whole, indent=1).encode())
        except OSError as error:
            raise FedclipError(
                f"{self.path} cannot be written: {error.strerror}; nothing was spent: mend this, "
                "then go on with the run"
            ) from None


def request_sha256(request: TrainRequest) -> str:
    """Digest of all that a request asks of any client; who is asked is not part of it."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            digest.update(f"{len(value)} in {name};".encode())
            for key in sorted(value):
                add(f"{name}/{len(key)}:{key}", value[key])
        elif isinstance(value, torch.Tensor):
            digest.update(f"{name}: {value.dtype} {list(value.shape)};".encode())
            digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        else:
            plain = sorted(value) if isinstance(value, frozenset) else value
            digest.update(f"{name}: {plain!r};".encode())

    for field in fields(request):
        if field.name not in ("client_ids", "digest", "stepped"):
            add(field.name, getattr(request, field.name))
    return digest.hexdigest()


def _epsilon(books: Books) -> Epsilon:
    return largest((_spent(books, name) for name in books.mechanisms), books.delta)


def _spent(books: Books, name: str) -> Spent:
    mechanism = books.mechanisms[name]
    steps = sum(entry.steps.get(name, 0) for entry in books.entries)
    return Spent(mechanism.sampling_rate, mechanism.noise_multiplier, steps)


def _sha256(books: Books) -> str:
    return hashlib.sha256(books.model_dump_json().encode()).hexdigest()
