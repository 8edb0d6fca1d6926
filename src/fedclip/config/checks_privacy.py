"""Checks of `privacy` against the other sections: a guarantee that cannot hold is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedclip.catalog import ENGINES
from fedclip.config.checks_strategy import rank_sources
from fedclip.config.privacy import PrivacyConfig
from fedclip.config.section import CrossProblem, lookup, number

_ASKS = (
    "target_epsilon",
    "noise_multiplier",
    "delta",
    "clip_norm",
    "clip_quantile",
    "reproducible",
    "tell",
)


def privacy_problems(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    """What does not fit a run that is to be private, and keys that promise nothing."""
    unit = lookup(values, "privacy.unit")
    if unit not in ("example", "client"):
        fields = PrivacyConfig.model_fields
        given = [key for key in _ASKS if lookup(values, f"privacy.{key}") != fields[key].default]
        given = [key for key in given if lookup(values, f"privacy.{key}") is not None]
        if given and unit is None:
            yield CrossProblem(
                "privacy.unit",
                f"privacy.{given[0]} is given without privacy.unit, which says whose presence is "
                "hidden: example (one image of a client) or client (all that one client has)",
            )
        return
    yield from _amount(values)
    yield from _nothing_beside(values)
    if unit == "example":
        yield from _by_example(values)
        return
    robust = ("robust.rule", "robust.attackers", "robust.largest_share")
    for key in (key for key in robust if lookup(values, key) is not None):
        yield CrossProblem(
            key,
            f"{key} does not go with privacy.unit: client, where all clients weigh the same and "
            "nothing but a noisy mean is seen; leave it out",
        )
    if lookup(values, "federation.strategy") == "centralised":
        yield CrossProblem(
            "privacy.unit",
            "privacy.unit: client hides one client among many, and federation.strategy: "
            "centralised has one; use privacy.unit: example",
        )


def _amount(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    target = number(values, "privacy.target_epsilon")
    noise = number(values, "privacy.noise_multiplier")
    if (target is None) == (noise is None):
        given = "neither is given" if target is None else "both are given"
        yield CrossProblem(
            "privacy.target_epsilon",
            "privacy.target_epsilon and privacy.noise_multiplier each follow from the other, and "
            f"{given}; give one of them",
        )
    if lookup(values, "privacy.delta") is None:
        yield CrossProblem(
            "privacy.delta",
            "privacy.delta is missing: the probability with which the promise may fail, such as "
            "1e-5; it must be less than one over the number of a client's examples (unit: example) "
            "or of clients (unit: client)",
        )


def _nothing_beside(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    """Keys whose way with the data no accountant follows."""
    reasons = {
        "federation.scaffold": "sends each client's control variate beside its update",
        "evaluation.keep_best": "chooses a round by images of the clients, which is one more "
        "question to them; the last round's adapter is the result",
        "federation.dynamic_ranks.enabled": "has ranks follow from the updates, and noise would "
        "fill the rows that it cuts",
    }
    for key, reason in reasons.items():
        if lookup(values, key) is True:
            yield CrossProblem(key, f"{key} does not go with privacy.unit: it {reason}")
    if number(values, "evaluation.patience") is not None:
        yield CrossProblem(
            "evaluation.patience",
            "evaluation.patience does not go with privacy.unit: it ends a run by images of the "
            "clients, which is one more question to them; set federation.rounds",
        )
    if number(values, "federation.ditto_mu") is not None:
        yield CrossProblem(
            "federation.ditto_mu",
            "federation.ditto_mu does not go with privacy.unit: it trains every client twice a "
            "round, which is not accounted for",
        )
    for key in rank_sources(values):
        yield CrossProblem(
            key,
            f"{key} does not go with privacy.unit: noise would fill the rows that a client of "
            "lower rank does not train",
        )
    if lookup(values, "tasks"):
        yield CrossProblem("tasks", "tasks: runs of several tasks cannot be private yet")
    if lookup(values, "federation.sharing.mode") in ("per_task", "shared+task", "clusters"):
        yield CrossProblem(
            "federation.sharing.mode",
            "federation.sharing.mode: private runs train one adapter that all share",
        )
    engine = lookup(values, "engine.name")
    if isinstance(engine, str) and engine not in ENGINES:
        yield CrossProblem(
            "engine.name", f"engine.name: {engine} is not known to keep privacy; use batched"
        )


def _by_example(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    """What has no per-example gradients, and what is for clients' updates."""
    if number(values, "privacy.clip_quantile") is not None:
        yield CrossProblem(
            "privacy.clip_quantile",
            "privacy.clip_quantile follows the norms of clients' updates (privacy.unit: client); "
            "with privacy.unit: example set privacy.clip_norm",
        )
    if lookup(values, "task") == "contrastive":
        yield CrossProblem(
            "task",
            "task: contrastive does not go with privacy.unit: example, as its loss compares the "
            "examples of a batch and is no sum over them",
        )
    if lookup(values, "precision") == "fp16":
        yield CrossProblem(
            "precision",
            "precision: fp16 does not go with privacy.unit: example, as its steps are left out "
            "where gradients overflow; use fp32 or bf16",
        )
    if lookup(values, "model.lora.use_dora") is True:
        yield CrossProblem(
            "model.lora.use_dora",
            "model.lora.use_dora does not go with privacy.unit: example, whose gradients are "
            "those of plain factors; leave it out",
        )
    if lookup(values, "model.lora.enabled") is False:
        yield CrossProblem(
            "model.lora.enabled",
            "model.lora.enabled: false does not go with privacy.unit: example, as noise grows with "
            "the number of weights; train an adapter or a head",
        )
    accumulated = number(values, "data.accumulation_steps")
    if accumulated is not None and accumulated != 1:
        yield CrossProblem(
            "data.accumulation_steps",
            "data.accumulation_steps does not go with privacy.unit: example, where a step takes "
            "one random batch; raise data.batch_size instead",
        )
