"""Parameters of one device that kernels step: what they have in common is computed once for all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.ops.block_states import Blocks
from deepseek_mp.optim.states import blocks_of
from deepseek_mp.optim.stored import COMPENSATION, STREAM, Batch, StoredOptimizer

Kernel = Callable[[Tensor, Tensor, Any], None]
"""Steps a parameter on its gradient, in place."""
Numbers = Mapping[str, Any]
"""Numbers of a step by name. All are on the device, [] if they are one for all parameters and else [n]; or all are
lists of n numbers, equal where 'step', the number of the step, is.
"""


def step_fused(
    optimizer: StoredOptimizer,
    params: Sequence[Tensor],
    kernel_of: Callable[[torch.device], Kernel | None],
    steps_of: Callable[[list[Tensor]], Iterable[Any]],
) -> list[Tensor]:
    """Step parameters by a kernel each; gives those that there is none for.

    Args:
        kernel_of: from a device to its kernel.
        steps_of: from parameters of one device to what their kernels are given.
    """
    able: dict[torch.device, list[Tensor]] = defaultdict(list)
    left: list[Tensor] = []
    for parameter in params:
        fits = kernel_of(parameter.device) is not None and optimizer.is_fusable(parameter)
        (able[parameter.device] if fits else left).append(parameter)
    for device, some in able.items():
        run = kernel_of(device)
        for parameter, step in zip(some, steps_of(some), strict=True):
            if run is not None and parameter.grad is not None:
                _step_packed(run, parameter, parameter.grad, step)
    return left


def _step_packed(run: Kernel, parameter: Tensor, grad: Tensor, step: Any) -> None:
    """Step on copies in the order of `flatten()`, which kernels and moments in blocks have, where that is not memory's.

    The weights of convolutions in channels_last are such.
    """
    compensation: Tensor | None = step.compensation
    packed = parameter.contiguous()
    rest = None if compensation is None else compensation.contiguous()
    run(packed, grad.contiguous(), step if rest is compensation else replace(step, compensation=rest))
    if packed is not parameter:
        parameter.copy_(packed)
    if rest is not None and compensation is not None and rest is not compensation:
        compensation.copy_(rest)


@dataclass(frozen=True, kw_only=True)
class FusedBatch:
    """Some parameters, and what their steps share."""

    optimizer: StoredOptimizer
    group: Mapping[str, Any]
    batch: Batch
    """Of their states alone, to count the step."""
    scale: Tensor | None
    skip: Tensor | None

    @classmethod
    def of(
        cls,
        optimizer: StoredOptimizer,
        group: Mapping[str, Any],
        params: Sequence[Tensor],
        scale: Tensor | None,
        skip: Tensor | None,
    ) -> FusedBatch:
        """Args as `StoredOptimizer.step` has them; the parameters are on one device."""
        device = params[0].device
        scale, skip = (None if x is None else x.to(device, torch.float32, non_blocking=True) for x in (scale, skip))
        keep = None if skip is None else 1 - skip.reshape(())
        states = [optimizer.state[parameter] for parameter in params]
        batch = Batch(params=list(params), states=states, values=[], grads=[], keep=keep)
        return cls(optimizer=optimizer, group=group, batch=batch, scale=scale, skip=skip)

    @property
    def seed(self) -> int:
        """Of stochastic rounding."""
        return int(self.group["seed"])

    def of_each(self, numbers: Numbers) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each parameter with its numbers."""
        params = self.batch.params
        columns = [_each(value, len(params)) for value in numbers.values()]
        for parameter, *values in zip(params, *columns, strict=True):
            yield parameter, dict(zip(numbers, values, strict=True))

    def counts(self) -> tuple[Tensor, Tensor]:
        """On the device, for each parameter: the number of its step, int64 [n], and the same in fp32, at least 1.

        A step that is skipped may be the first one, whose correction would be 1 - beta**0.
        """
        steps = self.batch.counts()
        return steps.long(), steps.float().clamp_min_(1.0)

    def on_device(self, value: float | Tensor) -> Tensor:
        """The number as fp32 [] on the device, without waiting for it: `as_tensor` would."""
        device = self.batch.params[0].device
        if isinstance(value, Tensor):
            return value.to(device, torch.float32, non_blocking=True)
        return torch.full((), value, dtype=torch.float32, device=device)

    def blocks(self, parameter: Tensor, name: str) -> Blocks:
        """A moment of the parameter."""
        found = blocks_of(self.optimizer.state[parameter], name)
        assert found is not None, "only moments in blocks are stepped by a kernel"
        return found

    def stored(self, parameter: Tensor) -> dict[str, Any]:
        """How the parameter is written, but for its step: what `ops.fused_steps.Stored` has."""
        state = self.optimizer.state[parameter]
        return {
            "storage": self.optimizer.storage(parameter).value,
            "compensation": state.get(COMPENSATION),
            "seed": self.seed,
            "stream": state.get(STREAM, 0),
            "scale": self.scale,
            "skip": self.skip,
        }


@dataclass(frozen=True, kw_only=True)
class KernelRule:
    """How kernels run an optimizer's rule for parameters of a group."""

    alone: Callable[[torch.device], Kernel | None]
    """A device's kernel that steps one parameter."""
    together: Callable[[torch.device], Callable[[Any], None] | None]
    """That for many, which takes what `make` makes."""
    numbers_of: Callable[[FusedBatch], Numbers]
    """Counts the step."""
    steps_of: Callable[[FusedBatch], Iterable[Any]]
    """What `alone` is given of each parameter; counts the step."""
    make: Callable[..., Any]
    """`ops.fused_steps.ManyAdamW`, say."""
    moments: Sequence[str]
    options: Mapping[str, Any]
    """What `make` is given besides the numbers, and what `ops.fused_steps.Many` has."""


def _each(value: Any, count: int) -> Sequence[Any]:
    if isinstance(value, Tensor):
        return value.unbind() if value.dim() else [value] * count
    found: Sequence[Any] = value
    return found
