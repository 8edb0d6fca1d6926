"""A run from start to end: build the parts, go through the rounds, write the run folder.

This is the file to read first. A fresh run and one that goes on after a kill take the same path:
the only difference is where the round loop starts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedclip.assembly import Parts, assemble, create_engine
from fedclip.config import Config
from fedclip.config_io import config_from_dict, dump_config, load_config
from fedclip.data.federation import FederatedData
from fedclip.errors import UsageError
from fedclip.evaluation.federated import evaluate_federation
from fedclip.federated.server import RoundResult, run_rounds
from fedclip.federated.strategies import create_strategy
from fedclip.models.adapter_files import adapter_sha256
from fedclip.records import State
from fedclip.reports.curves import curves_png
from fedclip.reports.progress import Listener
from fedclip.runs import RunFolder


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its figures (`summary.json`)."""

    folder: Path
    summary: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The last round's adapter, a PEFT folder."""
        return self.folder / "adapter"


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    output: str | Path | None = None,
    listener: Listener | None = None,
) -> Run:
    """Runs a configuration, given as a tree, a dictionary or a YAML file, into a new folder.

    `output` is the run folder, by default the next free one under `runs/`. Raises UsageError for
    anything that the user can mend, before the folder is made.
    """
    name = Path(config).stem if isinstance(config, str | Path) else "run"
    config = _as_config(config)
    path = RunFolder.free_path(output, name)
    with listener or Listener() as listener:
        parts = assemble(config, listener)
        folder = RunFolder.create(path, dump_config(config))
        return _execute(parts, folder, listener)


def resume(folder: str | Path, *, listener: Listener | None = None) -> Run:
    """Goes on with a run that was stopped; a finished one is returned as it is."""
    run_folder = RunFolder.open(Path(folder))
    if run_folder.is_finished():
        return Run(run_folder.path, run_folder.read_json("summary.json"))
    with listener or Listener() as listener:
        parts = assemble(load_config(run_folder.path / "config.yaml"), listener)
        return _execute(parts, run_folder, listener)


def _as_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return config_from_dict(config)
    return load_config(Path(config))


def _execute(parts: Parts, folder: RunFolder, listener: Listener) -> Run:
    """The path of every run: partition, zero-shot, rounds, adapter, summary."""
    config, model = parts.config, parts.model
    with folder.lock():
        _record_partition(parts.data, folder, listener)
        progress = _Progress.load(folder, parts)
        if progress.finished_rounds < 0:
            _finish_round(parts, folder, progress, _before_training(parts), 0.0, listener)
        listener.rounds(
            progress.finished_rounds, config.federation.rounds, parts.clients_per_round
        )
        rounds = run_rounds(
            progress.state,
            create_engine(parts),
            create_strategy(config.federation.strategy),
            clients=parts.clients,
            rounds=config.federation.rounds,
            clients_per_round=parts.clients_per_round,
            seed=config.seed,
            finished_rounds=progress.finished_rounds,
            on_client=listener.client,
        )
        started = time.perf_counter()
        for result in rounds:
            training_seconds = time.perf_counter() - started
            model.set_parameters(result.state)
            progress.state = result.state
            record = _round_record(parts, result)
            _finish_round(parts, folder, progress, record, training_seconds, listener)
            started = time.perf_counter()
        return _finish_run(parts, folder, progress)


@dataclass
class _Progress:
    """How far a run has come: all that the next round needs."""

    finished_rounds: int
    state: State
    best_state: State | None = None
    best: dict[str, Any] | None = None

    @classmethod
    def load(cls, folder: RunFolder, parts: Parts) -> _Progress:
        """The last checkpoint's, or the start's (-1 rounds) when there is none."""
        checkpoint = folder.load_checkpoint()
        if checkpoint is None:
            folder.truncate_metrics(-1)
            return cls(-1, parts.model.get_parameters())
        tensors, meta = checkpoint
        folder.truncate_metrics(meta["round"])
        homes: dict[str, dict[str, Any]] = {"state": {}, "best": {}}
        for path, tensor in tensors.items():
            home, _, name = path.partition("/")
            homes[home][name] = tensor
        parts.model.set_parameters(homes["state"])
        return cls(meta["round"], homes["state"], homes["best"] or None, meta["best"])

    def save(self, folder: RunFolder) -> None:
        """Writes the checkpoint, whole or not at all."""
        tensors = {f"state/{name}": tensor for name, tensor in self.state.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in (self.best_state or {}).items()}
        folder.save_checkpoint(tensors, {"round": self.finished_rounds, "best": self.best})

    def keep_if_best(self, record: Mapping[str, Any]) -> None:
        """Remembers the state of the best validation accuracy, the earliest of equals."""
        accuracy = record.get("validation_accuracy")
        if accuracy is None or (self.best and accuracy <= self.best["validation_accuracy"]):
            return
        self.best = {"round": record["round"], "validation_accuracy": accuracy}
        self.best_state = self.state


