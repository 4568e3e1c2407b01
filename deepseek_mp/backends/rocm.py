"""AMD GPUs, by gfx architecture name. Contract-tested only: no AMD hardware has run this code.

ROCm calls its devices `cuda`, and its compute capability is the gfx major, so that an RDNA3 card
(gfx1100) looks newer than NVIDIA's Blackwell. The only reliable name is `gcnArchName`.
"""

# A question has one signature, whether or not a backend needs the device to answer it.
# ruff: noqa: ARG002

from __future__ import annotations

import torch

from deepseek_mp.backends.capabilities import Identity, rows_of
from deepseek_mp.backends.cuda import CudaBackend

FP8_SINCE = {"gfx950": (6, 5), "gfx120x": (6, 3)}
"""First ROCm release in which PyTorch accepts OCP fp8 products, by row."""
FP8 = frozenset({"fp8_e4m3", "fp8_e5m2"})


class RocmBackend(CudaBackend):
    """Flags and memory counters are those of CUDA; the chip is told by its architecture name."""

    name = "rocm"
    vendor = "amd"

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and bool(torch.version.hip)

    def is_available(self) -> bool:
        return bool(torch.version.hip) and torch.cuda.is_available()

    def identify(self, device: torch.device) -> Identity:
        properties = torch.cuda.get_device_properties(device)
        architecture = str(properties.gcnArchName).split(":")[0]
        row = _row(architecture)
        if row is None:
            return Identity(row=None, device_name=properties.name, notes=(f"architecture {architecture}",))
        old = _rocm_version() < FP8_SINCE.get(row, (0, 0))
        note = (f"ROCm {torch.version.hip} is too old for fp8 on {architecture}",) if old else ()
        return Identity(row=row, device_name=properties.name, dropped=FP8 if old else frozenset(), notes=note)

    def fp32_mode(self, product: str) -> str:
        """Matrix products follow the flag; MIOpen's convolutions and RNNs are taken to ignore it (unverified)."""
        return super().fp32_mode(product) if product == "matmul" else "ieee"

    def energy_joules(self, device: torch.device) -> float | None:
        return None


def _row(architecture: str) -> str | None:
    for row in rows_of("rocm"):
        detect = row["detect"]
        if architecture == detect.get("gcn"):
            return str(row["id"])
        if "gcn_prefix" in detect and architecture.startswith(detect["gcn_prefix"]):
            return str(row["id"])
    return None


def _rocm_version() -> tuple[int, ...]:
    """Major and minor of the ROCm this PyTorch was built for; `torch.version.hip` reads like `6.4.43482`."""
    return tuple(int(part) for part in str(torch.version.hip).split(".")[:2])
