"""The engine of a run over machines: with masks, where updates are to be summed behind them."""

from __future__ import annotations

from pathlib import Path

from fedclip.config import Config
from fedclip.config.secure import USUAL_LARGEST_UPDATE
from fedclip.deploy.coordinator.run_files import DeployFiles
from fedclip.deploy.keys.peers import all_peers, verifier
from fedclip.deploy.remote.engine import Formats, Mail, Patience, RemoteEngine, Roster, Traffic
from fedclip.deploy.remote.last_sum import LAST_SUM, LastSum
from fedclip.experiment.context import RunContext
from fedclip.reports.listener import Listener

MOST_EXAMPLES = 10_000.0
"""Times the examples of all other sites, from which on those are as good as none in a mean."""


def remote_engine(
    context: RunContext,
    files: DeployFiles,
    mail: Mail,
    roster: Roster,
    patience: Patience,
    listener: Listener,
    traffic: Traffic,
) -> RemoteEngine:
    """Trains the sites of a round at once."""
    config, say = context.config, listener.message
    about = (mail, roster, patience, _formats(config))
    if not config.secure.masked:
        return RemoteEngine(*about, say=say, traffic=traffic)
    from fedclip.deploy.remote.masked import MaskedRemoteEngine, MaskPlan

    plan = MaskPlan(
        verifier(all_peers(Path(str(config.deploy.keys)))),
        config.federation.rounds,
        config.secure.largest_change,
        config.secure.most_examples,
        ahead=context.clients_per_round == len(context.clients),
    )
    last = LastSum(files.folder / LAST_SUM)
    return MaskedRemoteEngine(*about, say=say, traffic=traffic, plan=plan, last=last)


def _formats(config: Config) -> Formats:
    """Numbers on the wire, and what is taken from a site."""
    deploy, robust, secure = config.deploy, config.robust, config.secure
    caps = (robust.chosen, robust.largest_share, secure.most_examples)
    by_examples = all(cap is None for cap in caps)
    return Formats(
        deploy.down,
        deploy.up,
        int(deploy.largest_message_mb * 1e6),
        deploy.largest_update or USUAL_LARGEST_UPDATE,
        MOST_EXAMPLES if by_examples else None,
        "secure.most_examples" if secure.masked else "robust.largest_share",
        private=config.privacy.unit is not None,
    )
