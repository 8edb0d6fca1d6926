"""What is merged and how, checked: adapters that go together, a method, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedclip.config.lookup import load
from fedclip.config.names import each_class_once
from fedclip.errors import UsageError
from fedclip.lora.factors import Factors
from fedclip.lora.merge_methods import METHODS, Method, merge_layer
from fedclip.models.adapter_updates import LoraAdapter
from fedclip.models.text_head import each_once
from fedclip.seeding import seed_for


@dataclass(frozen=True)
class Recipe:
    """How adapters are merged, checked: a method, and what it needs."""

    name: str
    weights: tuple[float, ...]
    rank: int
    density: float
    seed: int

    @property
    def method(self) -> Method:
        """The arithmetic."""
        return METHODS[self.name]


def check_recipe(
    adapters: Sequence[LoraAdapter],
    method: str,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Recipe:
    """Fill in what is not given, and refuse what does not fit."""
    for adapter in adapters:
        if adapter.magnitudes:
            raise UsageError(
                f"the adapter in {adapter.folder} uses use_dora, which fedclip does not merge: its "
                "update is no product of two factors"
            )
    how: Method = load("merge_methods", method)
    count = len(adapters)
    given = [how.weight(count)] * count if weights is None else list(weights)
    if len(given) != count or not all(math.isfinite(weight) for weight in given):
        raise UsageError(
            f"weights must be {count} finite numbers, one for each adapter, got {_listed(given)}"
        )
    if method == "linear" and sum(given) <= 0:
        raise UsageError(f"weights of linear must sum to more than 0, got {_listed(given)}")
    if rank is not None and not how.cut:
        raise UsageError(f"rank: {method} has no rank to choose; svd is the sum cut at a rank")
    if rank is not None and rank < 1:
        raise UsageError(f"rank must be at least 1, got {rank}")
    if density is not None and how.density is None:
        with_one = ", ".join(name for name, other in METHODS.items() if other.density)
        raise UsageError(f"density: {method} has none; it belongs to {with_one}")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"density must be above 0 and at most 1, got {density:g}")
    if how.same_rank:
        _check_same_rank(adapters, method)
    largest = max(adapter.rank for adapter in adapters)
    if method == "cat":
        layers = [[len(x.layers[path][0]) for x in adapters] for path in adapters[0].layers]
        largest = max(sum(ranks) for ranks in layers)
    kept = density if density is not None else (how.density or 1.0)
    return Recipe(method, tuple(given), rank or largest, kept, seed)


def combine(adapters: Sequence[LoraAdapter], recipe: Recipe) -> tuple[LoraAdapter, float]:
    """The merged adapter, and the share of the merged update's squared norm that it holds.

    A trained head is the mean of the heads by the same weights. Classes and templates are those of
    the first adapter, and then those that only the others have.
    """
    layers, kept, total = {}, 0.0, 0.0
    for path in adapters[0].layers:
        draw = torch.Generator().manual_seed(seed_for(recipe.seed, "merge", path))
        updates = [Factors(*(f.double() for f in adapter.layers[path])) for adapter in adapters]
        merged = merge_layer(
            recipe.method,
            updates,
            recipe.weights,
            rank=recipe.rank,
            density=recipe.density,
            generator=draw,
        )
        layers[path] = Factors(merged.factors.a.float(), merged.factors.b.float())
        kept, total = kept + merged.kept, total + merged.total
    first = adapters[0]
    notes = replace(
        first.notes,
        own_ranks=True,
        class_names=each_class_once(x.notes.class_names for x in adapters),
        templates=each_once(x.notes.templates for x in adapters),
    )
    head = _mean_head(adapters, recipe.weights)
    made = replace(first, notes=notes, layers=layers, head=head)
    return made, kept / total if total else 1.0


def check_pair(first: LoraAdapter, other: LoraAdapter) -> None:
    """Refuse adapters that are not on one base, of the same layers and classes."""
    ours, theirs = first.notes, other.notes
    both = ours.base_sha256 is not None and theirs.base_sha256 is not None
    same = ours.base_sha256 == theirs.base_sha256 if both else ours.base_model == theirs.base_model
    if not same:
        what = "other weights of it" if ours.base_model == theirs.base_model else theirs.base_model
        raise UsageError(
            f"adapters must be made on the same base model: {first.folder} is on "
            f"{ours.base_model}, {other.folder} on {what}"
        )
    odd = sorted(first.layers.keys() ^ other.layers.keys())
    if odd:
        owner = first if odd[0] in first.layers else other
        raise UsageError(
            f"adapters must adapt the same layers: {odd[0]} is adapted in {owner.folder} only "
            f"({len(odd)} layers differ between {first.folder} and {other.folder})"
        )
    for path, (a, b) in first.layers.items():
        their_a, their_b = other.layers[path]
        if a.shape[1] != their_a.shape[1] or len(b) != len(their_b):
            raise UsageError(f"{path} has other sides in {first.folder} than in {other.folder}")
    heads = [{name: tensor.shape for name, tensor in x.head.items()} for x in (first, other)]
    if heads[0] != heads[1] or (heads[0] and ours.class_names != theirs.class_names):
        raise UsageError(
            f"trained heads can be merged only where all adapters have one, for the same classes: "
            f"{first.folder} and {other.folder} do not"
        )


def _check_same_rank(adapters: Sequence[LoraAdapter], method: str) -> None:
    for path in adapters[0].layers:
        ranks = [len(adapter.layers[path][0]) for adapter in adapters]
        if len(set(ranks)) > 1:
            raise UsageError(
                f"{method} needs adapters of the same rank, got {_listed(ranks)} in {path}; "
                "cat and svd take different ones"
            )


def _mean_head(
    adapters: Sequence[LoraAdapter], weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    if not adapters[0].head:
        return {}
    total = sum(weights)
    if total <= 0:
        raise UsageError(f"weights must sum to more than 0 for a trained head, got {total:g}")
    heads = [(weight / total, x.head) for weight, x in zip(weights, adapters, strict=True)]
    return {
        name: torch.stack([share * head[name] for share, head in heads]).sum(dim=0)
        for name in adapters[0].head
    }


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
