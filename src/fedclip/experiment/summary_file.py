"""`summary.json`: written with digests of itself and of the run's other records, and compared."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedclip.errors import DamagedFile, FedclipWarning, UsageError, first_fault, shortened
from fedclip.experiment.folder import CONFIG, METRICS, PARTITION, SUMMARY, RunFolder
from fedclip.files import file_sha256
from fedclip.records import plain_json

_DIGEST, _RECORDS = "summary_sha256", "records_sha256"


class _Summary(BaseModel):
    """The fields that every version has written, for a summary without digests."""

    model_config = ConfigDict(strict=True, frozen=True)

    strategy: str
    engine: str
    seed: int
    rounds: int
    clients: int
    clients_per_round: int
    zero_shot_accuracy: float | None
    accuracy: float | None
    client_accuracy: dict[str, float | None] | None
    total_parameters: int
    trainable_parameters: int
    bytes_up_per_client_round: float
    bytes_down_per_client_round: float
    precision: str
    state_sha256: str
    versions: dict[str, str]
    metrics: list[str] = []
    records_sha256: dict[str, str] = Field({}, max_length=3)
    adapter_folders: dict[str, str] = {}


def write_summary(folder: RunFolder, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Write a run's summary, with what must not change after it; return all of it."""
    names = [name for name in (CONFIG, PARTITION, METRICS) if (folder.path / name).exists()]
    records = {name: file_sha256(folder.path / name) for name in names}
    whole = {key: plain_json(value) for key, value in {**summary, _RECORDS: records}.items()}
    whole[_DIGEST] = _sha256(whole)
    folder.write_json(SUMMARY, whole)
    return whole


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """Read a run's summary; raises `UsageError` where it is not the one that was written.

    So it does where a record that it belongs to has changed, but for the configuration, of which a
    user may have put paths or the device right: that is a warning.
    """
    path = folder.path / SUMMARY
    found = folder.read_json(SUMMARY)
    told = found.get(_DIGEST)
    signed = _DIGEST in found or _RECORDS in found  # else by an older version
    if signed and told != _sha256({k: v for k, v in found.items() if k != _DIGEST}):
        raise DamagedFile(
            f"{path} is damaged: it does not have the digest {shortened(told)}; put it back"
        )
    try:
        _Summary.model_validate(found)
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: {first_fault(error)}; put it back") from None
    for name, digest in found.get(_RECORDS, {}).items():
        record = folder.path / name
        if not record.is_file() or file_sha256(record) == digest:
            continue  # who needs a lost one says so
        if name != CONFIG:
            raise DamagedFile(f"{record} is not the one that the run ended with; put it back")
        warnings.warn(
            f"{record} has changed since the run ended: what it says may not be how the run was "
            "trained",
            FedclipWarning,
            stacklevel=3,
        )
    return found


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
