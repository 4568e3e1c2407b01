"""Has Inductor make kernels that are launched before those in front of them have ended (`ops.early_launch`).

Its own option for that (`triton.enable_pdl`) lets a kernel wait at the first load of what the kernel in front of it may
still write, and tell the next one to begin after its last load. A kernel that loads nothing waits for nothing then,
and may write memory that is still read. So those wait first here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.codegen.triton import TritonKernel

from deepseek_mp.backends.early_launch import can_launch_early

_NEEDED = ("_filter_pdl", "_enable_pdl_codegen", "GDC_WAIT")


@contextmanager
def early_kernels(device: torch.device) -> Iterator[None]:
    """Inside, code for the device is made so, where it and this PyTorch can."""
    kernel: Any = TritonKernel
    known = hasattr(config.triton, "enable_pdl") and all(hasattr(kernel, name) for name in _NEEDED)
    if not known or not can_launch_early(device):
        yield
        return
    filtered = kernel._filter_pdl  # noqa: SLF001 - where a kernel's code is complete

    def waiting(self: Any, code: Any) -> None:
        filtered(self, code)
        if self._enable_pdl_codegen() and not any(self.GDC_WAIT in line for line in map(str, code._lines)):  # noqa: SLF001
            code._lines.insert(0, self.GDC_WAIT)  # noqa: SLF001

    kernel._filter_pdl = waiting  # noqa: SLF001
    try:
        with config.patch({"triton.enable_pdl": True}):
            yield
    finally:
        kernel._filter_pdl = filtered  # noqa: SLF001
