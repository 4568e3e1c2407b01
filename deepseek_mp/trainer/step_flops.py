"""Counts the floating-point operations of a step as its model defines them: what is computed again counts once."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.nn.again import is_computed_again


class StepFlops(FlopCounterMode):
    """PyTorch's counter, which passes over what is measured or computed again."""

    def __init__(self) -> None:
        super().__init__(display=False)

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if is_computed_again():
            return out
        return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]
