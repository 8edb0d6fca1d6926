"""CLIP's zero-shot classifier: class names and prompt templates to text features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import CLIPModel

from fedclip.device import at_least_fp32
from fedclip.errors import UsageError, shortened
from fedclip.models.tokenizer import Tokens

DEFAULT_TEMPLATES = ("a photo of a {}.",)
# Prompts in one forward pass where no gradient is kept.
_CHUNK = 256


def checked_classes(class_names: Sequence[str], count: int | None = None) -> tuple[str, ...]:
    """Class names as a tuple of distinct, non-empty texts; at least one, `count` in all."""
    if isinstance(class_names, str):
        raise UsageError(f"class names must be a list of texts, got the one text {class_names!r}")
    names = tuple(class_names)
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    twice = sorted(
        str(name) for name, times in Counter(filter(_is_text, names)).items() if times > 1
    )
    if not names or wrong:
        raise UsageError(f"class names must be non-empty texts, got {list(names)!r}")
    if twice:
        raise UsageError(f"class names must differ from each other, {twice[0]!r} is given twice")
    if count is not None and count != len(names):
        raise UsageError(
            f"model.num_classes is {count}, but there are {len(names)} class names "
            f"({', '.join(names[:3])}, ...); leave one of them out"
        )
    return names


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def checked_templates(templates: Sequence[str] | None) -> tuple[str, ...]:
    """Prompt templates as a tuple, each with a `{}` for the class name."""
    if isinstance(templates, str):
        templates = (templates,)
    found = tuple(templates or DEFAULT_TEMPLATES)
    for template in found:
        if not isinstance(template, str) or "{}" not in template:
            raise UsageError(
                f"data.templates: {template!r} must be a text with {{}} where the class name goes, "
                f"such as {DEFAULT_TEMPLATES[0]!r}"
            )
    return found


def _check_told_apart(names: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
    """Refuse classes all of whose prompts are the same tokens: they would have one feature."""
    count = len(rows) // len(names)
    known: dict[tuple[tuple[int, ...], ...], str] = {}
    for number, name in enumerate(names):
        seen = tuple(tuple(row) for row in rows[number * count : (number + 1) * count])
        if seen in known:
            raise UsageError(
                f"the text tower cannot tell the classes {shortened(known[seen])} and "
                f"{shortened(name)} apart: it reads the same tokens for both (names that differ in "
                "case, blanks or Unicode form only, or prompts that are cut before they differ); "
                "give other names, or shorter names and templates"
            )
        known[seen] = name


def each_once(texts: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The texts of several lists, each once, in the order in which they first come."""
    return tuple(dict.fromkeys(text for some in texts for text in some))


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template filled with every class name, class by class."""
    return [template.replace("{}", name) for name in class_names for template in templates]


def encode_texts(clip: CLIPModel, tokens: Tokens, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Normalised text features `[texts, dim]` in fp32, of ids from `tokens.encode`."""
    chunk = len(rows) if torch.is_grad_enabled() else _CHUNK
    features = []
    for start in range(0, len(rows), chunk):
        ids = tokens.pad(rows[start : start + chunk]).to(clip.logit_scale.device)
        pooled = clip.text_model(input_ids=ids).pooler_output
        features.append(F.normalize(at_least_fp32(clip.text_projection(pooled)), dim=-1))
    return torch.cat(features)


def ensemble(features: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mean over each class's templates, normalised again (Radford et al. 2021, section 3.1.4).

    `features` is `[classes * templates, dim]`, class by class; the result `[classes, dim]`.
    """
    means = features.view(num_classes, -1, features.shape[-1]).mean(dim=1)
    return F.normalize(means, dim=-1)


@dataclass(frozen=True)
class _Cached:
    """Text features with the trained tensors and the precision that they were computed with."""

    features: torch.Tensor
    trained: list[torch.Tensor]
    precision: torch.dtype | None


class TextHead:
    """The classes of a text classifier, their token ids, and their features while these hold."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self.class_names: tuple[str, ...] = ()
        self.templates: tuple[str, ...] = ()
        self._rows: list[list[int]] = []
        self._cache: dict[str, _Cached] = {}

    def set_classes(self, class_names: Sequence[str], templates: Sequence[str] | None) -> None:
        """Take other classes; templates stay as they are where none are given."""
        names = checked_classes(class_names)
        filled = checked_templates(templates or self.templates)
        rows = self._tokens.encode(prompts(names, filled))
        _check_told_apart(names, rows)
        self._rows = rows
        self.class_names, self.templates = names, filled
        self._cache.clear()

    def like(self, class_names: Sequence[str], templates: Sequence[str] | None) -> TextHead:
        """A head of other classes for the same text tower; templates as here if none are given."""
        other = TextHead(self._tokens)
        other.set_classes(class_names, templates or self.templates)
        return other

    def use_templates(self, templates: Sequence[str]) -> None:
        """Take templates for classes that are not known yet."""
        self.templates = checked_templates(templates)

    def encode(self, clip: CLIPModel, texts: Sequence[str]) -> torch.Tensor:
        """Normalised features `[texts, dim]`, fp32, of texts as they are."""
        return encode_texts(clip, self._tokens, self._tokens.encode(texts))

    def features(
        self, clip: CLIPModel, trained: Sequence[torch.Tensor], *, slot: str, reuse: bool
    ) -> torch.Tensor:
        """Normalised features `[classes, dim]`, fp32, on the model's device.

        `trained` are the text tower's trainable tensors: without any the features are computed
        once, else every time, but for `reuse` (evaluation without gradients) as long as those
        tensors hold the same values. `slot` keeps models with and without adapter apart.
        """
        if not self.class_names:
            raise UsageError(
                "the text classifier has no class names; give them to create_clip_model or "
                "set_classes, or set model.num_classes for a linear classifier"
            )
        if trained and not reuse:
            return self._compute(clip)
        device = clip.logit_scale.device
        precision = _ambient_precision(device) if trained else None
        known = self._cache.get(slot)
        if known is None or not _same(known, trained, precision, device):
            # Not inference_mode: what it makes could not be used in training later on.
            with torch.inference_mode(False), torch.no_grad():
                if trained:
                    features = self._compute(clip)
                else:
                    with torch.autocast(device.type, enabled=False):
                        features = self._compute(clip)
                known = _Cached(
                    features, [tensor.detach().clone() for tensor in trained], precision
                )
            self._cache[slot] = known
        return known.features

    def forget(self) -> None:
        """Compute features anew, as weights have changed that are not trained."""
        self._cache.clear()

    def prompt_ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of all prompts `[prompts, tokens]`, class by class, and where each one ends."""
        ends = [row.index(self._tokens.end) for row in self._rows]
        return self._tokens.pad(self._rows), torch.tensor(ends)

    def _compute(self, clip: CLIPModel) -> torch.Tensor:
        return ensemble(encode_texts(clip, self._tokens, self._rows), len(self.class_names))


def _same(
    known: _Cached,
    trained: Sequence[torch.Tensor],
    precision: torch.dtype | None,
    device: torch.device,
) -> bool:
    """Whether cached features still hold: compared by value, as tensors change in place."""
    return (
        known.features.device == device
        and known.precision == precision
        and len(known.trained) == len(trained)
        and all(map(torch.equal, known.trained, trained))
    )


def _ambient_precision(device: torch.device) -> torch.dtype | None:
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
