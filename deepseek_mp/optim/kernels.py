"""`KernelOptimizer`: an optimizer whose rule kernels may run, for many parameters at once or one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deepseek_mp.optim.fused import FusedBatch, KernelRule, step_fused
from deepseek_mp.optim.many import step_many
from deepseek_mp.optim.stored import StoredOptimizer


class KernelOptimizer(StoredOptimizer):
    """Base of the optimizers that have kernels; `_kernel_rule` is what a subclass says of them."""

    def _kernel_rule(self, group: Mapping[str, Any]) -> KernelRule:
        raise NotImplementedError

    def _run_kernels(
        self,
        group: Mapping[str, Any],
        whole: list[Tensor],
        in_blocks: list[Tensor],
        scale: Tensor | None,
        skip: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        rule = self._kernel_rule(group)

        def batch_of(params: Sequence[Tensor]) -> FusedBatch:
            return FusedBatch.of(self, group, params, scale, skip)

        whole, in_blocks = step_many(self, group, (whole, in_blocks), rule, batch_of)
        return whole, step_fused(self, in_blocks, rule.alone, lambda params: rule.steps_of(batch_of(params)))
