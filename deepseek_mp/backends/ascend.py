"""Huawei Ascend NPUs, by SoC number. Contract-tested only: no Ascend hardware has run this code.

The SoC *name* misleads: `Ascend910B` is the first generation (number 104: no BF16, overflow
saturates), `Ascend910B1` to `B4` (220 to 225) are what people call 910B. `torch_npu` is imported
only when a question needs it, because importing it without CANN installed fails.
"""

# A question has one signature, whether or not a backend needs the device to answer it.
# ruff: noqa: ARG002

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.backends.base import Backend
from deepseek_mp.backends.capabilities import Identity, rows_of
from deepseek_mp.backends.fp32_flags import flag

FORMAT_OF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
STATUS_WORDS = 8
"""Length of the buffer that holds the hardware's float status; element 0 is non-zero after overflow."""


@cache
def load() -> Any | None:
    """The module `torch_npu`, or None: not installed, or installed but not working (one warning says why)."""
    if importlib.util.find_spec("torch_npu") is None:
        return None
    try:
        import torch_npu
    except (ImportError, OSError, RuntimeError) as error:
        warnings.warn(f"torch_npu is installed but cannot be used, Ascend devices are ignored: {error}", stacklevel=2)
        return None
    return torch_npu


def _npu() -> Any:
    """The device module `torch.npu`, which exists once torch_npu is loaded."""
    return getattr(torch, "npu")  # noqa: B009 - PyTorch's type stubs do not know it


class AscendBackend(Backend):
    """Which chip it is comes from the SoC number, overflow behaviour from the driver's own answer."""

    name = "ascend"
    vendor = "ascend"
    device_type = "npu"
    executes = frozenset({"fp16"})

    def is_available(self) -> bool:
        return load() is not None and bool(_npu().is_available())

    def identify(self, device: torch.device) -> Identity:
        library = _loaded()
        number = int(library._C._npu_get_soc_version())  # noqa: SLF001 - the only place that tells the number
        index = _npu().current_device() if device.index is None else device.index
        name = str(_npu().get_device_name(index))
        found = [row for row in rows_of(self.name) if _holds(row["detect"]["soc_enum"], number)]
        if not found:
            return Identity(row=None, device_name=name, notes=(f"SoC number {number}",))
        saturates = not library.npu.utils.is_support_inf_nan()
        differs = saturates and found[0]["overflow"] == "ieee"
        note = ("INF/NaN mode is off, so overflow saturates",) if differs else ()
        return Identity(row=found[0]["id"], device_name=name, overflow="saturate" if saturates else None, notes=note)

    def autocast_formats(self, device: torch.device) -> frozenset[str]:
        if not self.is_available():
            return frozenset()
        return frozenset(FORMAT_OF[dtype] for dtype in _npu().get_amp_supported_dtype() if dtype in FORMAT_OF)

    def fp32_math(self, mode: str) -> AbstractContextManager[None]:
        """HF32 is on for convolutions and off for matrix products by default: set both."""
        return _hf32(mode == "hf32")

    def fp32_mode(self, product: str) -> str:
        if load() is None:
            return "ieee"
        operation = _npu().conv if product == "conv" else _npu().matmul
        return "hf32" if operation.allow_hf32 else "ieee"

    def clear_overflow(self, device: torch.device) -> None:
        if self._saturates():
            _loaded().npu_clear_float_status(torch.zeros(STATUS_WORDS, device=device))

    def overflow_seen(self, device: torch.device) -> Tensor | None:
        if not self._saturates():
            return None
        status: Tensor = _loaded().npu_get_float_status(torch.zeros(STATUS_WORDS, device=device))
        return status[0] != 0

    def _saturates(self) -> bool:
        return not _loaded().npu.utils.is_support_inf_nan()


def _loaded() -> Any:
    library = load()
    assert library is not None, "asked about an Ascend device although torch_npu is not loaded"
    return library


def _holds(bounds: list[int], number: int) -> bool:
    low, high = bounds
    return low <= number <= high


@contextmanager
def _hf32(enabled: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if load() is not None:
            stack.enter_context(flag(_npu().matmul, "allow_hf32", enabled))
            stack.enter_context(flag(_npu().conv, "allow_hf32", enabled))
        yield
