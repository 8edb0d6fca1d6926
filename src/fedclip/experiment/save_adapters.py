"""Write the final adapters (global, per group, per client) in PEFT format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fedclip.config.names import file_name
from fedclip.experiment.context import RunContext
from fedclip.experiment.folder import RunFolder
from fedclip.federated.strategies.base import factors
from fedclip.federated.strategies.dynamic_ranks import layer_ranks
from fedclip.files import read_json
from fedclip.lora.factors import Factors, resize
from fedclip.lora.names import pairs
from fedclip.models.adapter_folder import NOTES
from fedclip.models.adapter_merge import check_recipe, combine
from fedclip.models.adapter_updates import read_lora, write_lora
from fedclip.models.peft_lora import scalings
from fedclip.records import RunState, State

# Singular values below this share of the largest are what rounding in fp32 leaves.
_NEGLIGIBLE = 1e-7


def save_adapters(context: RunContext, state: RunState, folder: RunFolder, name: str) -> None:
    """Writes the shared adapter to `name`, and those of groups and clients beside it.

    Theirs are `<name>_of/<group>` and `<name>_of/<client id>`; with groups `name` is their merge,
    by `federation.sharing.merge`. Where the run has changed frozen weights, the adapter holds that
    change as well, at whatever rank it takes, and fits the base model as it came.
    """
    if state.groups:
        for group, own in state.groups.items():
            context.turn_to(group)
            with _beside(folder, name, group) as path:
                save_adapter(context, own, own.shared, path)
            _save_private(context, own, folder, name)
        context.turn_to(None)
        with folder.writing(name) as path:
            _merge(context, [_place(folder, name, group) for group in state.groups], path)
    else:
        context.turn_to(None)
        with folder.writing(name) as path:
            save_adapter(context, state, state.shared, path)
        _save_private(context, state, folder, name)
    context.put(state)


def adapter_digests(folder: RunFolder) -> dict[str, str]:
    """Digest of every adapter that a run has saved, by its folder's path in the run."""
    found = sorted(folder.path.glob(f"adapter*/**/{NOTES}"))
    return {
        path.parent.relative_to(folder.path).as_posix(): read_json(path)["adapter_sha256"]
        for path in found
    }


def _save_private(context: RunContext, state: RunState, folder: RunFolder, name: str) -> None:
    for client_id, own in state.private.items():
        if own.keys() & state.shared.keys():
            context.turn_to(context.task_of.get(client_id))
            with _beside(folder, name, client_id) as path:
                save_adapter(context, state, state.of(client_id), path)


def _place(folder: RunFolder, name: str, owner: str) -> Path:
    return folder.path / f"{name}_of" / file_name(owner)


@contextmanager
def _beside(folder: RunFolder, name: str, owner: str) -> Iterator[Path]:
    with folder.writing(f"{name}_of/{file_name(owner)}") as path:
        path.parent.mkdir(exist_ok=True)
        yield path


def _merge(context: RunContext, folders: Sequence[Path], path: Path) -> None:
    adapters = [read_lora(folder) for folder in folders]
    method, seed = context.config.federation.sharing.merge, context.config.seed
    merged, _ = combine(adapters, check_recipe(adapters, method, seed=seed))
    write_lora(path, merged)


def save_adapter(context: RunContext, state: RunState, tensors: State, path: Path) -> None:
    """Writes tensors, with what belongs to them in a state, as the folder of a PEFT adapter."""
    model = context.model
    whole = whole_factors(state, tensors, scalings(model.network))
    if not whole:
        model.set_parameters(tensors)
        model.save_adapter(path)
        return
    found = pairs(tensors)
    before = {_exactly(layer): len(tensors[pair.a]) for layer, pair in found.items()}
    context.shift({})  # what is saved belongs to the base model's own weights
    model.set_rank({_exactly(layer): len(x.a) for layer, x in whole.items()})
    renewed = {found[layer].a: x.a for layer, x in whole.items()}
    renewed |= {found[layer].b: x.b for layer, x in whole.items()}
    model.set_parameters({**tensors, **renewed})
    model.save_adapter(path)
    model.set_rank(before)


def whole_factors(
    state: RunState, tensors: State, scalings: dict[str, float]
) -> dict[str, Factors]:
    """The factors of layers whose adapter is not simply its tensors, by layer.

    Of a shifted layer, scaling * B A is the shift and the adapter together; of a layer with a rank
    of its own, what is beyond that is left out.
    """
    found = pairs(tensors)
    ranks = layer_ranks(state, found)
    whole = {}
    for layer, pair in found.items():
        own = factors(tensors, pair)
        if layer in state.shift:
            scaling = scalings[layer]
            whole[layer] = _factored(state.shift[layer] / scaling + own.product())
        elif ranks[layer] < len(own.a):
            whole[layer] = resize(own, ranks[layer])
    return whole


def _factored(matrix: torch.Tensor) -> Factors:
    """Factors of a dense matrix at its numerical rank, at least 1."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = max(1, int((s > _NEGLIGIBLE * s[0]).sum()))
    root = s[:rank].sqrt()
    return Factors((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float())


def _exactly(layer: str) -> str:
    """A pattern that fits this layer alone."""
    return re.escape(layer)
