"""Makes the device of a kernel's tensors the current one: Triton launches on the current one, whatever it is given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Context for launches: of a model on several devices, a tensor may be on another than the current one."""
    here = device.type == "cpu" or device.index == torch.cuda.current_device()  # a CPU interprets the kernels
    return nullcontext() if here else torch.cuda.device(device)
