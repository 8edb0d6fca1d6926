"""What a run asks a site for, in words, for the person who approves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedclip.config import Config
from fedclip.deploy.app_code import installed_app
from fedclip.deploy.job import job_config
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.consent import Terms
from fedclip.deploy.site.exchange_limits import limits_of
from fedclip.deploy.site.requirements import is_masked, promised

_GROUPS = {"A": "factors A", "B": "factors B", "head": "the head", "other": "other trained tensors"}


def in_words(terms: Terms, site: SiteConfig) -> dict[str, str]:
    """The terms by subject; raises UsageError where the job cannot be read."""
    config, job = job_config(terms.job, site.device, site.as_data, site.model), terms.job
    own = (
        "of the fedclip installed here" if terms.app == installed_app() else "OTHER CODE than here"
    )
    rounds, epochs = config.federation.rounds, config.client.local_epochs
    return {
        "run": terms.run,
        "base model": f"{job['config']['model']['model_name']}, sha256 {terms.base}",
        "code": f"the app {own}, sha256 {terms.app}",
        "strategy": _strategy(job),
        "trains": _trained(config),
        "amount": f"{rounds} rounds of {epochs} epochs, batches of {config.data.batch_size}, "
        f"learning rate {config.optimizer.learning_rate:g}, {config.precision}, seed {config.seed}",
        "privacy": _privacy(job),
        "masked sums": "yes: the coordinator sees sums over sites only"
        if is_masked(job)
        else "no: the coordinator sees this site's updates",
        "leaves this site": _leaves(job, site),
        "stays here": "images, labels, file names"
        + (
            f"; {config.data.test_fraction:.0%} of the images test"
            if config.data.test_fraction
            else ""
        ),
        "classes": ", ".join(map(str, job["class_names"])),
        "prompts": ", ".join(map(str, job["templates"])),
    }


def _strategy(job: Mapping[str, Any]) -> str:
    limits, name = limits_of(job), str(job["strategy"])
    if limits is None:
        return f"{name}, of the coordinator's own: what it asks for in a round is not limited"
    if limits.shifts:
        return f"{name}, which CHANGES WEIGHTS OF THE BASE MODEL from round to round"
    return name


def _trained(config: Config) -> str:
    model, lora = config.model, config.model.lora
    if model.trains != "lora":
        return {"full": "all weights of the model", "head": "a linear head alone"}[model.trains]
    towers = {
        "vision": lora.target_modules.vision_encoder,
        "text": lora.target_modules.text_encoder,
    }
    layers = "; ".join(f"{name} tower: {', '.join(own)}" for name, own in towers.items() if own)
    depth = f", last {lora.last_layers} layers" if lora.last_layers else ""
    more = {"exclude": lora.exclude_modules, "ranks": lora.rank_pattern}
    extra = "".join(f", {word} {value}" for word, value in more.items() if value)
    return (
        f"{'DoRA' if lora.use_dora else 'LoRA'} of rank {lora.r}, alpha {lora.lora_alpha:g}, "
        f"dropout {lora.lora_dropout:g} on {layers}{depth}{extra}; head {model.head}"
    )


def _privacy(job: Mapping[str, Any]) -> str:
    epsilon = promised(job)
    if epsilon == math.inf:
        return "differential privacy: NONE is promised"
    return f"differential privacy with epsilon {epsilon:g} is promised"


def _leaves(job: Mapping[str, Any], site: SiteConfig) -> str:
    limits = limits_of(job)
    sent = _GROUPS.values() if limits is None else [_GROUPS[g] for g in sorted(limits.sends)]
    tensors = f"{', '.join(sent)} after each round ({job.get('up')})" if sent else "no tensors"
    private = "privacy" in job["config"]
    losses = "the epsilon spent, " if private else "mean losses, "
    if is_masked(job):
        tensors, losses = f"{tensors}, with the loss, behind masks", ""
    numbers = f"the numbers of training examples and steps, {losses}seconds, versions"
    tells = site.policy.tell_accuracy and not private
    tests = ", how many of its test images are right" if tells else ""
    return f"{tensors}; {numbers}{tests}"
