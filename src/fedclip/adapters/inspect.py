"""What can be asked of a configuration or a run without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedclip.adapters.load import (
    finished,
    load_run_model,
    refuse_files,
    run_and_adapter,
    summary_of,
    without_files,
)
from fedclip.adapters.predict import predict
from fedclip.catalog import STRATEGIES, in_file, is_given
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.data.datasets import load_source
from fedclip.deploy.coordinator.context import coordinator_context
from fedclip.deploy.coordinator.run_files import DeployFiles
from fedclip.deploy.message_sizes import expected_messages
from fedclip.errors import UsageError
from fedclip.evaluation.breakdown import class_rows, in_detail
from fedclip.evaluation.predictions import none
from fedclip.experiment.build import (
    build,
    check_partition,
    check_split_rule,
    model_config,
    model_seed,
)
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.context import RunContext, for_task
from fedclip.experiment.evaluate import (
    evaluate_matrix,
    evaluate_merged,
    evaluate_model,
    evaluate_run,
    predict_all,
)
from fedclip.experiment.folder import CONFIG, METRICS, PARTITION, SUMMARY, RunFolder
from fedclip.experiment.identity import check_built, check_measured
from fedclip.experiment.round_records import ZERO_SHOT
from fedclip.experiment.strategy import expected_traffic
from fedclip.experiment.summary import FLOWER
from fedclip.experiment.summary_file import read_summary
from fedclip.federated.strategies.base import own_starts
from fedclip.models.clip import CLIPLoRAWrapper, adapter_sha256, create_clip_model
from fedclip.records import RunState
from fedclip.reports.listener import Listener

__all__ = ["evaluate", "info", "load_run_model", "predict"]

_BYTES = 4  # of an fp32 parameter, the format that travels


def info(
    target: str | Path, overrides: Sequence[str] = (), *, best: bool = False
) -> dict[str, Any]:
    """Parameters and traffic of a configuration file or a run, against full fine-tuning.

    Counts are parameters, traffic is in bytes per client and round, each way; messages are what
    `fedclip coordinate` sends, headers and formats included, None for a run whose strategy is in a
    file of code. A finished run's summary comes with it, with `best` as of its best round.
    """
    path = Path(target)
    if best:
        run_and_adapter(path, best)  # is there
    run_folder = RunFolder.open(path) if path.is_dir() else None
    config = load_config(run_folder.path / CONFIG if run_folder else path, overrides)
    closed = run_folder is not None  # no file of code is run because a run's folder names it
    if run_folder and is_given("data_sets", config.data.name):  # the run folder alone knows them
        names = tuple(run_folder.read_json(PARTITION).get("class_names", ())) or None
    else:
        names = _class_names(config, closed)
    model = create_clip_model(model_config(config), class_names=names, seed=model_seed(config))
    facts = config_facts(config, model, closed=closed)
    if run_folder and run_folder.is_finished():
        facts["summary"] = summary_of(run_folder, best)
    return facts


def config_facts(config: Config, model: CLIPLoRAWrapper, *, closed: bool = False) -> dict[str, Any]:
    """Parameters and traffic of a configuration and its model; `closed`: no file of code is run."""
    counts = model.get_model_summary()
    traffic = expected_traffic(config, model.trainable())
    messages = None
    strategy = config.federation.strategy
    if not (closed and (in_file(strategy) or is_given("strategies", strategy))):
        messages = expected_messages(config, model.get_parameters())
    full = counts["base_parameters"] * _BYTES
    return {
        **counts,
        "input_size": model.image_size,
        "bytes_up_per_client_round": traffic.up,
        "bytes_down_per_client_round": traffic.down,
        "message_bytes_up_per_site_round": messages and messages.up,
        "message_bytes_down_per_site_round": messages and messages.down,
        "full_fine_tuning_bytes": full,
        "times_less_traffic": 2 * full / sum(traffic) if sum(traffic) else None,
        "rounds": config.federation.rounds,
    }


def evaluate(
    folder: str | Path,
    *,
    listener: Listener | None = None,
    detail: bool = False,
    best: bool = False,
) -> dict[str, Any]:
    """Evaluates a finished run's adapter again, on the central test set and by client.

    It is the last round's, or with `best` that of the best round by validation.
    `classes` has recall, precision and F1 of each class, of a run on captions none.
    With `detail` the figures hold one more, `detail`: by class, site and confidence, beside the
    base model (`fedclip.evaluation.breakdown`). Of several tasks, `adapters` has the accuracy of
    every adapter on every task.
    """
    run_folder = finished(folder)
    if best:
        run_and_adapter(folder, best)  # is there
    config = load_config(run_folder.path / CONFIG)
    if detail and config.task == "contrastive":
        raise UsageError(
            f"--full: {folder} has learned from captions, and these figures are about classes; "
            "leave it out for the recalls"
        )
    check_split_rule(run_folder)  # before anything slow
    check_measured(config, run_folder)
    config = without_files(config, "evaluate")
    with listener or Listener() as listener:
        if detail and config.tasks:
            raise UsageError(f"{folder} has several tasks; figures in detail are for runs on one")
        context = _assembled(config, run_folder, listener)
        check_partition({name: task.data for name, task in context.tasks.items()}, run_folder)
        figures = (
            _of_tasks(context, run_folder, best)
            if context.several
            else _of_one(context, run_folder, detail, best)
        )
    summary = read_summary(run_folder)
    names = [f"zero_shot_{name}" for name in ("accuracy", *summary.get("metrics", ()), *ZERO_SHOT)]
    return {name: summary[name] for name in names if name in summary} | figures


def _assembled(config: Config, run_folder: RunFolder, listener: Listener) -> RunContext:
    """The run's context; a coordinator's holds its test images, and neither sites nor their models.

    Refuses a coordinator's run whose figures cannot be had from its folder.
    """
    if read_summary(run_folder)["engine"] != FLOWER:
        return build(config, listener)
    why = "deploy.test_data is false, so it has no test images"
    if config.deploy.test_data:
        why = "every site has a model of its own, and those and the test images are at the sites"
    if not config.deploy.test_data or _is_personal(config, run_folder):
        raise UsageError(
            f"{run_folder.path} is a coordinator's run, which cannot be evaluated here: {why}; the "
            f"sites tested what they got at the end, and told it (accuracy_by_client in {METRICS})"
        )
    return coordinator_context(config, listener, DeployFiles(run_folder.path).sites)


def _of_one(context: RunContext, run_folder: RunFolder, detail: bool, best: bool) -> dict[str, Any]:
    personal = None
    if _is_personal(context.config, run_folder):
        personal = _state(run_folder, best)
        check_built(run_folder, context)
    else:
        context.model.load_adapter(run_and_adapter(run_folder.path, best)[1])
    figures = evaluate_model(context, personal=personal) | _by_class(context)
    return figures | ({"detail": _detail(context, personal)} if detail else {})


def _of_tasks(context: RunContext, run_folder: RunFolder, best: bool) -> dict[str, Any]:
    state = _state(run_folder, best)
    check_built(run_folder, context)
    figures = evaluate_run(context, state, personal=_is_personal(context.config, run_folder))
    figures |= _by_class(context)  # before other adapters are measured
    adapters = evaluate_matrix(context, state)
    if state.groups:
        adapters["merged"] = evaluate_merged(context, run_and_adapter(run_folder.path, best)[1])
    return {**figures, "adapters": adapters}


def _by_class(context: RunContext) -> dict[str, Any]:
    """Recall, precision and F1 of each class in the evaluation just made; none of captions."""
    rows = [
        {**({"task": name} if context.several else {}), **_without_base(row)}
        for name, task in context.tasks.items()
        for last in task.last_test
        for row in class_rows(last.found, none(), task.data.class_names)
    ]
    return {"classes": rows} if rows else {}


def _without_base(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("base_recall", "change")}


def _is_personal(config: Config, run_folder: RunFolder) -> bool:
    """Whether the run has personalised models; a strategy without a row is not loaded for it."""
    federation = config.federation
    if federation.ditto_mu is not None or federation.sharing.mode == "clusters":
        return True
    if federation.strategy in STRATEGIES:
        return STRATEGIES[federation.strategy].personal
    return any(own_starts(_state(run_folder)).values())


def _state(run_folder: RunFolder, best: bool = False) -> RunState:
    """The state that a finished run ended with, which must be the one its summary tells of.

    With `best` that of its best round, which stands in the same checkpoint.
    """
    checkpoint = Checkpoint.load(run_folder)
    if checkpoint is None:
        raise UsageError(
            f"{run_folder.path} has lost its checkpoint.safetensors, in which the adapters of "
            "clients and groups are; put it back"
        )
    if adapter_sha256(checkpoint.state.flat()) != read_summary(run_folder).get("state_sha256"):
        raise UsageError(
            f"{run_folder.path}: checkpoint.safetensors is not the one that the run ended with "
            f"(state_sha256 in {SUMMARY}); put that one back"
        )
    if not best:
        return checkpoint.state
    if checkpoint.best_state is None:
        raise UsageError(f"{run_folder.path}: checkpoint.safetensors holds no best round")
    return checkpoint.best_state


def _detail(context: RunContext, personal: RunState | None) -> dict[str, Any]:
    trained, by_client = predict_all(context, personal=personal)
    base, base_by_client = predict_all(context, base=True, personal=personal)
    sites = {name: (found, base_by_client[name]) for name, found in by_client.items()}
    return in_detail(trained, base, sites, context.data.class_names)


def _class_names(config: Config, closed: bool) -> tuple[str, ...] | None:
    """The classes, as far as counting needs them: only a linear head's size depends on them.

    `closed`: not by running a file of code.
    """
    if config.tasks:
        return _class_names(for_task(config, next(iter(config.tasks))), closed)
    data = config.data
    if config.task == "contrastive":
        return None
    if data.class_names:
        return data.class_names
    try:
        if closed:
            refuse_files(config, "info")
        return load_source(data.name, path=data.path, layout=data.layout).class_names
    except UsageError:
        if config.model.num_classes:
            return None
        if config.model.head == "linear":
            raise
        return ("any class",)
