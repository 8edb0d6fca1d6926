"""Trained adapters merged into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedclip.adapters.load import adapter_folder
from fedclip.adapters.merge_search import Validation, search_weights
from fedclip.errors import UsageError
from fedclip.models.adapter_merge import check_pair, check_recipe, combine
from fedclip.models.adapter_updates import LoraAdapter, read_lora, write_lora
from fedclip.reports.listener import Listener


def merge(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    search: Sequence[str | Path] = (),
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Merges the adapters of runs or adapter folders into a new adapter folder, `output`.

    Methods, their formulas and default weights are those of `fedclip.lora.merge_methods`. `rank` is
    that of the result for the methods that cut, by default the largest of the adapters' own;
    `density` the share of entries that `ties`, `dare` and `knots` keep. `search` names finished
    runs on whose validation examples the weights are then searched, from `weights` on. `seed` is
    for `dare` and the search.

    Returns `adapters`, `method`, `weights`, `density`, `rank`, `output`, `kept_energy` (the share
    of the merged update's squared norm that the rank could hold), and where `search` is given
    `search` with the accuracies `before` and `after` it. Raises `UsageError` for adapters that do
    not go together.
    """
    adapters = read_adapters(paths)
    if Path(output).resolve() in [adapter.folder.resolve() for adapter in adapters]:
        raise UsageError(f"output {output} is one of the adapters to be merged; name another")
    recipe = check_recipe(adapters, method, weights, rank, density, seed)
    searched = {}
    if search:
        with listener or Listener() as listener:
            validations = [
                own for run in search for own in Validation.of_run(run, adapters[0], listener)
            ]
            listener.message("searching weights")
            found, rows = search_weights(adapters, recipe, validations)
        recipe, searched = replace(recipe, weights=found), {"search": rows}
    merged, kept = combine(adapters, recipe)
    write_lora(Path(output), merged)
    return {
        "adapters": [str(path) for path in paths],
        "method": recipe.name,
        "weights": list(recipe.weights),
        "density": None if recipe.method.density is None else recipe.density,
        "rank": merged.rank,
        "kept_energy": kept,
        "output": str(output),
        **searched,
    }


def read_adapters(paths: Sequence[str | Path]) -> list[LoraAdapter]:
    """Adapters that can be merged: two or more, on one base, of the same layers and classes."""
    if len(paths) < 2:
        raise UsageError(f"merging takes two adapters or more, got {len(paths)}")
    adapters = [read_lora(adapter_folder(path)) for path in paths]
    for other in adapters[1:]:
        check_pair(adapters[0], other)
    return adapters
