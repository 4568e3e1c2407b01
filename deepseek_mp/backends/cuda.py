"""NVIDIA GPUs, by compute capability (sm_70 to sm_120)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

from deepseek_mp.backends.base import FP8, SIXTEEN_BIT, Backend
from deepseek_mp.backends.capabilities import Identity, rows_of
from deepseek_mp.backends.fp32_flags import cuda_fp32, cuda_mode, flag


class CudaBackend(Backend):
    """The table decides which formats are native; `torch.cuda.is_bf16_supported()` counts emulation."""

    name = "cuda"
    vendor = "nvidia"
    device_type = "cuda"
    executes = SIXTEEN_BIT | FP8

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and not torch.version.hip

    def is_available(self) -> bool:
        return not torch.version.hip and torch.cuda.is_available()

    def identify(self, device: torch.device) -> Identity:
        properties = torch.cuda.get_device_properties(device)
        major, minor = properties.major, properties.minor
        rows = rows_of(self.name)
        for row in rows:
            if row["detect"]["cc"] == [major, minor]:
                return Identity(row=row["id"], device_name=properties.name)
        for row in rows:
            if row["detect"]["cc"][0] == major and row["detect"].get("covers_major"):
                note = f"compute capability {major}.{minor} has no row: formats of {row['id']}, peak unknown"
                return Identity(row=row["id"], device_name=properties.name, exact=False, notes=(note,))
        return Identity(row=None, device_name=properties.name)

    def fp32_math(self, mode: str) -> AbstractContextManager[None]:
        return cuda_fp32(mode)

    def fp32_mode(self, product: str) -> str:
        return cuda_mode(product)

    def algorithm_search(self, enabled: bool) -> AbstractContextManager[None]:
        return flag(torch.backends.cudnn, "benchmark", enabled)

    def available_memory_bytes(self, device: torch.device) -> int | None:
        """What is free and what is ours, up to the share that PyTorch was told to keep to."""
        found = super().available_memory_bytes(device)
        share = torch.cuda.get_per_process_memory_fraction(device.index)  # which refuses "cuda" itself
        _, total = torch.cuda.mem_get_info(device)
        return found if found is None else min(found, round(share * total))

    def energy_joules(self, device: torch.device) -> float | None:
        """NVML's counter (Volta and newer), through the optional package `nvidia-ml-py`."""
        counter = _energy_counter(str(getattr(torch.cuda.get_device_properties(device), "uuid", "")))
        if counter is None:
            return None
        nvml, handle = counter
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0


@cache
def _energy_counter(uuid: str) -> tuple[Any, Any] | None:
    """NVML and its handle of the GPU, or None: not installed, no driver, or no counter on this part.

    The handle is found by UUID, because NVML numbers GPUs without regard to CUDA_VISIBLE_DEVICES.
    """
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None
    return nvml, handle
