"""Intel GPUs. Contract-tested only: no Intel GPU has run this code."""

# A question has one signature, whether or not a backend needs the product to answer it.
# ruff: noqa: ARG002

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from deepseek_mp.backends.base import SIXTEEN_BIT, Backend
from deepseek_mp.backends.capabilities import Identity, rows_of
from deepseek_mp.backends.fp32_flags import flag

UNITS_OF_PEAK = 512
"""Compute units the table's peak is for: one stack of a Max 1550. Two stacks can show as one device."""


class XpuBackend(Backend):
    """A part with matrix units whose product name is in the table; others are unknown."""

    name = "xpu"
    vendor = "intel"
    device_type = "xpu"
    executes = SIXTEEN_BIT

    def is_available(self) -> bool:
        return torch.xpu.is_available()

    def identify(self, device: torch.device) -> Identity:
        properties = torch.xpu.get_device_properties(device)
        named = [row for row in rows_of(self.name) if re.search(row["detect"]["xpu_name"], properties.name)]
        if not named or not properties.has_subgroup_matrix_multiply_accumulate:
            return Identity(row=None, device_name=properties.name)
        native_bf16 = torch.xpu.is_bf16_supported(including_emulation=False)
        return Identity(
            row=named[0]["id"],
            device_name=properties.name,
            exact=properties.max_compute_units == UNITS_OF_PEAK,
            dropped=frozenset() if native_bf16 else frozenset({"bf16"}),
        )

    def fp32_math(self, mode: str) -> AbstractContextManager[None]:
        """oneDNN on Intel GPUs reads only the old flag, which a PyTorch without XPU does not have."""
        return _onednn_tf32(mode == "tf32")

    def fp32_mode(self, product: str) -> str:
        return "tf32" if _has_flag() and torch.backends.mkldnn.allow_tf32 else "ieee"


def _has_flag() -> bool:
    """A PyTorch built without Intel GPUs warns when the flag is touched."""
    return bool(torch.xpu._is_compiled())  # noqa: SLF001 - no public name says it


@contextmanager
def _onednn_tf32(enabled: bool) -> Iterator[None]:
    if not _has_flag():
        yield
        return
    with flag(torch.backends.mkldnn, "allow_tf32", enabled):
        yield
