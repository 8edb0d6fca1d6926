"""Where and in which number format a run computes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from fedclip.errors import UsageError

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_own_process = False


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
    """Data type of matrix products; None for that of the weights."""
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


def keep_freed_memory() -> None:
    """Lets the process keep freed tensors of up to 32 MB for the next ones, and threads share them.

    glibc otherwise hands much of it back to the system, and each large tensor is then new to the
    process, page by page; and it gives each thread a heap of its own. Elsewhere nothing happens.
    For whoever starts a process, before its first threads: a library leaves the allocator alone.
    """
    global _own_process
    _own_process = True
    _set_malloc({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**31 - 1})


def return_freed_memory() -> None:
    """Lets freed tensors of a megabyte and more go back to the system at once, from now on.

    glibc otherwise raises its limit with each large block that is freed and then keeps such blocks
    on a heap that fragments: half a gigabyte in training ViT-B/32. Nothing happens in a process
    that is not ours, in which nobody called `keep_freed_memory`.
    """
    if _own_process:
        _set_malloc({_M_MMAP_THRESHOLD: 2**20, _M_TRIM_THRESHOLD: 2**17})


def _set_malloc(values: Mapping[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in values.items():
        mallopt(parameter, value)


def float64_home(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: on the device, but for Apple's GPU, which has none."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device
