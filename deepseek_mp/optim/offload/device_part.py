"""`DevicePart`: the parameters that are stepped on the device, those whose gradients arrive last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.host_chunk import Member
from deepseek_mp.optim.offload.master_weights import Pair
from deepseek_mp.optim.offload.verdict import Scaling


class DevicePart:
    """Parameters with their FP32 masters on the device; an FP32 parameter is its own master, with its own gradient."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.pairs = [Pair(member.parameter, _master(member.parameter), member.group) for member in members]
        for pair in self.pairs:
            pair.adopt()

    def arrived(self, pair: Pair, gradient: Tensor) -> None:
        """Add a gradient to the master's."""
        if pair.master.grad is None:
            pair.master.grad = gradient.detach().float()
        else:
            pair.master.grad.add_(gradient)

    def step(self, groups: Sequence[Mapping[str, Any]], states: dict[Any, dict[str, Any]], scaling: Scaling) -> None:
        """AdamW's step on the masters that have gradients, and their values rounded into the parameters."""
        for index, group in enumerate(groups):
            pairs = [pair for pair in self.pairs if pair.group == index and pair.master.grad is not None]
            if not pairs:
                continue
            masters = [pair.master for pair in pairs]
            for pair in pairs:
                pair.check_place()
                pair.adopt()
                if not states.get(pair.master):
                    states[pair.master] = rule.new_state([torch.empty_like(pair.master) for _ in rule.MOMENTS])
            grads = [master.grad for master in masters if master.grad is not None]
            if not scaling.is_one:
                grads = [scaling.into(torch.empty_like(grad), grad) for grad in grads]
            counters = [states[master]["step"] for master in masters]
            torch._foreach_add_(counters, 1)
            rule.step(group, masters, grads, [rule.moments_of(states[master]) for master in masters], counters)
            self.write(pairs)

    def write(self, pairs: Sequence[Pair]) -> None:
        """Round the masters into the parameters."""
        for pair in pairs:
            if pair.parameter is not pair.master:
                pair.parameter.copy_(pair.master)
                pair.look()


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.dtype is torch.float32 else nn.Parameter(parameter.detach().float().contiguous())
