"""What an optimizer steps for a model's parameter: the parameter itself, or its FP32 master where it is offloaded."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from deepseek_mp.optim.offload.optimizer import OffloadedOptimizer


def stepped(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """What has the gradient and the state of the parameter; the parameter itself if the optimizer does not train it."""
    if isinstance(optimizer, OffloadedOptimizer) and optimizer.trains(parameter):
        return optimizer.master(parameter)
    return parameter


def land(optimizer: Optimizer) -> None:
    """All gradients that were sent to the host have been added up. Nothing to do if not offloaded."""
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.land()


def settle(optimizer: Optimizer) -> None:
    """Before a step: bring masters and states to where the last one left them. Nothing to do if not offloaded."""
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.settle()
