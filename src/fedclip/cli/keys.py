"""The subcommands of `fedclip keys`: what machines of one federation know each other by."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedclip.cli.options import AsJson
from fedclip.errors import FedclipWarning, UsageError

if TYPE_CHECKING:
    from fedclip.deploy.coordinator.control import Control

SOON = 30
"""Days before a certificate's end from which on a check warns."""

app = typer.Typer(
    name="keys",
    help="Make and register keys of a federation over several machines.",
    no_args_is_help=True,
    rich_markup_mode=None,
    suggest_commands=False,
)

Keys = Annotated[
    Path,
    typer.Option(
        "--keys", help="The coordinator's folder of keys [default: keys].", show_default=False
    ),
]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or address by which sites reach it; repeatable."),
]
Days = Annotated[
    int,
    typer.Option(
        help="Days for which the coordinator's certificate is valid [default: 365].",
        show_default=False,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Move what is there aside.")]
Where = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="The running coordinator [default: 127.0.0.1:8000].",
        show_default=False,
    ),
]
# Arguments are explained in the commands' texts (see `options`).
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", hidden=True)]
Name = Annotated[str, typer.Argument(metavar="NAME", hidden=True)]

HERE = "127.0.0.1:8000"
KEYS = Path("keys")


@app.command()
def init(
    folder: Folder,
    host: Hosts = None,
    days: Days = 365,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make an authority and the coordinator's certificate.

    FOLDER is new; it stays on the coordinator's machine. localhost is always among the hosts.
    """
    if not host:
        raise UsageError(
            "fedclip keys init needs --host: the name or address by which the sites reach the "
            "coordinator (--host localhost for a try on one machine)"
        )
    from fedclip.deploy.keys import folder as keys

    _show(keys.init(folder, host, days, force), as_json)


@app.command()
def renew(folder: Folder, host: Hosts = None, days: Days = 365, as_json: AsJson = False) -> None:
    """Renew the coordinator's certificate; nothing changes at the sites.

    FOLDER is what `fedclip keys init` made. --host adds a name to those that it has.
    """
    from fedclip.deploy.keys import folder as keys

    _show(keys.renew(folder, host or (), days), as_json)


@app.command()
def site(
    name: Name,
    folder: Keys = KEYS,
    public: Annotated[
        Path | None,
        typer.Option("--public", help="The public key that the site made and sent."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the folder of files for a site.

    NAME is what the site is called in this federation.
    """
    from fedclip.deploy.keys import folder as keys

    _show(keys.site(folder, name, public, force), as_json)


@app.command()
def register(
    name: Name, folder: Keys = KEYS, coordinator: Where = HERE, as_json: AsJson = False
) -> None:
    """Admit a site to a running coordinator.

    NAME has its key from `fedclip keys site`. Run it on the coordinator's machine.
    """
    from fedclip.deploy.coordinator import registry

    with _control(folder, coordinator) as control:
        _show(registry.register(control, folder, name), as_json)


@app.command()
def revoke(
    name: Name, folder: Keys = KEYS, coordinator: Where = HERE, as_json: AsJson = False
) -> None:
    """Send a site away; its key is never admitted again.

    NAME is a site that `fedclip keys list` shows. Run it on the coordinator's machine.
    """
    from fedclip.deploy.coordinator import registry

    with _control(folder, coordinator) as control:
        _show(registry.revoke(control, folder, name), as_json)


@app.command()
def peers(folder: Keys = KEYS, as_json: AsJson = False) -> None:
    """Write the list of all sites' keys into each site's folder, for masked sums.

    Each site keeps the list beside its own key and compares the fingerprints with the others, by
    telephone for example: the coordinator is not to be trusted with them.
    """
    from fedclip.cli.console import show_rows
    from fedclip.deploy.keys.peers import write_peers

    show_rows(write_peers(folder), as_json)


@app.command("list")
def list_sites(folder: Keys = KEYS, coordinator: Where = HERE, as_json: AsJson = False) -> None:
    """Show the sites, which are online, and their keys."""
    from fedclip.cli.console import show_rows
    from fedclip.deploy.coordinator import registry

    with _control(folder, coordinator) as control:
        show_rows(registry.sites(control, folder), as_json)


@app.command()
def check(folder: Folder, host: Hosts = None, as_json: AsJson = False) -> None:
    """Check files and dates.

    FOLDER is the coordinator's folder, or that of a site. With --host also that the coordinator's
    certificate is for this name.
    """
    from fedclip.deploy.keys import folder as keys
    from fedclip.deploy.keys.peers import check_peers

    if (folder / keys.SERVER).exists() or (folder / keys.CA_KEY).exists():
        _show(keys.check_coordinator(folder, host or ()), as_json)
    else:
        _show(keys.check_site(folder) | check_peers(folder), as_json)


def _control(folder: Path, coordinator: str) -> Control:
    from fedclip.deploy.addresses import Address
    from fedclip.deploy.coordinator.control import Control
    from fedclip.deploy.keys.folder import CA

    return Control(Address.parse(coordinator, "--coordinator"), folder / CA)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    from fedclip.cli.console import show

    show(facts, as_json)
    left = facts.get("days_left", SOON)
    if left < SOON:
        warnings.warn(
            f"the certificate is valid for {left} more days; `fedclip keys renew` makes a new one",
            FedclipWarning,
            stacklevel=2,
        )
