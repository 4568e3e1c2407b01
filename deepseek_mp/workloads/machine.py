"""The machine in plain words: what it is called, how many cores it has, which versions are installed."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from deepseek_mp.backends import capabilities
from deepseek_mp.version import __version__


def describe_machine(device: torch.device) -> dict[str, Any]:
    """JSON values; None where the machine does not say (no CUDA in this build, no cuDNN)."""
    found = capabilities(device)
    return {
        "device": str(device),
        "device_name": found.device_name,
        "device_id": found.id,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package, of PyTorch and of the libraries it was built with."""
    # Asking for cuDNN's version loads it, so ask only where there is an accelerator to use it.
    cudnn = torch.backends.cudnn.version() if torch.accelerator.is_available() else None
    return {
        "python": platform.python_version(),
        "deepseek_mp": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
