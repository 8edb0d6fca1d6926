"""Where a federation stands, by the log of its coordinator or of a site, on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedclip.config.loading import load_config
from fedclip.deploy.log.chain import LOG_FILE, bodies
from fedclip.deploy.log.places import SITE_LOCK, log_in
from fedclip.errors import UsageError
from fedclip.experiment.folder import CONFIG, RunFolder
from fedclip.experiment.lock import is_held

Lines = Sequence[Mapping[str, Any]]


def status(folder: Path) -> dict[str, Any]:
    """Facts of a run of `fedclip coordinate` or of a site's state; `sites` are rows of a table."""
    lines = list(bodies(log_in(folder)))
    if not lines:
        raise UsageError(f"{folder}: its {LOG_FILE} holds no line that can be read")
    try:
        if RunFolder(folder).is_run():
            return _of_coordinator(RunFolder(folder), lines)
        return _of_site(folder, lines)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder}: its {LOG_FILE} is damaged ({error!r}); `fedclip log verify` says more"
        ) from None


def _of_coordinator(run: RunFolder, lines: Lines) -> dict[str, Any]:
    config = load_config(run.path / CONFIG)
    rounds = [body for body in lines if body["event"] == "round"]
    latest = rounds[-1]["round"] if rounds else 0
    done = run.read_metrics()
    state = f"round {latest} of {config.federation.rounds}" if rounds else "waiting for sites"
    figures = {k: done[-1][k] for k in ("accuracy", "loss") if done and done[-1].get(k) is not None}
    return {
        "run": str(run.path),
        "state": "finished" if run.is_finished() else state,
        "rounds_finished": max(0, len(done) - 1),
        **figures,
        **_last(lines),
        "adapter": str(run.path / "adapter") if run.is_finished() else None,
        "sites": [_row(name, lines) for name in _names(config.deploy.sites, lines)],
    }


def _names(expected: Sequence[str] | None, lines: Lines) -> list[str]:
    return sorted({*(expected or ()), *(str(b["site"]) for b in lines if b.get("site"))})


def _row(name: str, lines: Lines) -> dict[str, Any]:
    """A site as its coordinator has seen it."""
    own = [body for body in lines if body.get("site") == name]
    of = {event: [b for b in own if b["event"] == event] for event in
          ("joined", "answered", "left_out", "refused", "tested")}  # fmt: skip
    heard = [b for event in ("joined", "answered", "tested") for b in of[event]]
    out = of["left_out"][-1:] or of["refused"][-1:]
    tested = of["tested"][-1:]
    return {
        "site": name,
        "examples": of["joined"][-1]["examples"] if of["joined"] else None,
        "last_heard": _time(max(b["time"] for b in heard)) if heard else "never",
        "last_round": of["answered"][-1]["round"] if of["answered"] else None,
        "times_left_out": len(of["left_out"]),
        "tests": f"{tested[0]['correct']} of {tested[0]['tests']}" if tested else None,
        "last_trouble": out[0]["reason"] if out else None,
    }


def _of_site(folder: Path, lines: Lines) -> dict[str, Any]:
    start = max((i for i, body in enumerate(lines) if body["event"] == "joined"), default=None)
    run = [] if start is None else list(lines[start:])
    sent = [body for body in run if body["event"] == "sent"]
    ended = next((body for body in reversed(run) if body["event"] == "ended"), None)
    refused = [body["reason"] for body in lines[(start or 0) :] if body["event"] == "refused"]
    state = "no run yet" if start is None else "joined"
    if sent:
        state = f"round {sent[-1]['round']} of {run[0]['rounds']}"
    promised = run[0].get("epsilon") if run else None
    return {
        "site": lines[0]["who"],
        "running": is_held(folder / SITE_LOCK),
        "run": run[0]["run"] if run else None,
        "state": "finished" if ended else state,
        "agreed": run[0]["agreed"] if run else None,
        "epsilon": promised if promised is not None else "none promised",
        "examples": run[0]["examples"] if run else None,
        "loss": sent[-1]["loss"] if sent else None,
        "sent_bytes": sum(body["bytes"] for body in sent),
        "own_tests": f"{ended['correct']} of {ended['tests']}" if ended else None,
        "last_refusal": refused[-1] if refused else None,
        **_last(lines),
        "adapter": ended["adapter"] if ended else None,
    }


def _last(lines: Lines) -> dict[str, str]:
    return {"last_event": f"{lines[-1]['event']}, {_time(lines[-1]['time'])}"}


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, OSError):
        raise ValueError(f"no time: {seconds}") from None
