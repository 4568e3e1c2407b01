"""What a device used and whether it overflowed: memory, energy, the overflow flag, waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.backends.detect import Device, as_device, backend_for


def synchronize(device: Device) -> None:
    """Wait until the device has done all its work; a CPU has nothing to wait for."""
    where = as_device(device)
    backend_for(where).synchronize(where)


def peak_memory_bytes(device: Device) -> int | None:
    """Peak memory since the last reset: of tensors on an accelerator, of the whole process on a CPU.

    None where nothing counts it (Apple GPUs).
    """
    where = as_device(device)
    return backend_for(where).peak_memory_bytes(where)


def peak_reserved_bytes(device: Device) -> int | None:
    """Peak memory that PyTorch's allocator took from the device since the last reset: tensors, and gaps between them.

    What decides whether a training fits. None where nothing counts it (CPUs, Apple GPUs).
    """
    where = as_device(device)
    return backend_for(where).peak_reserved_bytes(where)


def reset_peak_memory(device: Device) -> bool:
    """Start counting the peaks anew; False where it cannot be reset (a CPU outside Linux, Apple GPUs)."""
    where = as_device(device)
    return backend_for(where).reset_peak_memory(where)


def available_memory_bytes(device: Device) -> int | None:
    """What this process may hold on the device, in bytes: what is free, and what PyTorch's allocator has taken.

    On a CPU the machine's memory. None where nobody knows (Apple GPUs).
    """
    where = as_device(device)
    return backend_for(where).available_memory_bytes(where)


def out_of_memory_count(device: Device) -> int | None:
    """How often memory of the device ran out in this process, by its allocator's count; None where nothing counts."""
    where = as_device(device)
    if where.type == "cpu" or not hasattr(torch.accelerator, "memory_stats"):
        return None
    count = torch.accelerator.memory_stats(where).get("num_ooms")
    return None if count is None else int(count)


def energy_joules(device: Device) -> float | None:
    """Energy used since an arbitrary start, in joules; None without a counter. Differences are what counts."""
    where = as_device(device)
    return backend_for(where).energy_joules(where)


def clear_overflow(device: Device) -> None:
    """Clear the hardware's overflow flag before a backward pass; does nothing where overflow gives infinities."""
    where = as_device(device)
    backend_for(where).clear_overflow(where)


def overflow_seen(device: Device) -> Tensor | None:
    """Whether something overflowed since `clear_overflow`, on a device whose overflow saturates.

    A 0-dim bool tensor on the device, read without waiting; None where overflow gives infinities,
    which the gradients themselves then show.
    """
    where = as_device(device)
    return backend_for(where).overflow_seen(where)
