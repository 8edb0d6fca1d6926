"""Trainable tensors by name: validation of input, digest of output."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedclip.errors import UsageError
from fedclip.lora.names import rank_of
from fedclip.records import State


def checked_state(
    given: Mapping[str, Any], expected: Mapping[str, torch.Tensor], *, source: str
) -> dict[str, torch.Tensor]:
    """Fit `given` (torch or numpy) to the names and shapes of `expected`, as fp32 copies.

    Raises `UsageError` for a wrong name, rank or shape and for values that are not finite;
    `source` says in the message where the tensors came from.
    """
    if not isinstance(given, Mapping):
        raise UsageError(f"{source}: expected tensors by name, got {type(given).__name__}")
    _check_names(given, expected, source)
    theirs, ours = rank_of(given), rank_of(expected)
    if None not in (theirs, ours) and theirs != ours:
        raise UsageError(
            f"{source}: the adapter has rank {theirs}, the model rank {ours}; "
            f"set model.lora.r to {theirs} or use another adapter"
        )
    return {name: _checked(name, given[name], expected[name], source) for name in expected}


@torch.no_grad()
def write(parameters: Mapping[str, torch.Tensor], state: State) -> None:
    """Copy tensors into the parameters of the same names, of which none may be missing."""
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


@contextmanager
def replaced(parameters: Mapping[str, torch.Tensor], state: State) -> Iterator[None]:
    """Inside, the parameters that the state names hold its values."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    write(parameters, before | {name: state[name] for name in before if name in state})
    try:
        yield
    finally:
        write(parameters, before)


def adapter_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over sorted tensor names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_names(given: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
    missing = sorted(set(expected) - set(given))
    unknown = sorted(set(given) - set(expected))
    if not missing and not unknown:
        return
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} tensors of this model ({_first(missing)})")
    if unknown:
        parts.append(f"has {len(unknown)} that this model does not train ({_first(unknown)})")
    raise UsageError(
        f"{source} {' and '.join(parts)}; the base model, model.lora.target_modules and "
        f"model.head must be those that it was made with"
    )


def _checked(name: str, value: Any, expected: torch.Tensor, source: str) -> torch.Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))  # a copy: the array may be read-only
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"{source}: {name} is a {type(value).__name__}, not a tensor")
    if value.shape != expected.shape:
        raise UsageError(
            f"{source}: {name} has shape {list(value.shape)}, expected {list(expected.shape)}"
        )
    if not value.is_floating_point():
        raise UsageError(f"{source}: {name} holds {value.dtype}, expected floating-point numbers")
    tensor = value.detach().to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise UsageError(f"{source}: {name} holds values that are not finite (NaN or infinity)")
    return tensor


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:2])
    return f"{shown}, ..." if len(names) > 2 else shown
