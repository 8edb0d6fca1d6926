"""A commented starter configuration, from a few answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedclip.config.loading import config_from_dict
from fedclip.config.strict_yaml import dump_yaml, parse_yaml

TINY = "tiny"
_COLUMN = 29  # of comments, from the start of a key
_RATES = {True: 5e-3, False: 1e-4}  # a small model wants more than a large one

TEXT = """\
# Made by `fedclip init`. Every key that is not here has its default; `fedclip validate` checks this
# file, `fedclip doctor` says what it will take, and `fedclip run` runs it.

seed: 0                        # every draw follows from it

model:
  {model_name}# tiny sees 32 x 32; photographs want openai/clip-vit-base-patch32
  lora:
    r: 8                       # rank; 4 to 16 suits most tasks
    lora_alpha: 16             # usually twice the rank

client:
  local_epochs: 1              # passes over a site's images in a round
  {learning_rate}# tiny: about 5e-3; ViT-B/32: about 1e-4

optimizer:
  schedule: cosine             # the rate falls to zero by the last round

data:
{data}
federation:
  strategy: fedavg             # `local`: each alone; `centralised`: plain training on all images
  {rounds}# each is a training of all sites and a mean of their adapters
  {num_clients}# invented ones, over which images without sites are divided

evaluation:
  keep_best: true              # adapter_best/ holds the best round by validation
"""
_FOLDER = """\
  name: imagefolder            # images in folders
  # path: the folder, as seen from where the command is given
  {path}
  layout: auto                 # <site>/<class>/* or <class>/*; auto finds out
  batch_size: 32               # images in one training step
{names}  partition:
    name: {partition}{padding}# natural: one client a site; dirichlet: divided unevenly by class
"""
_DIGITS = """\
  name: digits                 # comes with fedclip; your own: name: imagefolder, path: FOLDER
  batch_size: 32               # images in one training step
  partition:
    name: dirichlet            # divided unevenly by class over invented clients
    alpha: 0.3                 # the smaller, the more the clients differ
"""


@dataclass(frozen=True)
class Wishes:
    """What a user knows at the start: `folder` None is the built-in digits."""

    folder: str | None = None
    by_site: bool = True
    classes: Sequence[str] = ()
    model: str = TINY
    rounds: int = 10
    clients: int = 5


def starter(wishes: Wishes) -> str:
    """The text of a configuration, which is checked before anybody sees it."""
    data = _DIGITS
    if wishes.folder is not None:
        names = ""
        if wishes.classes:
            names = "  # class_names: words for the folders, in their order\n"
            names += _key("class_names", list(wishes.classes), indent=2) + "\n"
        partition = "natural" if wishes.by_site else "dirichlet"
        data = _FOLDER.format(
            path=_key("path", wishes.folder),
            names=names,
            partition=partition,
            padding=" " * (21 - len(partition)),
        )
    text = TEXT.format(
        model_name=_before_comment("model_name", wishes.model),
        learning_rate=_before_comment("learning_rate", _RATES[wishes.model.endswith(TINY)]),
        data=data,
        rounds=_before_comment("rounds", wishes.rounds),
        num_clients=_before_comment("num_clients", wishes.clients),
    )
    config_from_dict(parse_yaml(text), "fedclip init")
    return text


def _key(name: str, value: Any, indent: int = 0) -> str:
    """A line `name: value` as strict YAML that reads back the same."""
    text = dump_yaml({name: value}).rstrip("\n")
    return "\n".join(" " * indent + line for line in text.splitlines())


def _before_comment(name: str, value: Any) -> str:
    """The same, as wide as the other lines that have a comment."""
    text = _key(name, value)
    return text + " " * max(2, _COLUMN - len(text))
