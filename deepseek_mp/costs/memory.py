"""The most memory that tensors hold while a call runs, on a device that counts it and on a CPU.

An accelerator's allocator keeps a peak. On a CPU the process's size says little, since the heap keeps
what was freed; there, PyTorch's profiler lists every allocation and release, and the running sum
has an exact peak. Tensors that were there before count too where the caller names them.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import MEMORY_EVENT_NAME

from deepseek_mp.backends import peak_memory_bytes, reset_peak_memory, synchronize

_PROFILING = threading.RLock()
"""The profiler is the process's: two threads that profile at once crash it."""


def peak_during(call: Callable[[], object], device: torch.device, *, resident: Iterable[Tensor]) -> int | None:
    """Bytes in tensors at the highest point of `call`; None on a device that does not count.

    `resident` are the tensors that outlive the call (parameters, buffers, optimizer state); on an
    accelerator they are counted by its allocator, with everything else the process holds there.
    """
    if device.type != "cpu":
        synchronize(device)
        reset_peak_memory(device)
        call()
        synchronize(device)
        return peak_memory_bytes(device)
    with _PROFILING, _quiet(), profile(use_kineto=False, profile_memory=True) as profiled:
        call()
    held = peak = 0
    for _, change in sorted(_changes(profiled), key=itemgetter(0)):
        held += change
        peak = max(peak, held)
    return peak + distinct_bytes(resident)


def _changes(profiled: profile) -> Iterator[tuple[int, int]]:
    """When memory was taken or given back, in nanoseconds, and how many bytes, below zero where given back.

    From the records themselves: the profiler's events have sums of them, in which what Python frees inside of an
    optimizer's step, or of a backward, counts as freed when that ends.
    """
    results: Any = profiled.kineto_results
    for record in results.events():
        if record.name() == MEMORY_EVENT_NAME and record.device_type() == DeviceType.CPU:
            yield record.start_ns(), record.nbytes()


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each storage counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors an optimizer keeps per parameter (momenta, step counts)."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Send standard error away: some releases of the profiler announce themselves there.

    The profiler writes from C++, so the file descriptor itself is redirected.
    """
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as elsewhere:
            os.dup2(elsewhere.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
