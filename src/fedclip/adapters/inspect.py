"""What can be asked of a configuration or a run without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedclip.adapters.load import finished, load_run_model
from fedclip.adapters.predict import predict
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.data.datasets import load_source
from fedclip.deploy.message_sizes import expected_messages
from fedclip.errors import UsageError
from fedclip.evaluation.breakdown import in_detail
from fedclip.experiment.build import (
    assemble_run,
    check_partition,
    for_task,
    model_config,
    model_seed,
)
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.context import Parts, TaskParts
from fedclip.experiment.evaluate import (
    evaluate_matrix,
    evaluate_merged,
    evaluate_parts,
    evaluate_run,
    predict_all,
)
from fedclip.experiment.folder import CONFIG, SUMMARY, RunFolder
from fedclip.experiment.strategy import choose_strategy, expected_traffic
from fedclip.models.clip import create_clip_model
from fedclip.records import RunState
from fedclip.reports.listener import Listener

__all__ = ["evaluate", "info", "load_run_model", "predict"]

_BYTES = 4  # of an fp32 parameter, the format that travels


def info(target: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Parameters and traffic of a configuration file or a run, against full fine-tuning.

    Counts are parameters, traffic is in bytes per client and round, each way; messages are what
    `fedclip coordinate` sends, headers and formats included. A finished run's
    summary comes with it.
    """
    path = Path(target)
    run_folder = RunFolder.open(path) if path.is_dir() else None
    config = load_config(run_folder.path / CONFIG if run_folder else path, overrides)
    model = create_clip_model(
        model_config(config), class_names=_class_names(config), seed=model_seed(config)
    )
    counts = model.get_model_summary()
    traffic = expected_traffic(config, model.trainable())
    messages = expected_messages(config, model.get_parameters())
    full = counts["base_parameters"] * _BYTES
    facts: dict[str, Any] = {
        **counts,
        "bytes_up_per_client_round": traffic.up,
        "bytes_down_per_client_round": traffic.down,
        "message_bytes_up_per_site_round": messages.up,
        "message_bytes_down_per_site_round": messages.down,
        "full_fine_tuning_bytes": full,
        "times_less_traffic": 2 * full / sum(traffic) if sum(traffic) else None,
        "rounds": config.federation.rounds,
    }
    if run_folder and run_folder.is_finished():
        facts["summary"] = run_folder.read_json(SUMMARY)
    return facts


def evaluate(
    folder: str | Path, *, listener: Listener | None = None, detail: bool = False
) -> dict[str, Any]:
    """Evaluates a finished run's adapter again, on the central test set and by client.

    With `detail` the figures hold one more, `detail`: by class, site and confidence, beside the
    base model (`evaluation.breakdown.in_detail`). Of several tasks, `adapters` has the accuracy of
    every adapter on every task.
    """
    run_folder = finished(folder)
    config = load_config(run_folder.path / CONFIG)
    if detail and config.task == "contrastive":
        raise UsageError(
            f"--full: {folder} has learned from captions, and these figures are about classes; "
            "leave it out for the recalls"
        )
    with listener or Listener() as listener:
        if detail and config.tasks:
            raise UsageError(f"{folder} has several tasks; figures in detail are for runs on one")
        parts = assemble_run(config, listener)
        check_partition(parts, run_folder)
        figures = (
            _of_tasks(parts, run_folder)
            if isinstance(parts, TaskParts)
            else _of_one(parts, run_folder, detail)
        )
    summary = run_folder.read_json(SUMMARY)
    names = ("accuracy", *summary.get("metrics", ()))
    return {f"zero_shot_{name}": summary[f"zero_shot_{name}"] for name in names} | figures


def _of_one(parts: Parts, run_folder: RunFolder, detail: bool) -> dict[str, Any]:
    personal = None
    if choose_strategy(parts).personal:
        personal = _last_state(run_folder)
    else:
        parts.model.load_adapter(run_folder.path / "adapter")
    figures = evaluate_parts(parts, personal=personal)
    return figures | ({"detail": _detail(parts, personal)} if detail else {})


def _of_tasks(parts: TaskParts, run_folder: RunFolder) -> dict[str, Any]:
    state = _last_state(run_folder)
    figures = evaluate_run(parts, state, personal=choose_strategy(parts).personal)
    adapters = evaluate_matrix(parts, state)
    if state.groups:
        adapters["merged"] = evaluate_merged(parts, run_folder.path / "adapter")
    return {**figures, "adapters": adapters}


def _last_state(run_folder: RunFolder) -> RunState:
    checkpoint = Checkpoint.load(run_folder)
    if checkpoint is None:
        raise UsageError(
            f"{run_folder.path} has lost its checkpoint.safetensors, in which the adapters of "
            "clients and groups are; put it back"
        )
    return checkpoint.state


def _detail(parts: Parts, personal: RunState | None) -> dict[str, Any]:
    trained, by_client = predict_all(parts, personal=personal)
    base, base_by_client = predict_all(parts, base=True, personal=personal)
    sites = {name: (found, base_by_client[name]) for name, found in by_client.items()}
    return in_detail(trained, base, sites, parts.data.class_names)


def _class_names(config: Config) -> tuple[str, ...] | None:
    """The classes, as far as counting needs them: only a linear head's size depends on them."""
    if config.tasks:
        return _class_names(for_task(config, next(iter(config.tasks))))
    data = config.data
    if config.task == "contrastive":
        return None
    if data.class_names:
        return data.class_names
    try:
        return load_source(data.name, path=data.path, layout=data.layout).class_names
    except UsageError:
        if config.model.num_classes:
            return None
        if config.model.head == "linear":
            raise
        return ("any class",)
