"""A backend answers questions about the devices of one vendor and does no math.

The questions: are you there; which chip is this; which formats can autocast run; which hidden flags
decide what FP32 means; how much memory was used; how much energy; did something overflow where
overflow leaves no infinity. Answers are data of `capabilities.py` or context managers. Defaults are
those of a well-behaved accelerator, so that a new backend overrides only where it differs.
"""

# A question has one signature, whether or not a backend needs the device to answer it.
# ruff: noqa: ARG002

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from deepseek_mp.backends.capabilities import Capabilities, Identity, resolve

SIXTEEN_BIT = frozenset({"bf16", "fp16"})
FP8 = frozenset({"fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz"})


class Backend(ABC):
    """One vendor's devices. Constructing one touches no device."""

    name: str
    """Name in reports: cuda, rocm, ascend, xpu, mps, cpu, or the plug-in's."""
    vendor: str
    device_type: str
    """The type of `torch.device` it serves; ROCm's is `cuda`."""
    executes: frozenset[str] = frozenset()
    """Formats PyTorch can execute on any such device, with units for them or without."""

    @abstractmethod
    def is_available(self) -> bool:
        """Whether a device can be used now. The first call may load a vendor's library."""

    @abstractmethod
    def identify(self, device: torch.device) -> Identity:
        """Which chip the device is."""

    def serves(self, device: torch.device) -> bool:
        """Whether questions about this device are for this backend."""
        return device.type == self.device_type

    def capabilities(self, device: torch.device) -> Capabilities:
        """What the device can do. A plug-in whose chips are not in the table overrides this."""
        return resolve(self.identify(device), vendor=self.vendor, backend=self.name, executes=self.executes)

    def autocast_formats(self, device: torch.device) -> frozenset[str]:
        """16-bit formats `torch.autocast` really runs there (with others it warns and runs FP32)."""
        return SIXTEEN_BIT if self.is_available() else frozenset()

    def fp32_math(self, mode: str) -> AbstractContextManager[None]:
        """A region in which FP32 products are computed in `mode`: ieee, tf32 or hf32. Default: no hidden flags."""
        return nullcontext()

    def fp32_mode(self, product: str) -> str:
        """How FP32 products are computed now: ieee, tf32, hf32 or bf16; `product` is matmul, conv or rnn."""
        return "ieee"

    def algorithm_search(self, enabled: bool) -> AbstractContextManager[None]:
        """A region with or without the library's search for the fastest algorithm. Default: it has none."""
        return nullcontext()

    def synchronize(self, device: torch.device) -> None:
        """Wait until the device has done all its work."""
        torch.accelerator.synchronize(device)

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        """Largest memory held by tensors since the last reset, or None where it is not counted."""
        return torch.accelerator.max_memory_allocated(device)

    def peak_reserved_bytes(self, device: torch.device) -> int | None:
        """Largest memory PyTorch's allocator took from the device since the last reset, or None where none counts."""
        return torch.accelerator.max_memory_reserved(device)

    def reset_peak_memory(self, device: torch.device) -> bool:
        """Start counting the peaks anew; False where it cannot be reset."""
        torch.accelerator.reset_peak_memory_stats(device)
        return True

    def available_memory_bytes(self, device: torch.device) -> int | None:
        """What this process may hold there: what is free, and what its allocator has taken. None where nobody knows."""
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)
        if ask is None:
            return None
        free, _ = ask(device)
        return int(free) + int(torch.accelerator.memory_reserved(device))

    def energy_joules(self, device: torch.device) -> float | None:
        """Energy the device has used since an arbitrary start, or None without a counter."""
        return None

    def clear_overflow(self, device: torch.device) -> None:  # noqa: B027 - nothing to do is the usual answer
        """Clear the hardware's overflow flag, where overflow saturates. Nothing to do elsewhere."""

    def overflow_seen(self, device: torch.device) -> Tensor | None:
        """Whether something overflowed since `clear_overflow`: a 0-dim bool on the device, None where IEEE."""
        return None
