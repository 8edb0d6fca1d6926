"""`report.html`: a run folder's files, read as a record and drawn as one page."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fedclip import files
from fedclip.config import Config
from fedclip.config.loading import dump_config, load_config
from fedclip.errors import FedclipWarning, UsageError, first_fault
from fedclip.experiment.folder import CONFIG, METRICS, PARTITION, REPORT, SUMMARY, TIMING, RunFolder
from fedclip.experiment.predictions_file import read_predictions
from fedclip.experiment.summary_file import read_summary
from fedclip.lora.factors import norm
from fedclip.models.adapter_folder import CONFIG as PEFT_CONFIG
from fedclip.models.adapter_updates import read_lora
from fedclip.reports.report.compare import compare_page
from fedclip.reports.report.record import (
    Layer,
    Partition,
    Record,
    RoundLine,
    RunRecord,
    Summary,
    TimeLine,
)
from fedclip.reports.report.sections import run_page

Checked = TypeVar("Checked", bound=Record)


def write_report(folder: RunFolder) -> None:
    """Write the report of a run that has come to its end; a failure is a warning, no more."""
    try:
        folder.write_text(REPORT, run_page(read_run(folder.path)))
    except Exception as error:  # the run itself is finished and whole
        text = f"{folder.path / REPORT} could not be written: {type(error).__name__}: {error}"
        warnings.warn(text, FedclipWarning, stacklevel=2)


def report(
    runs: Sequence[str | Path], output: str | Path | None = None, *, images: bool = True
) -> Path:
    """Write the page of a run, or of several side by side, and return its path.

    The page of one run is by default `report.html` in its folder. Without `images` it holds no
    image of the test set. A run that is not finished is shown as far as it has come.
    """
    records = [read_run(Path(run)) for run in runs]
    if not images:
        records = [_without_images(record) for record in records]
    if output is None and len(records) > 1:
        raise UsageError("a report on several runs needs a file to write: --output FILE.html")
    path = Path(output) if output else Path(runs[0]) / REPORT
    text = run_page(records[0]) if len(records) == 1 else compare_page(records)
    try:
        files.replace_file(path, text.encode())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def read_run(path: Path) -> RunRecord:
    """A run folder as a record, each file of it checked; what an older version lacks is left out.

    Of a private run only what it has made public is read.
    """
    folder = RunFolder.open(path)
    config = load_config(folder.path / CONFIG)
    rounds = _checked(RoundLine, folder.read_metrics(), folder.path / METRICS)
    if not rounds:
        raise UsageError(f"{path} has no finished round to report on")
    private = config.privacy.unit is not None
    found = [read_summary(folder)] if folder.is_finished() else []
    summaries = _checked(Summary, found, folder.path / SUMMARY)
    return RunRecord(
        name=folder.path.resolve().name,
        config=config.model_dump(mode="json"),
        config_text=dump_config(config),
        rounds=rounds,
        times=_checked(TimeLine, folder.read_timing(), folder.path / TIMING),
        summary=summaries[0] if summaries else None,
        partitions={} if private else _partitions(folder),
        tested={} if private else read_predictions(folder),
        layers=_layers(folder, config),
    )


def _partitions(folder: RunFolder) -> dict[str, Partition]:
    if not (folder.path / PARTITION).exists():
        return {}
    found = folder.read_json(PARTITION)
    tasks = found.get("tasks", {"": found})
    if not isinstance(tasks, dict):
        raise UsageError(f"{folder.path / PARTITION} is damaged: tasks must be an object")
    read = _checked(Partition, list(tasks.values()), folder.path / PARTITION)
    return dict(zip(tasks, read, strict=True))


def _layers(folder: RunFolder, config: Config) -> list[Layer]:
    """What each layer of the last adapter has learned; nothing where there is no LoRA."""
    adapter = folder.path / "adapter"
    if not (adapter / PEFT_CONFIG).is_file():
        return []
    found = read_lora(adapter).layers
    return [Layer(path, len(pair.a), float(norm(pair))) for path, pair in found.items()]


def _without_images(record: RunRecord) -> RunRecord:
    tested = {k: own.model_copy(update={"samples": []}) for k, own in record.tested.items()}
    return replace(record, tested=tested)


def _checked(kind: type[Checked], values: Sequence[Any], path: Path) -> list[Checked]:
    try:
        return [kind.model_validate(value) for value in values]
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: {first_fault(error)}; put it back") from None
