"""Counts the floating-point operations of a step as its model defines them: what is computed again counts once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.monitor import PrecisionMonitor
from deepseek_mp.nn.again import is_computed_again


class _Everywhere:
    """Stands for PyTorch's tracker of modules, whose hooks read the graph of every module's output.

    An output that is not computed unless somebody reads it (`nn.deferred`) would be computed for that.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class StepFlops(FlopCounterMode):
    """PyTorch's counter of the whole alone, not by module, which passes over what is measured or computed again.

    Max pools count nothing, PyTorch's or ours: the number is the same on all devices.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping={torch.ops.deepseek_mp.max_pool2d: lambda *_, **__: 0})
        tracker: Any = _Everywhere()
        self.mod_tracker = tracker

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if is_computed_again():
            return out
        return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def counted(monitor: PrecisionMonitor, *, compiled: bool) -> Iterator[StepFlops]:
    """The forward and backward inside are counted, with their floating-point operations.

    The backward runs on this thread: from those that autograd keeps for devices an error that is raised among dispatch
    modes may come back lost (`SystemError`).
    """
    with (
        monitor.sample(compiled=compiled),
        torch.autograd.set_multithreading_enabled(False),
        warnings.catch_warnings(),
        StepFlops() as counter,
    ):
        warnings.filterwarnings("ignore", message="Using `torch.compile", category=UserWarning)
        yield counter
