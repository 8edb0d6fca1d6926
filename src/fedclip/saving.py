"""The adapters that a run ends with, as PEFT folders."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import torch

from fedclip.federated.strategies.base import factors, pairs
from fedclip.federated.strategies.dynamic import layer_ranks
from fedclip.low_rank import Factors, resize
from fedclip.models.lora import scalings
from fedclip.parts import Parts
from fedclip.records import RunState, State
from fedclip.runs import RunFolder

# Singular values below this share of the largest are what rounding in fp32 leaves.
_NEGLIGIBLE = 1e-7


def save_adapters(parts: Parts, state: RunState, folder: RunFolder, name: str) -> None:
    """Writes the shared adapter to `name`, and those of the clients' own beside it.

    A client's is `<name>_of/<client id>`. Where the run has changed frozen weights, the adapter
    holds that change as well, at whatever rank it takes, and fits the base model as it came.
    """
    with folder.writing(name) as path:
        _save(parts, state, state.shared, path)
    for client_id, own in state.private.items():
        if own.keys() & state.shared.keys():
            with folder.writing(f"{name}_of/{quote(client_id, '')}") as path:
                path.parent.mkdir(exist_ok=True)
                _save(parts, state, state.of(client_id), path)
    parts.put(state)


def _save(parts: Parts, state: RunState, tensors: State, path: Path) -> None:
    model = parts.model
    whole = whole_factors(state, tensors, scalings(model.network)) if model.lora else {}
    if not whole:
        model.set_parameters(tensors)
        model.save_adapter(path)
        return
    found = pairs(tensors)
    before = {_exactly(layer): len(tensors[pair.a]) for layer, pair in found.items()}
    model.set_shift({})  # what is saved belongs to the base model's own weights
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
