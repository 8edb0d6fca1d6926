"""What a coordinator signs: its log, and the statement about a run that has come to its end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedclip.config import Config
from fedclip.config.loading import dump_config
from fedclip.deploy.coordinator.run_files import DeployFiles
from fedclip.deploy.job import APP, EPSILON
from fedclip.deploy.log.chain import LOG_FILE, Log, bodies
from fedclip.deploy.log.statement import Signer, make_statement, sign_statement
from fedclip.deploy.log.verify import COORDINATOR
from fedclip.deploy.messages import results
from fedclip.deploy.messages.requests import job_digest
from fedclip.deploy.remote.journal import Journal
from fedclip.deploy.remote.roster import Roster
from fedclip.records import RunState


def signer_of(config: Config, files: DeployFiles) -> Signer:
    """The coordinator as one who signs: by its folder of keys, or by a key of the run's."""
    keys = None if config.deploy.keys is None else Path(config.deploy.keys)
    return Signer.coordinator(keys, files.folder)


def signed_statement(
    config: Config, files: DeployFiles, roster: Roster, state: RunState
) -> dict[str, Any]:
    """What the coordinator signs of a run that has come to its end."""
    statement = make_statement(
        run=files.run,
        digest=job_digest(roster.job),
        job=roster.job,
        base=roster.base,
        sites=files.sites,
        keys=None if config.deploy.keys is None else Path(config.deploy.keys),
        log=bodies(files.folder / LOG_FILE),
        state_sha256=results.state_digest(state),
    )
    return sign_statement(statement, signer_of(config, files))


def begin_log(config: Config, files: DeployFiles, job: Mapping[str, Any], base: str) -> Journal:
    """The run's signed log, from this start of its coordinator on."""
    key = signer_of(config, files).key
    journal = Journal(Log(files.folder / LOG_FILE, key, COORDINATOR, files.run))
    facts = {"job": job_digest(job), "base": base, "app": job[APP], "fedclip": version("fedclip")}
    journal.note("started", **facts, config=_sha256(dump_config(config)), epsilon=job[EPSILON])
    return journal


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
