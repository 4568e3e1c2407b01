"""CPUs: AMX, AVX512-BF16, other x86-64, and ARM, by their instruction sets.

PyTorch runs BF16 and FP16 on every CPU, and without units for them that is a cliff (FP16 measured
36 times slower than FP32). A format is native only when the CPU has its instructions *and* oneDNN
says it uses them: oneDNN alone answers yes for BF16 on any AVX-512 CPU, where it is emulated.
"""

# A question has one signature, whether or not a backend needs the device to answer it.
# ruff: noqa: ARG002

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from deepseek_mp.backends.base import FP8, SIXTEEN_BIT, Backend
from deepseek_mp.backends.capabilities import Identity
from deepseek_mp.backends.fp32_flags import onednn_fp32, onednn_mode

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux wants written to clear_refs to reset VmHWM (man 5 proc)."""


class CpuBackend(Backend):
    """Always available; saturates nowhere; memory is that of the whole process."""

    name = "cpu"
    vendor = "cpu"
    device_type = "cpu"
    executes = SIXTEEN_BIT | FP8

    def is_available(self) -> bool:
        return True

    def identify(self, device: torch.device) -> Identity:
        flags = torch.cpu.get_capabilities()
        row = _row(flags)
        name = str(flags.get("cpu_name") or platform.processor() or platform.machine())
        native = {f for f in SIXTEEN_BIT if _has_units(f, flags) and _onednn_uses(f)}
        return Identity(
            row=row,
            device_name=name,
            added=frozenset(native & {"fp16"}) if row else frozenset(),
            dropped=frozenset(SIXTEEN_BIT - native),
        )

    def fp32_math(self, mode: str) -> AbstractContextManager[None]:
        return onednn_fp32(mode)

    def fp32_mode(self, product: str) -> str:
        return "bf16" if onednn_mode(product) == "bf16" else "ieee"

    def synchronize(self, device: torch.device) -> None:
        """Nothing to wait for: CPU operations are done when they return."""

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        """Peak resident memory of the process: VmHWM on Linux, else getrusage; None where neither exists."""
        peak = _linux_peak()
        if peak is not None or importlib.util.find_spec("resource") is None:
            return peak
        resource = importlib.import_module("resource")
        used = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return used if platform.system() == "Darwin" else used * 1024

    def peak_reserved_bytes(self, device: torch.device) -> int | None:
        """None: the C library's heap does not say."""

    def available_memory_bytes(self, device: torch.device) -> int | None:
        """The machine's memory, whoever uses it; None where the system does not say."""
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None

    def reset_peak_memory(self, device: torch.device) -> bool:
        """Possible on Linux only, and there down to what the process holds now."""
        if _linux_peak() is None:
            return False
        try:
            CLEAR_REFS.write_text(RESET_PEAK)
        except OSError:
            return False
        return True


def _row(flags: Mapping[str, Any]) -> str | None:
    architecture = str(flags.get("architecture", "")).lower()
    if architecture in ("aarch64", "arm64"):
        return "aarch64"
    if architecture not in ("x86_64", "amd64"):
        return None
    if flags.get("amx_bf16"):
        return "x86_amx"
    return "x86_avx512_bf16" if flags.get("avx512_bf16") else "x86_avx2"


UNITS = {"bf16": ("amx_bf16", "avx512_bf16", "bf16"), "fp16": ("amx_fp16", "avx512_fp16", "fp16_arith")}
"""Instruction sets with products in a format; the last of each is ARM's."""


def _has_units(format: str, flags: Mapping[str, Any]) -> bool:
    return any(bool(flags.get(name)) for name in UNITS[format])


def _onednn_uses(format: str) -> bool:
    """oneDNN's own answer, False for a PyTorch built without it."""
    question = f"_is_mkldnn_{format}_supported"
    return hasattr(torch.ops.mkldnn, question) and bool(getattr(torch.ops.mkldnn, question)())


def _linux_peak() -> int | None:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
