"""What a checkpoint belongs to: configuration, base, data, layout, code; compared on resume."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedclip.catalog import in_file, is_given
from fedclip.config import Config
from fedclip.config.lookup import load
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.code_digest import class_sha256
from fedclip.experiment.context import RunContext
from fedclip.experiment.folder import CONFIG, SUMMARY, RunFolder
from fedclip.files import file_sha256
from fedclip.models.summary import base_sha256
from fedclip.records import RunState
from fedclip.reports.listener import Listener

TRAINING = 2
"""Raised by one when the same state and configuration train otherwise than before: 2 since steps
of server optimizers, weight decay of vectors, `federation.ridge` and q-FedAvg's rate changed."""
PRIVATE_TRAINING = 1
"""The same, added to it for runs that hide examples: 1 since a step draws its noise at once."""
PACKAGES = ("fedclip", "torch", "transformers", "peft", "numpy")

# Where things are, and how long to wait: what is there is compared by its digest.
_MAY_CHANGE = re.compile(
    r"(data|tasks\.[^.]+)\.path"
    r"|deploy\.(address|keys|join_deadline|round_deadline|attempts)"
)
_MAY_DIFFER = re.compile(
    rf"{_MAY_CHANGE.pattern}|device|data\.memory_gb|model\.model_name|engine\..*"
)
_PARTS = {
    "base_sha256": "the base model's weights or its preprocessing (model.model_name) are not those "
    "that the run began with; put the same model there",
    "data_sha256": "the data, its partition, its classes or prompts are not those that the run "
    "began with; put the data back as it was",
    "layout_sha256": "the adapter's tensors have other names or shapes than when the run began; go "
    "on with the version of fedclip and PEFT that it began with",
}


def take_up(context: RunContext, folder: RunFolder) -> Checkpoint:
    """The last checkpoint that can be used, which must belong to this run; or a first one."""
    identity = identity_of(context)
    found = Checkpoint.load_usable(folder)
    if found is None:
        return Checkpoint(-1, RunState(context.model.get_parameters()), identity=identity)
    _check_config(found.identity["config"], identity["config"], folder)
    _check_digests(found.identity, identity, folder)
    _say_environment(found.identity["environment"], identity["environment"], folder)
    return replace(found, identity=identity)


def check_config(config: Config, folder: RunFolder, listener: Listener) -> None:
    """What `take_up` compares without building anything, on a run's last checkpoint.

    Also says which files of code the run folder makes this process execute, before it does.
    """
    if folder.is_coordinated():
        raise UsageError(
            f"{folder.path} is a coordinator's run, whose clients are on other machines; go on by "
            "the `fedclip coordinate` that began it"
        )
    checkpoint = Checkpoint.load_usable(folder, warn=False)
    if checkpoint is not None:
        _check_config(checkpoint.identity["config"], _config_of(config, remote=False), folder)
        _check_digests(
            checkpoint.identity,
            {"code": code_sha256(config), "training": _training(config)},
            folder,
        )
    trackers = {name.rpartition(":")[0] for name in config.tracking if in_file(name)}
    named = sorted({*code_sha256(config), *trackers})
    files = ", ".join(name for name in named if not is_given("strategies", name))
    if files:
        listener.message(f"{folder.path} names code of its own, which is run now: {files}")


def check_measured(config: Config, folder: RunFolder) -> None:
    """Refuse to measure a finished run under a configuration that is not the run's.

    Where things are and where it is computed may differ. Of a run whose `config.yaml` has the
    digest that its summary tells, nothing more is read.
    """
    told = folder.read_json(SUMMARY).get("records_sha256") or {}
    if told.get(CONFIG) == file_sha256(folder.path / CONFIG):
        return
    checkpoint = Checkpoint.load_usable(folder, warn=False)
    if checkpoint is not None:
        found = checkpoint.identity["config"]
        now = _config_of(config, remote="engine" not in found)
        _check_config(found, now, folder, may_change=_MAY_DIFFER)


