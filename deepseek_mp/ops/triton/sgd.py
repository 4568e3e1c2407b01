"""A step of SGD with its momentum in 8-bit blocks by a Triton kernel, which reads and writes everything once.

One kernel steps one parameter, the other all parameters of a table, bit by bit alike: both are compiled without
contracting products and sums, which a compiler does in one kernel this way and in another that way.

The numbers are those of `optim.sgd` in plain PyTorch, but for the last bit: PyTorch contracts some products and
sums.
"""

from __future__ import annotations

from torch import Tensor

from deepseek_mp.ops.block_states import BLOCK
from deepseek_mp.ops.fused_steps import ManyMomentum, MomentumStep
from deepseek_mp.ops.pointer_table import ROWS
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.sgd_kernel import sgd_in_blocks_kernel, sgd_of_many_kernel
from deepseek_mp.ops.triton.table_names import constants


def sgd_in_blocks(parameter: Tensor, grad: Tensor, now: MomentumStep) -> None:
    """Step a parameter in place; see `ops.fused_steps`."""
    # A whole number would be another type to the kernel.
    numbers = [x if isinstance(x, Tensor) else float(x) for x in (now.rate, now.entering)]
    missing = parameter  # a pointer that is not read
    if count := parameter.numel():
        with on_device(parameter.device):
            sgd_in_blocks_kernel[(-(-count // (BLOCK * ROWS)),)](
                parameter, missing if now.compensation is None else now.compensation, grad, *now.buffer,
                missing if now.skip is None else now.skip, missing if now.scale is None else now.scale,
                *numbers, now.step, now.seed, now.stream, count, float(now.momentum), float(now.weight_decay),
                WRITE=now.storage, NESTEROV=now.nesterov, ON_DEVICE=isinstance(now.rate, Tensor),
                SCALED=now.scale is not None, SKIPPABLE=now.skip is not None, ROWS=ROWS, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip


def sgd_of_many(now: ManyMomentum) -> None:
    """Step the parameters of a table in place; see `ops.fused_steps`."""
    table = now.table
    numbers = [x if isinstance(x, Tensor) else float(x) for x in (now.rate, now.entering)]
    missing = table.lines  # a pointer that is not read
    with on_device(table.lines.device):
        sgd_of_many_kernel[(table.programs,)](
            table.lines, table.owners, table.grads, missing if now.skip is None else now.skip,
            missing if now.scale is None else now.scale, *numbers, now.step, now.seed, float(now.momentum),
            float(now.weight_decay), NESTEROV=now.nesterov, ON_DEVICE=isinstance(now.rate, Tensor), ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False, **constants(now),
        )  # fmt: skip
