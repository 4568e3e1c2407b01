"""Max pools of a model that runs uncompiled compute by `ops.max_pool` in a training step, and keep a byte an output.

PyTorch's pool keeps its input and an index of 64 bits for each output. For a step's forward and backward the modules
`nn.MaxPool2d` get a forward of ours; before and after it the model is as its user made it, so that copies, files,
evaluation and exports know nothing of it. The backward is within, since what is checkpointed runs its forward there
again, on whatever thread, and must keep the same tensors. So this is no `TorchFunctionMode`, which a thread has to
itself and each operation pays for: calls of `torch.nn.functional.max_pool2d` in a user's forward stay PyTorch's.

Which calls are taken over says `nn.pool_calls`, as for compiled code, whose pools are replaced in its graph; of those
the ones whose gradient is wanted. What is traced, transformed by `torch.func` or differentiated forward stays too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from deepseek_mp.monitor.internals import is_compiled, is_transformed, only_traced
from deepseek_mp.nn.pool_calls import Choice, taken_over
from deepseek_mp.ops.max_pool import fastest
from deepseek_mp.ops.pool_window import PoolWindow
from deepseek_mp.trainer.config import Compile

LEAST_BYTES = 32 << 20
"""Of a pool's input. Ours takes the host some 130 us more, forward and backward, and saves an H200 some 6 us a MiB:
smaller pools would be slower where the host is what a step waits for."""
_FORWARD = nn.MaxPool2d.forward
_in_force: dict[nn.Module, tuple[MethodType, int]] = {}
"""Ours that pools have now, and how many want it: trainers of one model, on threads of their own, and within one."""
_changing = Lock()


class EagerPools:
    """The max pools of a model as they are now, and the context in which they are ours.

    Args:
        compile: how the trainer compiles the model: its compiled parts are left alone.
        choose: the implementation for a pool.
    """

    def __init__(self, model: nn.Module, compile: Compile, choose: Choice | None = None) -> None:
        compiled = [module for module in model.modules() if compile is True or is_compiled(module)]
        inside = {inner for module in compiled for inner in module.modules()}
        forward = _forward_by(choose or fastest)
        self._all = [MethodType(forward, module) for module in model.modules() if _is_known(module)]
        self._eager = [method for method in self._all if method.__self__ not in inside]

    @contextmanager
    def in_force(self, *, compiled_too: bool = False) -> Iterator[None]:
        """Inside, the pools are ours.

        Args:
            compiled_too: those of compiled parts as well, which then have to run uncompiled.
        """
        held: list[MethodType] = []
        try:
            for forward in self._all if compiled_too else self._eager:
                if _put(forward):
                    held.append(forward)
            yield
        finally:
            for forward in held:
                _take_away(forward)


def _put(forward: MethodType) -> bool:
    """Whether the pool has a forward of ours now, rather than somebody's own."""
    pool: nn.Module = forward.__self__  # type: ignore[assignment]
    with _changing:
        ours, users = _in_force.get(pool, (forward, 0))
        if not users and "forward" in vars(pool):
            return False
        vars(pool).setdefault("forward", ours)
        _in_force[pool] = ours, users + 1
    return True


def _take_away(forward: MethodType) -> None:
    pool: nn.Module = forward.__self__  # type: ignore[assignment]
    with _changing:
        ours, users = _in_force.pop(pool)
        if users > 1:
            _in_force[pool] = ours, users - 1
        elif vars(pool).get("forward") is ours:  # not what somebody has put there meanwhile
            del vars(pool)["forward"]


def _is_known(module: nn.Module) -> bool:
    """Whether the module is a max pool that computes as PyTorch's."""
    return isinstance(module, nn.MaxPool2d) and type(module).forward is _FORWARD


@cache
def _forward_by(choose: Choice) -> Callable[[nn.MaxPool2d, Tensor], Any]:
    """Stands in for the forward of a max pool, as a method of it.

    One function for all trainers and trials: where the user compiles a function that calls a pool, the compiler asks
    for the same forward again. Copies of a model that are made within a step have it for their own pools, and pickles
    only its name, which is that of the class's forward.
    """

    def forward(self: nn.MaxPool2d, input: Tensor) -> Any:
        ours = _ours(self, input, choose)
        if ours is None:
            return type(self).forward(self, input)
        values, _offsets = torch.ops.deepseek_mp.max_pool2d(*ours)
        return values

    return forward


def _ours(pool: nn.MaxPool2d, x: Tensor, choose: Choice) -> tuple[Any, ...] | None:
    """The arguments of our op, None for a call that stays PyTorch's."""
    if type(x) is not Tensor or not (x.requires_grad and torch.is_grad_enabled()):
        return None
    if only_traced() or is_transformed() or forward_ad.unpack_dual(x).tangent is not None:
        return None
    if x.nbytes < LEAST_BYTES:
        return None
    how = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices
    ours = taken_over((x, *how), {}, lambda leaf: leaf, choose)
    too_small = ours is not None and min(*x.shape, *PoolWindow.of(*ours[1:5]).output_size(*x.shape[2:])) < 1
    return None if too_small else ours  # PyTorch says what is wrong