def check_built(folder: RunFolder, context: RunContext) -> None:
    """Refuse a finished run's checkpoint on another base, other data or another layout."""
    checkpoint = Checkpoint.load(folder)
    if checkpoint is not None:
        now = identity_of(context)
        _check_digests(checkpoint.identity, {key: now[key] for key in _PARTS}, folder)


def _training(config: Config) -> int:
    """How a run of this configuration trains, by number."""
    return TRAINING + (PRIVATE_TRAINING if config.privacy.unit == "example" else 0)


def identity_of(context: RunContext) -> dict[str, Any]:
    """What a run's checkpoints belong to, as JSON; `environment` may change, all else may not."""
    config = context.config
    layout = {name: list(t.shape) for name, t in context.model.get_parameters().items()}
    data = [task.data for task in context.tasks.values()]
    prompts = [[list(own.class_names), list(own.templates)] for own in data]
    own = {
        "config": _config_of(config, remote=context.sites is not None),
        "base_sha256": _sha256([base_sha256(context.model), context.model.preprocessing.facts]),
        "data_sha256": _sha256([context.partition_record(), prompts]),
        "layout_sha256": _sha256(layout),
        "code": code_sha256(config),
        "training": _training(config),
    }
    environment = {
        **{name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "processes": context.processes.count,
        "device": str(context.device),
        "precision": context.precision,
    }
    return {"run": _sha256(own), **own, "environment": environment}


def code_sha256(config: Config) -> dict[str, str]:
    """Digests of the users' code that a configuration names: files by path, a class by name."""
    sections = [config.data, *config.tasks.values()]
    names = [config.federation.strategy, config.engine.name, *(data.name for data in sections)]
    names += [*config.evaluation.other_data, *config.evaluation.metrics, config.robust.rule or ""]
    files = sorted({name.rpartition(":")[0] for name in names if in_file(name)})
    # Of one that is not there, importing it will say so.
    found = {file: file_sha256(Path(file)) if Path(file).is_file() else "" for file in files}
    strategy = config.federation.strategy
    given = is_given("strategies", strategy)
    return found | ({strategy: class_sha256(load("strategies", strategy))} if given else {})


def _config_of(config: Config, *, remote: bool) -> dict[str, Any]:
    """What of the configuration is computed with, as JSON; over machines that is no engine."""
    apart = {"tracking", "engine"} if remote else {"tracking"}
    return config.model_dump(mode="json", exclude=apart)


def _check_config(
    found: Mapping[str, Any],
    now: Mapping[str, Any],
    folder: RunFolder,
    may_change: re.Pattern[str] = _MAY_CHANGE,
) -> None:
    changed = [c for c in _changes(found, now) if not may_change.fullmatch(c[0])]
    if changed:
        told = "; ".join(f"{key} was {_short(old)}, now {_short(new)}" for key, old, new in changed)
        raise UsageError(
            f"{folder.path / CONFIG} is not what the run began with: {told}; put the old values "
            "back to go on, or start a new run with the new ones"
        )


def _check_digests(found: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    """Compare what `now` holds of an identity's digests."""
    changed = [text for key, text in _PARTS.items() if key in now and found[key] != now[key]]
    if "code" in now and found["code"] != now["code"]:
        files = ", ".join(file for file, _, _ in _changes(found["code"], now["code"]))
        changed.append(f"code has changed since the run began; put it back as it was: {files}")
    if "training" in now and found["training"] != now["training"]:
        changed.append(
            "the run was begun by a version of fedclip that trains otherwise; finish it "
            "with that version"
        )
    if changed:
        raise UsageError(f"{folder.path}: {'; '.join(changed)}; or start a new run")


def _say_environment(
    before: Mapping[str, Any], after: Mapping[str, Any], folder: RunFolder
) -> None:
    if before != after:
        told = (f"{name} {old}, now {new}" for name, old, new in _changes(before, after))
        warnings.warn(
            f"{folder.path}: the run began under other conditions ({'; '.join(told)}): it goes on, "
            "but its end may differ by rounding from that of an undisturbed run",
            FedclipWarning,
            stacklevel=4,
        )


def _changes(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys under which two trees differ, with both values; None where one has no such key."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _changes(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif old != new:
        yield at, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
