"""A training of which an attacker sees more than a run's folder: its rounds, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedclip.config.loading import dump_config
from fedclip.experiment.context import RunContext
from fedclip.experiment.engine import create_engine
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.identity import take_up
from fedclip.experiment.openness import Openness
from fedclip.experiment.privacy import begin_privacy
from fedclip.experiment.privacy_checks import check_privacy
from fedclip.experiment.run import rounds_of
from fedclip.experiment.strategy import choose_strategy
from fedclip.federated.rounds import Engine
from fedclip.reports.listener import Listener


def train_watched(
    context: RunContext,
    place: Path,
    listener: Listener,
    *,
    planted: Callable[[Openness], Openness] = lambda privacy: privacy,
    watched: Callable[[Engine], Engine] = lambda engine: engine,
) -> Openness:
    """Train all rounds, without evaluations and adapters; returns the privacy with its ledger.

    `planted` may change the run's privacy before the first round, `watched` is put around the
    engine; the noise, its key and the ledger are those of any run.
    """
    check_privacy(context, choose_strategy)
    folder = RunFolder.create(place, dump_config(context.config))
    first = take_up(context, folder)
    privacy = planted(begin_privacy(context, folder, first, listener))
    engine = watched(privacy.engine(partial(create_engine, context)))
    strategy = privacy.strategy(choose_strategy(context))
    for result in rounds_of(context, engine, strategy, 0, first.state, listener, privacy):
        listener.message(f"round {result.server_round} of {context.config.federation.rounds}")
    return privacy
