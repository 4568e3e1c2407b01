"""Apple GPUs through Metal. Contract-tested only: no Apple GPU has run this code."""

# A question has one signature, whether or not a backend needs the device to answer it.
# ruff: noqa: ARG002

from __future__ import annotations

import platform

import torch

from deepseek_mp.backends.base import Backend
from deepseek_mp.backends.capabilities import Identity


class MpsBackend(Backend):
    """No FP64, no float8 tensors, no hidden FP32 flags, and no counter of peak memory."""

    name = "mps"
    vendor = "apple"
    device_type = "mps"
    executes = frozenset({"fp16"})

    def is_available(self) -> bool:
        return torch.backends.mps.is_available()

    def identify(self, device: torch.device) -> Identity:
        bf16 = _has_bf16()
        note = () if bf16 else ("bf16 needs macOS 14 or newer on Apple silicon",)
        return Identity(
            row="mps",
            device_name=torch.backends.mps.get_name(),
            dropped=frozenset() if bf16 else frozenset({"bf16"}),
            notes=note,
        )

    def autocast_formats(self, device: torch.device) -> frozenset[str]:
        usable = super().autocast_formats(device)
        return usable - {"bf16"} if usable and not _has_bf16() else usable

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        return None

    def peak_reserved_bytes(self, device: torch.device) -> int | None:
        return None

    def available_memory_bytes(self, device: torch.device) -> int | None:
        return None

    def reset_peak_memory(self, device: torch.device) -> bool:
        return False


def _has_bf16() -> bool:
    return torch.backends.mps.is_macos_or_newer(14, 0) and platform.machine() == "arm64"
