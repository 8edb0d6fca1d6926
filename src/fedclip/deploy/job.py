"""What a site must know of a run: how to build the model, and how to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedclip.catalog import short_name
from fedclip.config import Config, DataConfig
from fedclip.config.attack import require_no_attack
from fedclip.config.loading import config_from_dict
from fedclip.deploy.app_code import installed_app
from fedclip.errors import UsageError

SECTIONS = ("seed", "precision", "model", "client", "optimizer")
DATA_KEYS = (
    "batch_size",
    "accumulation_steps",
    "augment",
    "validation_fraction",
    "test_fraction",
    "test_seed",
)
"""Keys of `data` that are the run's; the others are the site's own."""

EPSILON = "epsilon"
"""What a run promises of differential privacy for each example, None for nothing that is known."""

SECURE = "secure"
"""The section of the same name, where updates are masked."""

APP = "app"
"""Digest of the code that the sites run for it (`app_code`)."""


def make_job(
    config: Config, class_names: Sequence[str], templates: Sequence[str]
) -> dict[str, Any]:
    """The job of a run, as JSON; nothing in it is about the coordinator's machine."""
    whole, privacy = config.model_dump(mode="json"), config.privacy
    if Path(config.model.model_name).is_dir():  # where it lies here is nobody's business
        whole["model"]["model_name"] = Path(config.model.model_name).name
    secure = {SECURE: whole[SECURE]} if config.secure.masked else {}
    return secure | {
        "config": {key: whole[key] for key in SECTIONS}
        | {"evaluation": {"max_examples": whole["evaluation"]["max_examples"]}}
        | {"data": {key: whole["data"][key] for key in DATA_KEYS}}
        | {"federation": {"strategy": "fedavg", "rounds": config.federation.rounds}}
        | ({} if privacy.unit is None else {"privacy": whole["privacy"]}),
        "strategy": whole_name(config),
        EPSILON: privacy.target_epsilon if privacy.unit == "example" else None,
        APP: installed_app(),
        "up": config.deploy.up,
        "class_names": list(class_names),
        "templates": list(templates),
    }


def whole_name(config: Config) -> str:
    """The strategy with its wrappers, as one word that a site's policy can name."""
    federation = config.federation
    around = {"scaffold": federation.scaffold, "ditto": federation.ditto_mu is not None}
    name = short_name(federation.strategy)  # a class of a user's own without its file
    return "+".join([name, *(name for name, there in around.items() if there)])


def job_config(
    job: Mapping[str, Any], device: str, data: DataConfig, model: str | None = None
) -> Config:
    """A site's training configuration: the run's, with the site's device, data and model."""
    try:
        values = {**job["config"], "device": device, "engine": {"name": "sequential"}}
        if model is not None:
            values["model"] = {**values["model"], "model_name": model}
        own = data.model_dump(mode="json")
        values["data"] = {**own, **{key: values["data"][key] for key in DATA_KEYS}}
        # Nothing else of it: a name here could be that of a file to run.
        values["evaluation"] = {"max_examples": values["evaluation"]["max_examples"]}
    except (KeyError, TypeError):
        raise UsageError("the coordinator's job cannot be read; is it another version?") from None
    config = config_from_dict(values, "the coordinator's job")
    require_no_attack(config, "a site")
    return config
