"""What kernels of many parameters are compiled for, in Triton's words."""

from __future__ import annotations

from typing import Any

import torch

from deepseek_mp.ops.fused_steps import Many

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def constants(now: Many) -> dict[str, Any]:
    """The constants of a kernel that `table_kernel` and the tensors of the step decide."""
    return {
        "WEIGHT": "fp32" if now.storage == "fp32" else "bf16",
        "GRAD": _TYPES[now.gradient],
        "ALIGNED": now.table.aligned,
        "BLOCKS": now.in_blocks,
        "PERMUTED": now.permuted,
        "WRITE": now.storage,
        "SCALED": now.scale is not None,
        "SKIPPABLE": now.skip is not None,
    }
