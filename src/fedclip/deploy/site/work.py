"""A job that a site has taken up: its model, its images, and the engine that trains them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedclip.config import Config
from fedclip.data.federated_data import FederatedData
from fedclip.data.loading import load_federated
from fedclip.data.picture_sizes import warn_if_shrunk
from fedclip.data.sources.site import site_source
from fedclip.deploy.job import job_config
from fedclip.deploy.messages.requests import Ticket
from fedclip.deploy.site import policy
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.consent import Terms, require_base
from fedclip.deploy.site.privacy import SitePrivacy, begin_site_privacy
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.build import build, model_config, model_seed
from fedclip.experiment.context import RunContext
from fedclip.experiment.engine import create_engine
from fedclip.federated.rounds import Engine
from fedclip.models.clip import create_clip_model
from fedclip.models.pretrained import advice_on_size, load_pixels
from fedclip.models.summary import base_sha256
from fedclip.reports.listener import Listener

Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """A job that the site has taken up: the engine that trains it, and what it is about."""

    digest: str
    context: RunContext
    engine: Engine
    base: str
    num_examples: int
    job: Mapping[str, Any]
    app: str
    agreed: str
    privacy: SitePrivacy | None
    run: str

    def serves(self, ticket: Ticket) -> bool:
        """Whether it is the work of a message: of its job, and if it is private of its run."""
        return self.digest == ticket.job and (self.privacy is None or self.run == ticket.run)

    @property
    def rounds(self) -> int:
        """Rounds of the run."""
        return self.context.config.federation.rounds


def begin_work(
    site: SiteConfig, asked: Terms, job: Mapping[str, Any], digest: str, agreed: str, say: Say
) -> Work:
    """Builds the model, and then reads the images: a model that was not agreed on sees none."""
    config = job_config(job, site.device, site.as_data, site.model)
    policy.check_job(site.policy, job, config)
    names, templates = tuple(job["class_names"]), tuple(job["templates"])
    model = create_clip_model(
        model_config(config), class_names=names, templates=templates, seed=model_seed(config)
    )
    policy.check_adapter(site.policy, model.trainable())
    base = base_sha256(model)
    require_base(asked, base)
    data = replace(_images(site, config, names, say), templates=templates)
    (own,) = data.clients
    if own.client_id != site.name:
        raise UsageError("the site's images were divided, which they must not be")
    context = build(config, Listener(), data=data, model=model)
    say(f"took up a run: {len(own.train)} training examples")
    most, state = site.policy.total_epsilon, Path(site.state)
    privacy = begin_site_privacy(context, asked.run, site.name, state, most)
    engine = create_engine(context, None if privacy is None else privacy.dp_sgd)
    if privacy is not None:
        engine = privacy.around(engine)
    count = len(own.train)
    return Work(digest, context, engine, base, count, job, asked.app, agreed, privacy, asked.run)


def _images(site: SiteConfig, config: Config, names: Sequence[str], say: Say) -> FederatedData:
    """Load the site's images; warnings about them stay local."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FedclipWarning)
        pixels = load_pixels(config.model.model_name)
        data = load_federated(
            config.data,
            num_clients=1,
            seed=config.seed,
            to_pixels=pixels.to_pixels,
            pixels_key=pixels.key,
            source=site_source(site.data.path, site.name, names, site.data.classes),
            needs_tests=False,  # a small site may hold out none, as in a simulation
        )
        warn_if_shrunk(data, pixels.image_size, advice_on_size(config.model.model_name))
    for warning in caught:
        say(f"note: {warning.message}")
    return data
