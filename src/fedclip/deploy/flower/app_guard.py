"""Allow-list of apps that a site's node starts, by a digest of their files.

A coordinator sends its app through Flower, whose node would run any. Here the digest of each is
kept in the site's state, and one that was not agreed to is answered with an error, unstarted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedclip import files
from fedclip.deploy.app_code import bundle_digest, installed_app
from fedclip.deploy.flower import private
from fedclip.deploy.keys.folder import SITE_KEY
from fedclip.deploy.log.chain import LOG_FILE, Log, log_key
from fedclip.errors import UsageError

RECORD, APPROVED = "FEDCLIP_APP_RECORD", "FEDCLIP_APPS"
"""Variables: the file that the digest of the running app is written to, in the site's state, and
the file of approvals (`policy.approved`), without which every app may run."""
NAME, KEYS = "FEDCLIP_SITE_NAME", "FEDCLIP_SITE_KEYS"
"""Variables: the site's name, and its folder of keys, with which the site's log is signed."""


def install() -> None:
    """Have this process, which is going to be a SuperNode, look at apps before it starts them."""
    private.replace("_verify_fab", lambda fab, _: admits(fab.content))
    private.replace("_pull_and_store_message", checking(private.load("_pull_and_store_message")))


def checking(pull: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's function that fetches a message and its app, made to verify every app."""

    def checked(**arguments: Any) -> Any:
        get_fab = arguments["get_fab"]

        def fetched(digest: str, run: int) -> Any:
            fab = get_fab(digest, run)
            told = {**(fab.verifications or {}), "valid_license": "fedclip"}
            return private.load("Fab")(fab.hash_str, fab.content, told)

        verified = {"get_fab": fetched, "trusted_entities": {"fedclip": ""}}
        return pull(**{**arguments, **verified})

    return checked


def admits(bundle: bytes) -> bool:
    """Whether an app may be started; its digest is kept where it may."""
    found = bundle_digest(bundle)
    approved = os.environ.get(APPROVED)
    if found is None or (approved and found not in _agreed(Path(approved))):
        _log_refusal(
            f"the coordinator sends code that this site has not agreed to (sha256 {found}); it was "
            "not started. It is that of another version of fedclip, or not fedclip's at all"
        )
        return False
    if record := os.environ.get(RECORD):
        files.replace_file(Path(record), json.dumps({"sha256": found}).encode(), mode=0o600)
    return True


def _log_refusal(reason: str) -> None:
    """Write a refusal to Flower's log, and to the site's."""
    logging.getLogger("flwr").error("fedclip: %s", reason)
    if record := os.environ.get(RECORD):
        state, keys = Path(record).parent, os.environ.get(KEYS)
        key = log_key(None if keys is None else Path(keys), SITE_KEY, state)
        log = Log(state / LOG_FILE, key, os.environ.get(NAME, "site"))
        log.add("refused", run=None, reason=reason)


def _agreed(path: Path) -> set[str]:
    """Digests of the installed app, of which nothing is new to this machine, and approved ones."""
    try:  # read anew each time: an approval may come meanwhile
        terms = files.read_json(path)["terms"] if path.exists() else []
        return {installed_app(), *(str(one["app"]) for one in terms)}
    except (UsageError, KeyError, TypeError):
        return set()  # the trainer names the damaged file
