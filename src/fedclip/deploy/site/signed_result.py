"""The coordinator's signed statement about a run's result, as a site checks it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedclip.deploy.keys.folder import CA
from fedclip.deploy.log.statement import read_signed, require_about, vouch
from fedclip.deploy.messages.requests import Ticket
from fedclip.deploy.messages.results import STATEMENT
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.policy import Against
from fedclip.errors import UsageError

WHERE = "the coordinator's statement"


def checked_statement(
    site: SiteConfig, header: Mapping[str, Any], ticket: Ticket, num_examples: int, state: str
) -> Mapping[str, Any] | None:
    """The statement that came with a result, which holds and is about it; None where none came.

    `state` is the digest of the result's tensors. Raises Against where the site's policy demands a
    statement, or one that came does not hold.
    """
    value = header.get(STATEMENT)
    if value is None:
        if site.policy.signed_result:
            raise Against("its policy demands a signed statement with the result, and none came")
        return None
    try:
        signed = read_signed(value, WHERE)
        told = signed.statement
        about: dict[str, tuple[object, object]] = {
            "run": (told.run, ticket.run),
            "job": (told.job, ticket.job),
            "base.sha256": (told.base.sha256, ticket.base),
            "state_sha256": (told.state_sha256, state),
        }
        for one in told.sites:
            if one.name == site.name and one.examples is not None:
                about["examples of this site"] = (one.examples, num_examples)
        for key, (found, expected) in about.items():
            require_about(key, found, expected, WHERE)
        if site.keys is not None:
            vouch(signed, [Path(site.keys) / CA], WHERE)
    except UsageError as error:
        raise Against(str(error)) from None
    assert isinstance(value, Mapping)
    return value


def check_policy(site: SiteConfig) -> None:
    """Raise UsageError where nobody could vouch for the statements that the policy demands."""
    if site.policy.signed_result and site.keys is None:
        raise UsageError(
            "policy.signed_result: true needs keys: the coordinator's statement is trusted by "
            "ca.crt in the site's folder of keys"
        )
