"""Which backend answers for a device, which devices this machine has, and backends added by plug-ins.

A vendor adds a backend without changing this package: a subclass of `Backend` under the entry point
group `deepseek_mp.backends`. Plug-ins are loaded at the first question, asked before the built-in
backends, and skipped with one warning when they do not work.
"""

# A question has one signature, whether or not a backend needs the device to answer it.
# ruff: noqa: ARG002

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import torch

from deepseek_mp.backends.ascend import AscendBackend
from deepseek_mp.backends.base import Backend
from deepseek_mp.backends.capabilities import Capabilities, Identity
from deepseek_mp.backends.cpu import CpuBackend
from deepseek_mp.backends.cuda import CudaBackend
from deepseek_mp.backends.mps import MpsBackend
from deepseek_mp.backends.rocm import RocmBackend
from deepseek_mp.backends.xpu import XpuBackend
from deepseek_mp.errors import ConfigError, explain

GROUP = "deepseek_mp.backends"
BUILT_IN: tuple[Backend, ...] = (
    RocmBackend(),
    CudaBackend(),
    AscendBackend(),
    XpuBackend(),
    MpsBackend(),
    CpuBackend(),
)
Device = torch.device | str


class UnlistedBackend(Backend):
    """A device type nobody answers for: FP32, nothing assumed."""

    name = "unlisted"
    vendor = "unknown"

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def is_available(self) -> bool:
        return True

    def identify(self, device: torch.device) -> Identity:
        return Identity(row=None, device_name=str(device))

    def autocast_formats(self, device: torch.device) -> frozenset[str]:
        return frozenset()

    def synchronize(self, device: torch.device) -> None:
        if _is_current_accelerator(device):
            super().synchronize(device)

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        return super().peak_memory_bytes(device) if _is_current_accelerator(device) else None

    def peak_reserved_bytes(self, device: torch.device) -> int | None:
        return super().peak_reserved_bytes(device) if _is_current_accelerator(device) else None

    def available_memory_bytes(self, device: torch.device) -> int | None:
        return super().available_memory_bytes(device) if _is_current_accelerator(device) else None

    def reset_peak_memory(self, device: torch.device) -> bool:
        return _is_current_accelerator(device) and super().reset_peak_memory(device)


def _is_current_accelerator(device: torch.device) -> bool:
    current = torch.accelerator.current_accelerator(check_available=True)
    return current is not None and current.type == device.type


@cache
def plugins() -> tuple[Backend, ...]:
    """The working backends of other packages, in the order of their names."""
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return tuple(backend for backend in map(_load, points) if backend is not None)


def _load(point: EntryPoint) -> Backend | None:
    try:
        backend = point.load()()
        if not isinstance(backend, Backend):
            raise TypeError(f"{point.value} is no subclass of deepseek_mp.backends.Backend")
        backend.is_available()
    except Exception as error:  # noqa: BLE001 - whatever a foreign package raises must not stop this one
        named = f"backend plug-in {point.name!r} ({point.value})"
        warnings.warn(f"{named} does not work and is skipped: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return backend


def backends() -> Sequence[Backend]:
    """All backends, plug-ins first, then accelerators, the CPU last."""
    return (*plugins(), *BUILT_IN)


def as_device(device: Device) -> torch.device:
    """A device from its name; loads the vendor's package when only that makes the name known."""
    if isinstance(device, torch.device):
        return device
    kind = str(device).split(":")[0]  # PyTorch also takes a number
    for backend in backends():
        if backend.device_type == kind and kind not in ("cpu", "cuda"):
            backend.is_available()
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        passed = f"device {device!r} is not known to this PyTorch"
        change = "Use one of these, or install the device's PyTorch package"
        raise ConfigError(explain(passed, _usable(), change)) from error


def _usable() -> str:
    return ", ".join(sorted({backend.device_type for backend in backends() if backend.is_available()}))


def backend_for(device: Device) -> Backend:
    """The backend that answers for a device, whether or not one is there."""
    where = as_device(device)
    for backend in backends():
        if backend.serves(where):
            return backend
    return UnlistedBackend(where.type)


def capabilities(device: Device) -> Capabilities:
    """What a device can do; `ConfigError` when this machine does not have it. Remembered per device."""
    return remembered(backend_for(device), numbered(device))


def numbered(device: Device) -> torch.device:
    """A device with its number, which is the current one's where none is given; as it is where none is in use."""
    where = as_device(device)
    backend = backend_for(where)
    if where.index is None and where.type != "cpu" and backend.is_available() and _is_current_accelerator(where):
        return torch.device(where.type, torch.accelerator.current_device_index())
    return where


@cache
def remembered(backend: Backend, device: torch.device) -> Capabilities:
    """The answer of `capabilities`, asked of the device once."""
    if not backend.is_available():
        change = "Use one of these devices, or install a PyTorch built for yours"
        raise ConfigError(explain(f"no {device.type!r} device can be used", _usable(), change))
    return backend.capabilities(device)


def default_device() -> torch.device:
    """The accelerator if one can be used, else the CPU."""
    accelerators = (b.device_type for b in backends() if b.device_type != "cpu" and b.is_available())
    return torch.device(next(accelerators, "cpu"))
