"""The last masked sum, kept until the next: sites unmask one sum of a round.

A coordinator that is killed before the round is saved goes on from here.
"""

from __future__ import annotations

from dataclasses import asdict
from math import nan
from pathlib import Path
from typing import Any

from fedclip import files
from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.models.state import adapter_sha256
from fedclip.records import ClientReport, Cohort, LeftOut, SecureSum, TrainRequest

LAST_SUM = "masked_sum.safetensors"


class LastSum:
    """A file of a run's folder; nothing is kept without one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def keep(self, request: TrainRequest, cohort: Cohort) -> None:
        """Writes what a request has given."""
        total = cohort.total
        if self._path is None or total is None:
            return
        header = {
            **_name(request),
            "loss": total.loss,
            "reports": [asdict(report) for report in cohort.reports],
            "left_out": [asdict(one) for one in cohort.left_out],
        }
        files.replace_file(self._path, Envelope(header, total.mean).pack())

    def read(self, request: TrainRequest) -> Cohort | None:
        """What the same request has given; None where nothing is known of it."""
        if self._path is None or not self._path.exists():
            return None
        try:
            envelope = Envelope.unpack(self._path.read_bytes())
            header: Any = envelope.header
            if {key: header.get(key) for key in _name(request)} != _name(request):
                return None
            reports = tuple(ClientReport(**_numbers(one)) for one in header["reports"])
            left_out = tuple(LeftOut(**one) for one in header["left_out"])
            loss = nan if header["loss"] is None else float(header["loss"])
            total = SecureSum(envelope.tensors, loss)
        except (BadMessage, KeyError, TypeError, ValueError):
            return None  # a damaged file: the sites are asked
        return Cohort(reports, {}, left_out, total)


def _name(request: TrainRequest) -> dict[str, Any]:
    """What makes a request the same one."""
    return {
        "kind": "masked sum",
        "round": request.server_round,
        "state": adapter_sha256(request.state),
        "names": sorted(request.names_sent),
    }


def _numbers(report: dict[str, Any]) -> dict[str, Any]:
    """A report as it was; JSON has null for what is no number."""
    unknown = ("loss", "rate_sum", "start_loss")
    return {k: nan if v is None and k in unknown else v for k, v in report.items()}