def evaluate_parts(parts: Parts) -> dict[str, Any]:
    """Figures of the model as it stands, as the configuration asks for them."""
    return evaluate_federation(
        parts.model,
        parts.data,
        max_examples=parts.config.evaluation.max_examples,
        seed=parts.config.seed,
        device=parts.device,
        precision=parts.precision,
    )


def _before_training(parts: Parts) -> dict[str, Any]:
    """Round 0: the untrained model, and the base model with CLIP's own zero-shot classifier."""
    figures = evaluate_parts(parts)
    zero_shot = figures["accuracy"]
    if parts.model.head != "text":
        with parts.model.zero_shot():
            zero_shot = evaluate_parts(parts)["accuracy"]
    return {"round": 0, "zero_shot_accuracy": zero_shot} | figures


def _round_record(parts: Parts, result: RoundResult) -> dict[str, Any]:
    record = {
        "round": result.server_round,
        "loss": result.loss,
        "num_examples": sum(r.num_examples for r in result.reports),
        "clients": {r.client_id: {"loss": r.loss, "steps": r.steps} for r in result.reports},
        "seconds_by_client": {r.client_id: r.seconds for r in result.reports},
    }
    last = result.server_round == parts.config.federation.rounds
    if last or result.server_round % parts.config.evaluation.every == 0:
        record |= evaluate_parts(parts)
    return record


def _finish_round(
    parts: Parts,
    folder: RunFolder,
    progress: _Progress,
    record: dict[str, Any],
    training_seconds: float,
    listener: Listener,
) -> None:
    """Writes a round's lines and its checkpoint; times go to a file of their own."""
    timing = {
        "round": record["round"],
        "training_seconds": training_seconds,
        "clients": record.pop("seconds_by_client", {}),
    }
    progress.finished_rounds = record["round"]
    if parts.config.evaluation.keep_best and record["round"] > 0:
        progress.keep_if_best(record)
    # Metrics first: on resume they are cut back to the checkpoint, and never fall behind it.
    folder.append_metrics(record)
    folder.append_timing(timing)
    progress.save(folder)
    listener.round(record)


def _record_partition(data: FederatedData, folder: RunFolder, listener: Listener) -> None:
    """Writes the partition, or checks that a resumed run still has the data it began with."""
    record = data.partition_record()
    if not folder.has("partition.json"):
        folder.write_json("partition.json", record)
    elif folder.read_json("partition.json") != record:
        raise UsageError(
            f"{folder.path / 'partition.json'}: the data or its partition has changed since the "
            "run began; put the data back as it was, or start a new run"
        )
    listener.partition(data.class_names, data.table())


def _finish_run(parts: Parts, folder: RunFolder, progress: _Progress) -> Run:
    """Writes adapters, curves and, last, the summary, whose presence says: finished."""
    if progress.best_state:
        parts.model.set_parameters(progress.best_state)
        parts.model.save_adapter(folder.path / "adapter_best")
    parts.model.set_parameters(progress.state)
    parts.model.save_adapter(folder.path / "adapter")
    metrics = folder.read_metrics()
    folder.write_bytes("curves.png", curves_png(metrics, metrics[0]["zero_shot_accuracy"]))
    summary = _summary(parts, progress, metrics)
    summary["seconds"] = folder.seconds()
    folder.write_json("summary.json", summary)
    return Run(folder.path, summary)


def _summary(
    parts: Parts, progress: _Progress, metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    config, counts, last = parts.config, parts.model.get_model_summary(), metrics[-1]
    payload = sum(t.numel() * t.element_size() for t in progress.state.values())
    return {
        "model": config.model.model_name,
        "data": config.data.name,
        "strategy": config.federation.strategy,
        "engine": config.engine.name,
        "seed": config.seed,
        "rounds": config.federation.rounds,
        "clients": len(parts.data.clients),
        "clients_per_round": parts.clients_per_round,
        "zero_shot_accuracy": metrics[0]["zero_shot_accuracy"],
        "initial_accuracy": metrics[0]["accuracy"],
        "accuracy": last["accuracy"],
        "validation_accuracy": last["validation_accuracy"],
        "client_accuracy": last["client_accuracy"],
        "best": progress.best,
        "base_parameters": counts["base_parameters"],
        "total_parameters": counts["total_parameters"],
        "trainable_parameters": counts["trainable_parameters"],
        "bytes_up_per_client_round": payload,
        "bytes_down_per_client_round": payload,
        "device": str(parts.device),
        "precision": parts.precision,
        "bad_images": len(parts.data.bad_images),
        "adapter_sha256": adapter_sha256(progress.state),
        "versions": {
            name: version(name) for name in ("fedclip", "torch", "transformers", "peft", "numpy")
        },
    }
