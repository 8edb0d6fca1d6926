"""Where a node's log is: in a coordinator's run folder, in a site's state, or named itself."""

from __future__ import annotations

from pathlib import Path

from fedclip.deploy.log.chain import LOG_FILE
from fedclip.errors import UsageError
from fedclip.experiment.folder import DEPLOY

SITE_LOCK = "site.lock"
"""In a site's state: held by the one `fedclip site` that works on it."""


def log_in(folder: Path) -> Path:
    """The log of a folder; UsageError where there is none."""
    places = (folder, folder / DEPLOY / LOG_FILE, folder / LOG_FILE)
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UsageError(
            f"{folder} holds no log ({DEPLOY}/{LOG_FILE} of a run of `fedclip coordinate`, or "
            f"{LOG_FILE} of a site's state)"
        )
    return found
