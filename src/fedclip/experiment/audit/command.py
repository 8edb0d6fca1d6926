"""An audit of a configuration file or of a run's configuration, with its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fedclip import files
from fedclip.config.loading import load_config
from fedclip.errors import UsageError
from fedclip.experiment.audit.canaries import example_audit
from fedclip.experiment.audit.directions import direction_audit
from fedclip.experiment.audit.membership import membership_audit
from fedclip.experiment.folder import CONFIG
from fedclip.reports.listener import Listener

FORMS = ("png", "svg")


def attack(
    path: Path,
    changes: Sequence[str],
    kind: Literal["example", "direction", "membership"],
    canaries: int,
    trainings: int,
    picture: Path | None,
    listener: Listener,
) -> dict[str, Any]:
    """Carry out an audit, and return its figures; `path` is a configuration or a run folder."""
    form = "" if picture is None else picture.suffix.lower().removeprefix(".")
    if picture is not None and form not in FORMS:
        raise UsageError(f"--picture: {picture} must end in .png or .svg")
    config = load_config(path / CONFIG if path.is_dir() else path, changes)
    if kind == "membership":
        found = membership_audit(config, trainings, listener=listener)
    else:
        plant = example_audit if kind == "example" else direction_audit
        found = plant(config, canaries, trainings, listener=listener)
    if picture is not None:
        from fedclip.reports.audit_plot import audit_plot

        data = audit_plot(found.scores, found.inside, found.figures, form)
        try:
            files.replace_file(picture, data)
        except OSError as error:
            raise UsageError(f"--picture: {picture}: {error.strerror or error}") from None
    return found.figures
