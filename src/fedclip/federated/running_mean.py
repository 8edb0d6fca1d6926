"""Arithmetic on stacked updates: pure functions that know no rounds and no devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Combine = Callable[[list[torch.Tensor]], None]
"""Sums float64 tensors, in place, over all processes that take part."""


class RunningMean:
    """Weighted mean of stacked updates that arrive group by group.

    Clients are added one at a time in the order given, in float64, so that the result does not
    depend on how they were grouped, and memory does not grow with their number.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._total = 0.0

    def add(self, tensors: Mapping[str, torch.Tensor], weights: torch.Tensor) -> None:
        """Adds a group: tensors `[clients, ...]` by name, weights `[clients]`."""
        if self._sums and self._sums.keys() != tensors.keys():
            raise ValueError("updates of one round must hold the same tensors")
        for name, stacked in tensors.items():
            if len(stacked) != len(weights):
                raise ValueError(f"{name}: {len(stacked)} updates but {len(weights)} weights")
            if name not in self._sums:
                self._sums[name] = stacked.new_zeros(stacked.shape[1:], dtype=torch.float64)
                self._dtypes[name] = stacked.dtype
            elif self._sums[name].shape != stacked.shape[1:]:
                # Without this check a rank-1 factor would silently broadcast over a larger one.
                expected, got = tuple(self._sums[name].shape), tuple(stacked.shape[1:])
                raise ValueError(f"{name}: updates of shapes {expected} and {got}")
            for update, weight in zip(stacked, weights.tolist(), strict=True):
                self._sums[name].add_(update.double(), alpha=weight)
        self._total += sum(weights.tolist())

    def combine(self, like: Mapping[str, torch.Tensor], combine: Combine) -> None:
        """Takes in what the other processes have added, in an order that all of them share.

        `like` has the names, shapes and dtypes of an update: a process without clients adds zeros.
        """
        for name, tensor in like.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._dtypes[name] = tensor.dtype
        total = torch.tensor([self._total], dtype=torch.float64)
        combine([*(self._sums[name] for name in sorted(self._sums)), total])
        self._total = total.item()

    def result(self) -> dict[str, torch.Tensor]:
        """The mean by name, in the dtype of the updates."""
        if self._total <= 0:
            raise ValueError("the weights of a mean must sum to a positive number")
        return {n: (s / self._total).to(self._dtypes[n]) for n, s in self._sums.items()}
