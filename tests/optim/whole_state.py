"""What tests of optimizers look at: all numbers of a training, bit by bit, and a step that the device skips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def everything(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Copies of the parameters and of every tensor that the optimizer keeps of them."""
    states = [optimizer.state[p] for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()] + [
        value.clone() for state in states for _, value in sorted(state.items()) if isinstance(value, Tensor)
    ]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of as many tensors have the same types and bits."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def skip_a_step(model: nn.Module, optimizer: Optimizer) -> None:
    """A step with gradients that are infinite, which the device is told to skip; its marks stay."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf, dtype=torch.float32)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.ones(())
    optimizer.step()
