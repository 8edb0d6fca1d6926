"""How many clients fit into one pass: activations are measured, not guessed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from fedclip.device import torchrun_number
from fedclip.federated.engines.protocols import Stacked

# A backward pass holds gradients beside what the forward pass kept, and libraries their buffers.
HEADROOM = 1.5
DEFAULT_SHARE = 0.25
ROW_BYTES = 12
"""Of an example that is a client of its own: a copy of each number, its gradient, and it again."""
_ADAMW_BYTES = 16  # a parameter, its gradient and two moments, in fp32


def choose_group_size(
    model: Stacked,
    state: Mapping[str, torch.Tensor],
    *,
    image_size: int,
    batch_size: int,
    clients: int,
    memory_gb: float | None,
    device: torch.device,
    by_example: bool = False,
) -> int:
    """As many clients as the budget allows, at least one and at most `clients`.

    `state` is one client's trainable tensors. The budget is `memory_gb` (10^9 bytes), by default
    a quarter of the device's memory. With `by_example` every example is a client of its own.
    """
    numbers = sum(tensor.numel() for tensor in state.values())
    rows = 1 if by_example else batch_size
    activations = activation_bytes(
        model, state, image_size=image_size, batch_size=rows, device=device
    )
    if by_example:
        activations = batch_size * (activations + ROW_BYTES * numbers)
    optimizer = _ADAMW_BYTES * numbers
    budget = memory_budget(memory_gb, device)
    return max(1, min(clients, int(budget / (HEADROOM * activations + optimizer))))


def activation_bytes(
    model: Stacked,
    state: Mapping[str, torch.Tensor],
    *,
    image_size: int,
    batch_size: int,
    device: torch.device,
) -> int:
    """Bytes that one more client in a pass keeps for its backward pass."""
    # Both passes are held until all is counted, lest a freed storage's place be taken by another.
    held = [_kept(model, state, rows, image_size, device) for rows in (1, 2)]
    one_image, two_images = (storages for storages, _ in held)
    # What both keep, such as the frozen weights, all clients share. The rest has a fixed part
    # (prompts) and a part for each image.
    shared = sum(size for place, size in one_image.items() if place in two_images)
    one, two = (sum(storages.values()) - shared for storages in (one_image, two_images))
    return one + (two - one) * (batch_size - 1)


def memory_budget(memory_gb: float | None, device: torch.device) -> float:
    """Bytes that one part of a run may take: what is asked, or a quarter of the device's memory.

    Processes on one machine divide it, unless each has a GPU of its own.
    """
    budget = memory_gb * 1e9 if memory_gb is not None else DEFAULT_SHARE * _total_bytes(device)
    return budget if device.type == "cuda" else budget / torchrun_number("LOCAL_WORLD_SIZE", 1)


def _kept(
    model: Stacked,
    state: Mapping[str, torch.Tensor],
    images: int,
    image_size: int,
    device: torch.device,
) -> tuple[dict[int, int], torch.Tensor]:
    """What a client's forward pass keeps for backward, bytes by address, as long as the result."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, a result would hold its own graph, and never be freed

    stacked = {
        name: tensor.to(device)[None].clone().requires_grad_() for name, tensor in state.items()
    }
    pixels = torch.zeros(images, 3, image_size, image_size, dtype=torch.uint8, device=device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return storages, model.logits(stacked, pixels, [images], [0])


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, *_container_limits())


def _container_limits() -> list[int]:
    """What a container allows, where that is a number; going beyond it ends the process."""
    files = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    texts = [Path(name).read_text().strip() for name in files if Path(name).is_file()]
    return [int(text) for text in texts if text.isdecimal()] or [2**63]
