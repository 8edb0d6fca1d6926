"""`fedclip site approve`: the last job that was asked for, approved from then on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.consent import ASKED, read_terms, write_terms
from fedclip.deploy.site.terms_in_words import in_words
from fedclip.errors import UsageError


def approve(
    site: SiteConfig, show: Callable[[Mapping[str, str]], None], confirm: Callable[[str], bool]
) -> str:
    """Show what the last job asks for, and add it to the approved ones if that is confirmed."""
    if site.policy.approved is None:
        raise UsageError(
            "policy.approved names no file for approvals; add `approved: approved.json` under "
            "policy in the site's configuration, and start the site with it"
        )
    found, file = read_terms(Path(site.state) / ASKED), Path(site.policy.approved)
    if not found:
        raise UsageError(
            f"nothing has been asked for at {site.state} yet; start `fedclip site`, which refuses "
            "what is not approved, and approve it when the coordinator has asked"
        )
    asked, approved = found[0], read_terms(file)
    show(in_words(asked, site))
    if any(not one.differences(asked) for one in approved):
        return f"{file} approves this already"
    if not confirm("Approve this, now and whenever the same is asked for?"):
        return "not approved: the site goes on refusing it"
    write_terms(file, [*approved, asked])
    return f"approved in {file}; the site is asked again within a minute"
