"""Names of LoRA tensors in a state, as `adapter_model.safetensors` has them.

The only parser of PEFT's key names: `base_model.model.<layer>.lora_A.weight` is A `[r, in]` of a
layer, `....lora_B.weight` its B `[out, r]`, `....lora_magnitude_vector` what DoRA adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
"""What PEFT puts before a layer's path in the model."""
_A, _B = ".lora_A.", ".lora_B."
_MAGNITUDE = ".lora_magnitude_vector"
_TRAINED = (_A, _B, _MAGNITUDE)


class Pair(NamedTuple):
    """Names of one layer's A and B in a state."""

    a: str
    b: str


def pair_of(layer: str) -> Pair:
    """Names of the factors of a layer, by the layer's path."""
    return Pair(f"{PREFIX}{layer}{_A}weight", f"{PREFIX}{layer}{_B}weight")


def magnitude_of(layer: str) -> str:
    """Name of the magnitudes that DoRA adds to a layer, by the layer's path."""
    return f"{PREFIX}{layer}{_MAGNITUDE}"


def pairs(state: Mapping[str, object]) -> dict[str, Pair]:
    """The factors in a state by the path of their layer, in the state's order."""
    end = f"{_A}weight"
    layers = (layer_path(name.removesuffix(end)) for name in state if name.endswith(end))
    return {layer: pair_of(layer) for layer in layers}


def layers_in(state: Mapping[str, object]) -> list[str]:
    """Paths of the layers whose factors are in a state, sorted."""
    return sorted(pairs(state))


def factor_names(state: Mapping[str, object], which: str) -> frozenset[str]:
    """Names of all A ("a") or all B ("b") in a state."""
    return frozenset(getattr(pair, which) for pair in pairs(state).values())


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor belongs to an adapter, and not to the model underneath."""
    return any(part in name for part in _TRAINED)


def factor_of(name: str) -> str | None:
    """`A` or `B` for the factor that a name is of, None for any other tensor."""
    return "A" if _A in name else "B" if _B in name else None


def layer_path(name: str) -> str:
    """A name without PEFT's prefix."""
    return name.removeprefix(PREFIX)


def rank_of(state: Mapping[str, torch.Tensor]) -> int | None:
    """Rank of a state's factors; None when there are none or they disagree."""
    ranks = {state[pair.a].shape[0] for pair in pairs(state).values()}
    return ranks.pop() if len(ranks) == 1 else None


def largest_rank(state: Mapping[str, torch.Tensor]) -> int:
    """The highest rank of a state's factors, 0 without any."""
    return max((len(state[pair.a]) for pair in pairs(state).values()), default=0)


def shape_at_rank(name: str, shape: tuple[int, ...], rank: int | None) -> tuple[int, ...]:
    """The shape of what a client of that rank holds: fewer rows of A, columns of B; None is all."""
    factor = factor_of(name)
    if rank is None or factor is None:
        return shape
    if factor == "A":
        return (min(rank, shape[0]), *shape[1:])
    return (*shape[:-1], min(rank, shape[-1]))


def first_ranks(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A view of the first ranks: of A its rows `[rank, in]`, of B its columns `[out, rank]`.

    Any other tensor is given whole.
    """
    return tensor[tuple(slice(size) for size in shape_at_rank(name, tuple(tensor.shape), rank))]


def at_rank(state: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The state with all but the first `rank` rows of A and columns of B set to zero.

    Where both are zero neither gets a gradient: the client trains an adapter of that rank. Layers
    of a lower rank of their own stay as they are.
    """
    cut = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in cut.items():
        if factor_of(name) == "A":
            tensor[rank:] = 0
        elif factor_of(name) == "B":
            tensor[:, rank:] = 0
    return cut
