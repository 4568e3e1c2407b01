"""Has Inductor make kernels that are launched before those in front of them have ended (`ops.early_launch`).

Its own option for that (`triton.enable_pdl`) lets a kernel wait where it first needs what the kernel in front of it has
written, and tell the next one to begin after its last load. What needs what it takes from the names of buffers, and two
of them may have the same memory, one after the other: a kernel that stores in a loop would write what is still read,
and one that loads nothing waits for nothing at all. So all wait before they do anything else here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.compiler.config
from torch._inductor import config

from deepseek_mp.backends.early_launch import can_launch_early

TAG = "deepseek_mp: kernels wait first"
"""Of code in PyTorch's caches, which know its options but not what is changed here."""
_NEEDED = ("_filter_pdl", "_enable_pdl_codegen", "GDC_WAIT")


@contextmanager
def early_kernels(device: torch.device) -> Iterator[None]:
    """Inside, code for the device is made so, where it and this PyTorch can."""
    kernel = _kernel() if can_launch_early(device) else None
    if kernel is None:
        yield
        return
    caches: Any = torch.compiler.config
    filtered = kernel._filter_pdl  # noqa: SLF001 - where a kernel's code is complete

    def waiting(self: Any, code: Any) -> None:
        filtered(self, code)
        if self._enable_pdl_codegen():
            others = [line for line in code._lines if not (isinstance(line, str) and self.GDC_WAIT in line)]  # noqa: SLF001
            code._lines = [self.GDC_WAIT, *others]  # noqa: SLF001

    kernel._filter_pdl = waiting  # noqa: SLF001
    try:
        with config.patch({"triton.enable_pdl": True}), caches.patch(cache_key_tag=f"{caches.cache_key_tag}{TAG}"):
            yield
    finally:
        kernel._filter_pdl = filtered  # noqa: SLF001


def _kernel() -> Any:
    """Inductor's class of Triton kernels; None where it has not all that is changed here."""
    # Not with this module: this imports Triton where it is installed, and asks for a device.
    from torch._inductor.codegen.triton import TritonKernel

    known = hasattr(config.triton, "enable_pdl") and all(hasattr(TritonKernel, name) for name in _NEEDED)
    return TritonKernel if known else None
