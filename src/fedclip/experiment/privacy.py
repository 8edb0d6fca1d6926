"""Privacy of a run under way: its noise, key and ledger, what it tells and what it promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedclip.config import Config, PrivacyConfig
from fedclip.errors import UsageError
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.context import RunContext
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.openness import Openness, public_part
from fedclip.federated.privacy.accounting import Spent, largest, noise_for
from fedclip.federated.privacy.adaptive_clip import ClipNorm, noise_of_sum
from fedclip.federated.privacy.charging import ChargedEngine
from fedclip.federated.privacy.client_level import ClientMechanism, PrivateMean
from fedclip.federated.privacy.dp_sgd import DpSgd, steps_of
from fedclip.federated.privacy.ledger import FORMAT, Books, Ledger, Mechanism
from fedclip.federated.privacy.secret import (
    Draws,
    create_key,
    fingerprint,
    read_key,
    reproducible_key,
)
from fedclip.federated.rounds import Engine, RoundResult, Sample, sample_clients
from fedclip.federated.strategies import Strategy
from fedclip.federated.strategies.wrappers import NORM, AdaptiveClip, Guarding
from fedclip.federated.updates import Updates
from fedclip.records import ClientReport, TrainRequest
from fedclip.reports.listener import Listener

KEY, LEDGER = "noise.key", "ledger.json"
MEAN = "mean over clients"
NO_GUARANTEE = (
    "privacy.reproducible: noise and batches follow from the seed: no guarantee of privacy"
)


@dataclass(frozen=True)
class RunPrivacy(Openness):
    """The privacy of one run that is under way."""

    tells_classes = False
    config: PrivacyConfig
    metrics: tuple[str, ...]
    ledger: Ledger
    dp_sgd: DpSgd | None = None
    mechanism: ClientMechanism | None = None
    clip: ClipNorm | None = None
    steps: Mapping[str, int] | None = None
    sample: Sample | None = None

    def engine(self, create: Callable[[DpSgd | None], Engine]) -> Engine:
        """The engine, which trains privately and by the books where examples are hidden."""
        inner = create(self.dp_sgd)
        if self.steps is None:
            return inner
        return ChargedEngine(inner.train, self.ledger, self.steps)

    def strategy(self, inner: Strategy) -> Strategy:
        """The strategy, which sees nothing but noisy means where clients are hidden."""
        if self.mechanism is None:
            return inner
        private = Guarding(inner, self.guard)
        return private if self.clip is None else AdaptiveClip(private, self.clip)

    def hears(self, listener: Listener) -> Callable[[ClientReport], None]:
        """Nobody."""
        return lambda report: None

    def record(self) -> dict[str, Any]:
        """What has been spent so far, for a round's record and the summary."""
        spent = self.ledger.epsilon()
        norm = {} if self.clip is None else {"clip_norm": self.clip.norm}
        return {"epsilon": spent.least, "epsilon_rdp": spent.rdp, **norm}

    def shown(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What speaks of the adapter and of test images, and not of single clients."""
        return public_part(record, self.metrics)

    def public(self, folder: RunFolder, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record without the rest, and with what was spent."""
        shown = self.shown(record)
        if self.config.tell:
            mark = {"server_round": record["server_round"], "outside_the_guarantee": True}
            rest = {k: v for k, v in record.items() if k not in (*shown, "seconds_by_client")}
            folder.append_told(mark | rest)
        return shown | self.record()

    def result(self, result: RoundResult) -> RoundResult:
        """The round as it may be counted: with the bytes of those expected to take part."""
        if self.mechanism is None:
            return result
        down, news = result.bytes_up, result.state.news
        if news is not None:
            down = self.mechanism.expected * sum(tensor.nbytes for tensor in news.values())
        return replace(result, bytes_down=down)

    def promise(self) -> dict[str, Any]:
        """What the run promises, for its summary and its card."""
        books = self.ledger.books
        noises = [own.noise_multiplier for own in books.mechanisms.values()]
        return {
            "privacy": {
                "guarantee": not self.config.reproducible,
                "unit": self.config.unit,
                "clip_norm": self.config.clip_norm,
                **self.record(),
                "delta": books.delta,
                "noise_multiplier": [min(noises), max(noises)],
            }
        }

    def end(self, folder: RunFolder, summary: Mapping[str, Any]) -> None:
        """Deletes the key of a run without rounds left: who has it can take the noise away."""
        if summary["stopped_by"] is None:
            (folder.path / KEY).unlink(missing_ok=True)

    def guard(self, updates: Updates) -> Updates:
        """The updates, of which nothing but the private mean is given."""
        assert self.mechanism is not None
        return PrivateMean(updates, self.mechanism, self._charge, self.clip)

    def _charge(self, request: TrainRequest) -> None:
        self.ledger.charge(request, {MEAN: 1})


def begin_privacy(
    context: RunContext, folder: RunFolder, checkpoint: Checkpoint, listener: Listener
) -> Openness:
    """Make or take up the key and the ledger of the run that a checkpoint belongs to."""
    config, run, finished = context.config, checkpoint.identity["run"], checkpoint.finished_rounds
    if config.privacy.unit is None:
        return Openness()
    path, total = folder.path / LEDGER, config.federation.rounds
    if config.privacy.reproducible:
        key = reproducible_key(config.seed)
    elif not (folder.path / KEY).exists() and path.exists() and finished >= total:
        key = None  # deleted after the last round, and no longer needed
    elif (folder.path / KEY).exists() or path.exists() or finished > 0:
        key = read_key(folder.path / KEY)
    else:
        key = create_key(folder.path / KEY)
    if path.exists():
        ledger = Ledger.read(path, run=run, key_sha256=None if key is None else fingerprint(key))
    elif key is None or finished > 0:
        raise UsageError(
            f"{path} is missing, and what it says counts as spent: put it back, or start a new run"
        )
    else:
        ledger = Ledger.create(path, _books(context, run, key))
    listener.message(_in_words(config.privacy))
    names = context.model.trainable()
    if config.privacy.unit == "example" and any("text_model" in name for name in names):
        listener.message(
            "the text tower is trained: each example costs a pass of all prompts; adapters in "
            "model.lora.target_modules.vision_encoder alone cost none"
        )
    return _running(context, ledger, Draws(key or b"", "run", run), checkpoint)


def _in_words(privacy: PrivacyConfig) -> str:
    amount = (
        f"noise multiplier {privacy.noise_multiplier:g}"
        if privacy.target_epsilon is None
        else f"epsilon {privacy.target_epsilon:g}"
    )
    whom = {"example": "each example", "client": "each client, all of whom weigh the same"}
    stamp = f"; {NO_GUARANTEE}" if privacy.reproducible else ""
    return f"privacy of {whom[privacy.unit or '']}: {amount}, delta {privacy.delta:g}{stamp}"


def _books(context: RunContext, run: str, key: bytes) -> Books:
    """New books, with the noise that each mechanism needs."""
    config = context.config
    privacy = config.privacy
    assert privacy.delta is not None
    noise = partial(noise_of, privacy)
    rounds = config.federation.rounds
    if privacy.unit == "client":
        rate = context.clients_per_round / len(context.clients)
        found = {MEAN: (rate, noise(rate, rounds))}
    else:
        each, asked = _steps(config, context.clients), _times_asked(context)
        rates = {c: config.data.batch_size / n for c, n in context.clients.items()}
        found = {c: (q, noise(q, max(1, asked[c]) * each[c])) for c, q in rates.items()}
    return Books(
        format=FORMAT,
        run=run,
        key_sha256=fingerprint(key),
        delta=privacy.delta,
        largest_epsilon=privacy.target_epsilon,
        mechanisms={
            n: Mechanism(sampling_rate=q, noise_multiplier=z) for n, (q, z) in found.items()
        },
        entries=[],
    )


def epsilon_at_end(context: RunContext) -> float | None:
    """The epsilon that a run spends in all its rounds, by the client that spends most of it."""
    if context.config.privacy.unit is None:
        return None
    books = _books(context, "", b"")
    if context.config.privacy.unit == "client":
        steps = {MEAN: context.config.federation.rounds}
    else:
        each, asked = _steps(context.config, context.clients), _times_asked(context)
        steps = {client: asked[client] * each[client] for client in each}
    parties = [
        Spent(own.sampling_rate, own.noise_multiplier, steps[name])
        for name, own in books.mechanisms.items()
    ]
    return largest(parties, books.delta).least


def noise_of(privacy: PrivacyConfig, rate: float, steps: int) -> float:
    """The noise multiplier that is configured, or that so many steps need."""
    if privacy.target_epsilon is None:
        assert privacy.noise_multiplier is not None
        return privacy.noise_multiplier
    assert privacy.delta is not None
    return noise_for(privacy.target_epsilon, privacy.delta, rate, steps)


def _running(
    context: RunContext, ledger: Ledger, draws: Draws, checkpoint: Checkpoint
) -> RunPrivacy:
    config, noises = context.config, ledger.books.mechanisms
    private = RunPrivacy(config.privacy, config.evaluation.metrics, ledger)
    if config.privacy.unit == "client":
        norm, noise = config.privacy.clip_norm, noises[MEAN].noise_multiplier
        expected, quantile = context.clients_per_round, config.privacy.clip_quantile
        clip = None
        if quantile is not None:
            kept = checkpoint.state.server.get(NORM)
            clip = ClipNorm(norm if kept is None else float(kept), quantile)
            noise = noise_of_sum(noise, expected)
        mechanism = ClientMechanism(norm, noise, len(context.clients), expected, draws)
        return replace(private, mechanism=mechanism, clip=clip, sample=mechanism.sample)
    dp_sgd = DpSgd(
        config.privacy.clip_norm,
        {client_id: own.noise_multiplier for client_id, own in noises.items()},
        draws,
        config.data.batch_size,
    )
    steps = _steps(config, context.clients)
    return replace(private, dp_sgd=dp_sgd, steps=steps)


def _steps(config: Config, clients: Mapping[str, int]) -> dict[str, int]:
    """Each client's steps in a round."""
    epochs, size = config.client.local_epochs, config.data.batch_size
    return {client_id: epochs * steps_of(n, size) for client_id, n in clients.items()}


def _times_asked(context: RunContext) -> dict[str, int]:
    """In how many rounds each client takes part, which the seed decides."""
    config, clients = context.config, context.clients
    times = dict.fromkeys(clients, 0)
    for server_round in range(1, config.federation.rounds + 1):
        for c in sample_clients(clients, context.clients_per_round, server_round, config.seed):
            times[c] += 1
    return times
