"""Where and in which number format a run computes."""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from fedclip.errors import UsageError

if TYPE_CHECKING:
    import torch

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h


def torchrun_number(name: str, alone: int) -> int:
    """A number that torchrun puts into the environment, such as RANK; `alone` without torchrun."""
    return int(os.environ.get(name, alone)) if "WORLD_SIZE" in os.environ else alone


def resolve_device(name: str) -> torch.device:
    """The device that a name stands for; `auto` prefers CUDA, then Apple's GPU, then the CPU.

    Of several processes that torchrun started on a machine, each has the GPU of its number.
    """
    import torch

    if name == "auto":
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else other
    device = torch.device(name)
    if device.type == "cuda" and torchrun_number("WORLD_SIZE", 1) > 1:
        return _own_gpu(device)
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise UsageError(f"device: {name!r} is not on this machine; use auto or cpu")
    return device


def _own_gpu(device: torch.device) -> torch.device:
    """The GPU of this process, one of several on the machine."""
    import torch

    own, present = torchrun_number("LOCAL_RANK", 0), torch.cuda.device_count()
    if device.index not in (None, own):
        raise UsageError(f"device: {device} is one GPU for several processes; use auto")
    if own >= present:
        raise UsageError(
            f"device: process {own} of this machine has no GPU of its own; start torchrun with "
            f"--nproc-per-node {present}, or set device: cpu"
        )
    return torch.device("cuda", own)


def resolve_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; `auto` is bf16 on a GPU that computes in it, fp32 elsewhere."""
    import torch

    if name != "auto":
        return name
    fast_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast_bf16 else "fp32"


def product_dtype(precision: str) -> torch.dtype | None:
    """Format of matrix products; None where they have the weights' own."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context in which matrix products run in the precision; weights stay fp32."""
    import torch

    dtype = product_dtype(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 where it came in a shorter format: losses are summed in full precision."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def return_freed_memory() -> None:
    """Lets freed tensors of a megabyte and more go back to the system at once, from now on.

    glibc otherwise raises its limit with each large block that is freed and then keeps such blocks
    on a heap that fragments: half a gigabyte in training ViT-B/32. Elsewhere nothing happens.
    """
    _set_malloc(_M_MMAP_THRESHOLD, 2**20)


def share_one_heap() -> None:
    """Lets threads that are yet to come take memory from the process's heap.

    glibc otherwise gives each a heap of its own, which keeps no large block once it is freed: every
    large tensor of a thread is then new to it, page by page. Elsewhere nothing happens.
    """
    _set_malloc(_M_ARENA_MAX, 1)


def _set_malloc(parameter: int, value: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(parameter, value)


def float64_home(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: on the device, but for Apple's GPU, which has none."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device
