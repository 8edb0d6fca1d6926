"""From a configuration to the parts of a run: model, data, engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedclip.compute import resolve_device, resolve_precision
from fedclip.config import Config
from fedclip.data.federation import FederatedData, load_federated
from fedclip.engines.batched import BatchedEngine
from fedclip.engines.memory import choose_group_size
from fedclip.engines.sequential import SequentialEngine
from fedclip.errors import UsageError
from fedclip.evaluation.federated import evaluate_federation
from fedclip.federated.client import LocalSettings
from fedclip.federated.server import Engine
from fedclip.models.base import load_pixels
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.stacked import StackedClients
from fedclip.reports.progress import Listener
from fedclip.runs import PARTITION, RunFolder
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    config: Config
    model: CLIPLoRAWrapper
    data: FederatedData
    device: torch.device
    precision: str

    @property
    def clients(self) -> dict[str, int]:
        """Numbers of training examples by client id."""
        return {c.client_id: len(c.train) for c in self.data.clients}

    @property
    def clients_per_round(self) -> int:
        """How many clients take part in a round; a fraction is rounded, but never to none."""
        share, all_clients = self.config.federation.clients_per_round, len(self.data.clients)
        if share is None:
            return all_clients
        if isinstance(share, int):
            return min(share, all_clients)
        return max(1, round(share * all_clients))


def assemble(config: Config, listener: Listener) -> Parts:
    """Loads the base model and the data set, and builds the model that both call for."""
    device = resolve_device(config.device)
    listener.message(f"loading {config.model.model_name} and {config.data.name}")
    pixels = load_pixels(config.model.model_name)
    data = load_federated(
        config.data,
        num_clients=config.federation.num_clients,
        seed=config.seed,
        to_pixels=pixels.to_pixels,
        pixels_key=pixels.key,
        progress=listener.images,
    )
    model = create_clip_model(
        config.model,
        class_names=data.class_names,
        templates=data.templates,
        seed=model_seed(config),
    )
    model.to(device)
    parts = Parts(config, model, data, device, resolve_precision(config.precision, device))
    return replace(parts, config=_with_engine(parts, listener))


def _with_engine(parts: Parts, listener: Listener) -> Config:
    """The configuration with its engine settled: what `auto` and an empty group size stand for."""
    engine = parts.config.engine
    unstackable = {
        "full fine-tuning": not parts.model.is_lora_enabled(),
        "fp16, whose loss scale is each client's own,": parts.precision == "fp16",
    }
    for what, present in unstackable.items():
        if present and engine.name == "batched":
            listener.message(f"{what} is not stacked: it runs on the sequential engine")
            engine = engine.model_copy(update={"name": "sequential"})
    if engine.name == "batched" and engine.group_size is None:
        size = choose_group_size(
            StackedClients(parts.model),
            parts.model.get_parameters(),
            image_size=parts.model.image_size,
            batch_size=parts.config.data.batch_size,
            clients=parts.clients_per_round,
            memory_gb=engine.memory_gb,
            device=parts.device,
        )
        engine = engine.model_copy(update={"group_size": size})
    return parts.config.model_copy(update={"engine": engine})


def evaluate_parts(parts: Parts) -> dict[str, Any]:
    """Figures of the model as it stands, as the configuration asks for them."""
    return evaluate_federation(
        parts.model,
        parts.data,
        max_examples=parts.config.evaluation.max_examples,
        seed=parts.config.seed,
        device=parts.device,
        precision=parts.precision,
        # As much memory as training takes, at most: no activations are kept here.
        batch_size=min(256, 4 * parts.config.data.batch_size),
    )


def check_partition(data: FederatedData, folder: RunFolder) -> None:
    """Refuses data that is no longer what the run began with."""
    if folder.read_json(PARTITION) != data.partition_record():
        raise UsageError(
            f"{folder.path / PARTITION}: the data or its partition has changed since the run "
            "began; put the data back as it was, or start a new run"
        )


def model_seed(config: Config) -> int:
    """Seed of what is drawn when the model is made: adapter, linear head, random base weights."""
    return seed_for(config.seed, "model")


def local_settings(config: Config, precision: str) -> LocalSettings:
    """How the configuration asks every client to train."""
    return LocalSettings(
        local_epochs=config.client.local_epochs,
        batch_size=config.data.batch_size,
        accumulation_steps=config.data.accumulation_steps,
        optimizer=config.optimizer.name,
        learning_rate=config.client.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        schedule=config.optimizer.schedule,
        proximal_mu=config.client.proximal_mu,
        precision=precision,
        augment=config.data.augment,
    )


def create_engine(parts: Parts) -> Engine:
    """The engine that the configuration names."""
    name = parts.config.engine.name
    if name not in ENGINES:
        raise UsageError(
            f"engine.name: unknown engine {name!r}; known: {', '.join(sorted(ENGINES))}"
        )
    return ENGINES[name](parts)


def _sequential(parts: Parts) -> Engine:
    return SequentialEngine(parts.model, **_common(parts))


def _batched(parts: Parts) -> Engine:
    group_size = parts.config.engine.group_size
    assert group_size is not None  # assemble settles it
    return BatchedEngine(StackedClients(parts.model), group_size=group_size, **_common(parts))


def _common(parts: Parts) -> dict[str, Any]:
    return {
        "pixels": parts.data.pixels,
        "labels": parts.data.labels,
        "clients": {c.client_id: c.train for c in parts.data.clients},
        "settings": local_settings(parts.config, parts.precision),
        "seed": parts.config.seed,
        "device": parts.device,
    }


ENGINES: Mapping[str, Callable[[Parts], Engine]] = {"batched": _batched, "sequential": _sequential}
