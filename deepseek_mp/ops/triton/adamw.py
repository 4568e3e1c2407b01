"""An AdamW step with moments in 8-bit blocks by a Triton kernel, which reads and writes everything once.

One kernel steps one parameter, the other all parameters of a table, bit by bit alike: both are compiled without
contracting products and sums, which a compiler does in one kernel this way and in another that way.

The numbers are those of `optim.adamw` in plain PyTorch, but for the last bit: a compiler may contract a product and a
sum, so a code may differ by one, rarely. Bits of rounding are checked on a GPU only; Triton's interpreter has checked
the indexing. Compiled for sm_75, sm_80 and sm_90 they take up to 92 registers where values are read several at once, up
to 128 elsewhere (channels_last, odd sizes), and spill none. How long a step takes has not been measured.
"""

from __future__ import annotations

from torch import Tensor

from deepseek_mp.ops.block_states import BLOCK
from deepseek_mp.ops.fused_steps import AdamWStep, ManyAdamW
from deepseek_mp.ops.pointer_table import ROWS
from deepseek_mp.ops.triton.adamw_kernel import adamw_in_blocks_kernel, adamw_of_many_kernel
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.table_names import constants


def adamw_in_blocks(parameter: Tensor, grad: Tensor, now: AdamWStep) -> None:
    """Step a parameter in place; see `ops.fused_steps`."""
    # A whole number would be another type to the kernel.
    numbers = [x if isinstance(x, Tensor) else float(x) for x in (now.decay, now.size, now.root)]
    missing = parameter  # a pointer that is not read
    if count := parameter.numel():
        with on_device(parameter.device):
            adamw_in_blocks_kernel[(-(-count // (BLOCK * ROWS)),)](
                parameter, missing if now.compensation is None else now.compensation, grad, *now.first, *now.second,
                missing if now.skip is None else now.skip, missing if now.scale is None else now.scale,
                *numbers, now.step, now.seed, now.stream, count, *map(float, now.betas), float(now.eps),
                WRITE=now.storage, ON_DEVICE=isinstance(now.size, Tensor), SCALED=now.scale is not None,
                SKIPPABLE=now.skip is not None, ROWS=ROWS, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip


def adamw_of_many(now: ManyAdamW) -> None:
    """Step the parameters of a table in place; see `ops.fused_steps`."""
    table = now.table
    numbers = [x if isinstance(x, Tensor) else float(x) for x in (now.decay, now.size, now.root)]
    missing = table.lines  # a pointer that is not read
    with on_device(table.lines.device):
        adamw_of_many_kernel[(table.programs,)](
            table.lines, table.owners, table.grads, missing if now.skip is None else now.skip,
            missing if now.scale is None else now.scale, *numbers, now.step, now.seed, *map(float, now.betas),
            float(now.eps), ON_DEVICE=isinstance(now.size, Tensor), ROWS=ROWS, num_warps=4,
            enable_fp_fusion=False, **constants(now),
        )  # fmt: skip
