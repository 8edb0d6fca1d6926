"""Checks of `privacy` against the other sections: a guarantee that cannot hold is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedclip.catalog import ENGINES
from fedclip.config.checks_data import rank_sources
from fedclip.config.privacy import PrivacyConfig
from fedclip.config.robust import robust_keys
from fedclip.config.section import CrossProblem

if TYPE_CHECKING:
    from fedclip.config.tree import Config

_ASKS = (
    "target_epsilon",
    "noise_multiplier",
    "delta",
    "clip_norm",
    "clip_quantile",
    "reproducible",
    "tell",
)


def privacy_problems(config: Config) -> Iterator[CrossProblem]:
    """What does not fit a run that is to be private, and keys that promise nothing."""
    unit, usual = config.privacy.unit, PrivacyConfig()
    if unit is None:
        given = [key for key in _ASKS if getattr(config.privacy, key) != getattr(usual, key)]
        if given:
            yield CrossProblem(
                "privacy.unit",
                f"privacy.{given[0]} is given without privacy.unit, which says whose presence is "
                "hidden: example (one image of a client) or client (all that one client has)",
            )
        return
    yield from _amount(config.privacy)
    yield from _nothing_beside(config)
    yield from _by_example(config) if unit == "example" else _by_client(config)


def _by_client(config: Config) -> Iterator[CrossProblem]:
    for key in robust_keys(config.robust):
        yield CrossProblem(
            key,
            f"{key} does not go with privacy.unit: client, where all clients weigh the same and "
            "nothing but a noisy mean is seen; leave it out",
        )
    if config.federation.strategy == "centralised":
        yield CrossProblem(
            "privacy.unit",
            "privacy.unit: client hides one client among many, and federation.strategy: "
            "centralised has one; use privacy.unit: example",
        )


def _amount(privacy: PrivacyConfig) -> Iterator[CrossProblem]:
    if (privacy.target_epsilon is None) == (privacy.noise_multiplier is None):
        given = "neither is given" if privacy.target_epsilon is None else "both are given"
        yield CrossProblem(
            "privacy.target_epsilon",
            "privacy.target_epsilon and privacy.noise_multiplier each follow from the other, and "
            f"{given}; give one of them",
            ("privacy.noise_multiplier",),
        )
    if privacy.delta is None:
        yield CrossProblem(
            "privacy.delta",
            "privacy.delta is missing: the probability with which the promise may fail, such as "
            "1e-5; it must be less than one over the number of a client's examples (unit: example) "
            "or of clients (unit: client)",
        )


def _nothing_beside(config: Config) -> Iterator[CrossProblem]:
    """Keys whose way with the data no accountant follows."""
    federation, evaluation = config.federation, config.evaluation
    refused = (
        (
            "federation.scaffold",
            federation.scaffold,
            "sends each client's control variate beside its update",
        ),
        (
            "evaluation.keep_best",
            evaluation.keep_best,
            "chooses a round by images of the clients, which is one more question to them; the "
            "last round's adapter is the result",
        ),
        (
            "federation.dynamic_ranks.enabled",
            federation.dynamic_ranks.enabled,
            "has ranks follow from the updates, and noise would fill the rows that it cuts",
        ),
        (
            "evaluation.patience",
            evaluation.patience,
            "ends a run by images of the clients, which is one more question to them; set "
            "federation.rounds",
        ),
        (
            "federation.ditto_mu",
            federation.ditto_mu,
            "trains every client twice a round, which is not accounted for",
        ),
    )
    for key, given, reason in refused:
        if given:
            yield CrossProblem(key, f"{key} does not go with privacy.unit: it {reason}")
    for key in rank_sources(config):
        yield CrossProblem(
            key,
            f"{key} does not go with privacy.unit: noise would fill the rows that a client of "
            "lower rank does not train",
        )
    if config.tasks:
        yield CrossProblem("tasks", "tasks: runs of several tasks cannot be private yet")
    if federation.sharing.mode != "shared":
        yield CrossProblem(
            "federation.sharing.mode",
            "federation.sharing.mode: private runs train one adapter that all share",
        )
    if (engine := config.engine.name) not in ENGINES:
        yield CrossProblem(
            "engine.name", f"engine.name: {engine} is not known to keep privacy; use batched"
        )


def _by_example(config: Config) -> Iterator[CrossProblem]:
    """What has no per-example gradients, and what is for clients' updates."""
    if config.privacy.clip_quantile is not None:
        yield CrossProblem(
            "privacy.clip_quantile",
            "privacy.clip_quantile follows the norms of clients' updates (privacy.unit: client); "
            "with privacy.unit: example set privacy.clip_norm",
        )
    if config.task == "contrastive":
        yield CrossProblem(
            "task",
            "task: contrastive does not go with privacy.unit: example, as its loss compares the "
            "examples of a batch and is no sum over them",
        )
    if config.precision == "fp16":
        yield CrossProblem(
            "precision",
            "precision: fp16 does not go with privacy.unit: example, as its steps are left out "
            "where gradients overflow; use fp32 or bf16",
        )
    if config.model.lora.use_dora:
        yield CrossProblem(
            "model.lora.use_dora",
            "model.lora.use_dora does not go with privacy.unit: example, whose gradients are "
            "those of plain factors; leave it out",
        )
    if not config.model.lora.enabled:
        yield CrossProblem(
            "model.lora.enabled",
            "model.lora.enabled: false does not go with privacy.unit: example, as noise grows with "
            "the number of weights; train an adapter or a head",
        )
    if config.data.accumulation_steps != 1:
        yield CrossProblem(
            "data.accumulation_steps",
            "data.accumulation_steps does not go with privacy.unit: example, where a step takes "
            "one random batch; raise data.batch_size instead",
        )
