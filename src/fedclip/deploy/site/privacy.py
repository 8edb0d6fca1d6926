"""Local differential privacy of a site: its noise key, its ledger, and what is withheld.

The site trusts nobody with it: it finds its noise multiplier from its own number of examples and
the rounds of the job, and notes what a request costs before it trains. A request that comes again
is answered by the same bytes; another one under the same round costs again, and has other noise.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedclip.config import Config
from fedclip.errors import UsageError
from fedclip.experiment.context import RunContext
from fedclip.experiment.privacy import KEY, LEDGER, noise_of
from fedclip.experiment.privacy_checks import require_fit
from fedclip.federated.privacy.charging import ChargedEngine, with_digest
from fedclip.federated.privacy.dp_sgd import DpSgd, steps_of
from fedclip.federated.privacy.ledger import FORMAT, Books, BudgetSpent, Ledger, Mechanism
from fedclip.federated.privacy.secret import Draws, create_key, fingerprint, read_key
from fedclip.federated.rounds import Engine
from fedclip.records import ClientReport, TrainRequest

FOLDER = "privacy"
"""Of a site's state: a folder for each run with its key and ledger."""


@dataclass(frozen=True)
class SitePrivacy:
    """The privacy of one run at a site, within what the site spends over all runs.

    `most` is that total, None without one: the sum of the runs' epsilons (basic composition), each
    at the delta of its run.
    """

    ledger: Ledger
    dp_sgd: DpSgd
    steps: Mapping[str, int]
    most: float | None = None

    def around(self, engine: Engine) -> Engine:
        """The engine, behind the books."""
        return ChargedEngine(engine.train, self, self.steps)

    def charge(self, request: TrainRequest, steps: Mapping[str, int]) -> None:
        """Note what a request takes; raises BudgetSpent where the site may not spend as much."""
        if self.most is not None:
            elsewhere = self.elsewhere()
            after = elsewhere + self.ledger.after(request, steps).least
            if after > self.most:
                raise BudgetSpent(
                    f"the request would take epsilon over all runs to {after:.4g}, "
                    f"{elsewhere:.4g} of it by other runs; policy.total_epsilon is {self.most:g}"
                )
        self.ledger.charge(request, steps)

    def elsewhere(self) -> float:
        """Epsilon that other runs have spent here; raises UsageError for books that are damaged."""
        here = self.ledger.path
        runs = (run for run in here.parent.parent.iterdir() if run.suffix != ".part")
        others = (run / LEDGER for run in sorted(runs) if run != here.parent)
        return sum(Ledger.read(path).epsilon().least for path in others)

    def told(self, report: ClientReport, request: TrainRequest) -> ClientReport:
        """The report as it may leave: without losses, with the epsilon spent up to the request.

        So a request that comes again is answered by the same bytes, whatever came after it.
        """
        spent = self.ledger.epsilon_with(with_digest(request)).least
        return replace(report, loss=math.nan, start_loss=math.nan, epsilon=spent)

    def end(self) -> None:
        """Delete the key of a run without rounds left: who has it can take the noise away."""
        (self.ledger.path.parent / KEY).unlink(missing_ok=True)


def begin_site_privacy(
    context: RunContext, run: str, site: str, state: Path, most: float | None
) -> SitePrivacy | None:
    """The privacy that a job asks for, its key and ledger made or taken up; None for none.

    Raises UsageError where it cannot be kept: too few examples, delta, a draw from the seed, books
    or a key that are damaged or missing.
    """
    config = context.config
    if config.privacy.unit is None:
        return None
    _require_sites_own(config)
    require_fit(context)
    name = hashlib.sha256(run.encode()).hexdigest()[:32]  # a run's name comes from elsewhere
    folder = state / FOLDER / name
    ((client, examples),) = context.clients.items()
    rate, each = config.data.batch_size / examples, config.client.local_epochs
    steps = {client: each * steps_of(examples, config.data.batch_size)}
    if folder.exists():
        key = read_key(folder / KEY)
        ledger = Ledger.read(folder / LEDGER, run=name, key_sha256=fingerprint(key))
        if client not in ledger.books.mechanisms:
            raise UsageError(
                f"{folder / LEDGER}: privacy books of another site; put this site's own back, or "
                "take part in a new run"
            )
        if ledger.books.mechanisms[client].sampling_rate != rate:
            raise UsageError(
                f"{folder / LEDGER}: the site had another number of training examples when this "
                "run began; put the images back, or take part in a new run"
            )
    else:
        noise = noise_of(config.privacy, rate, config.federation.rounds * steps[client])
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True, mode=0o700)
            key = create_key(part / KEY)
            Ledger.create(part / LEDGER, _books(config, name, key, client, rate, noise))
            part.rename(folder)  # both or none: books that are gone later count as spent
        except OSError as error:
            raise UsageError(
                f"{folder} cannot be made: {error.strerror}; the site needs a place for its noise "
                "key and its privacy books: mend its `state`"
            ) from None
        ledger = Ledger.read(folder / LEDGER)
    draws = Draws(key, "site", site, "run", name)
    multiplier = ledger.books.mechanisms[client].noise_multiplier
    dp_sgd = DpSgd(config.privacy.clip_norm, {client: multiplier}, draws, config.data.batch_size)
    return SitePrivacy(ledger, dp_sgd, steps, most)


def _require_sites_own(config: Config) -> None:
    if config.privacy.unit != "example":
        raise UsageError("the run's privacy.unit must be example: a site hides its own examples")
    if config.privacy.reproducible:
        raise UsageError(
            "the run asks for noise that follows from its seed (privacy.reproducible), which hides "
            "nothing; a site draws from a secret of its own"
        )


def _books(config: Config, run: str, key: bytes, client: str, rate: float, noise: float) -> Books:
    assert config.privacy.delta is not None
    return Books(
        format=FORMAT,
        run=run,
        key_sha256=fingerprint(key),
        delta=config.privacy.delta,
        largest_epsilon=config.privacy.target_epsilon,
        mechanisms={client: Mechanism(sampling_rate=rate, noise_multiplier=noise)},
        entries=[],
    )
