"""Changes how a parameter is stored, in place: the object stays, with its value and the optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.stored import joined, random_bits, round_by_bits, split
from deepseek_mp.optim.stored import COMPENSATION, STREAM, StoredOptimizer, hold, step_number
from deepseek_mp.precision.checks import find_member
from deepseek_mp.precision.storage import StorageFormat

_CONVERSIONS = 1 << 31
"""Added to the step for the random bits of a conversion, which are then not those of a step."""


@torch.no_grad()
def set_storage(optimizer: Any, parameter: Tensor, format: StorageFormat | str) -> None:
    """Store a parameter in another format from now on.

    To FP32 and from BF16 with stochastic rounding to BF16 with compensation nothing is lost: the new value is the one
    that the optimizer would have stepped from. Otherwise the value is split, or rounded stochastically. The moments
    stay as they are. A gradient that is there is kept, in FP32.

    Call it between steps, while no window of accumulation is open.

    Args:
        optimizer: a `StoredOptimizer` that trains the parameter.
        parameter: fp32 or bf16; its `data` is replaced.
        format: of the parameter from now on.

    Raises:
        ConfigError: another optimizer, a parameter of another one or of another dtype.
    """
    wanted = find_member("storage format", StorageFormat, format)
    group = _group_of(optimizer, parameter)
    old = optimizer.storage(parameter)
    if old is wanted:
        return
    value, compensation = _exact(optimizer, parameter), None
    if wanted is StorageFormat.BF16_KAHAN:
        value, compensation = split(value)
    optimizer.describe(parameter, wanted, compensation)
    if wanted is StorageFormat.BF16_SR:
        value = _rounded(value, optimizer.state[parameter], group["seed"])
    hold(parameter, value, wanted)


def _exact(optimizer: StoredOptimizer, parameter: Tensor) -> Tensor:
    """The value that the next step would start from, in FP32."""
    compensation = optimizer.state[parameter].get(COMPENSATION)
    return parameter.detach().float() if compensation is None else joined(parameter.detach(), compensation)


def _rounded(value: Tensor, state: dict[str, Any], seed: int) -> Tensor:
    step = step_number(state["step"]) if "step" in state else 0
    bits = random_bits([value.numel()], [state[STREAM]], [step + _CONVERSIONS], seed=seed, device=value.device)
    return round_by_bits(value, bits[0])


def _group_of(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    """The group of the parameter."""
    if not isinstance(optimizer, StoredOptimizer):
        passed = f"an optimizer {type(optimizer).__name__}, which would lose small updates of BF16 weights"
        raise ConfigError(explain(passed, "the optimizers of deepseek_mp.optim", "Train with one of these"))
    for group in optimizer.param_groups:
        if any(other is parameter for other in group["params"]):
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                passed = f"a parameter of {parameter.dtype}"
                raise ConfigError(explain(passed, "fp32 and bf16", "Leave it as it is"))
            return group
    passed = f"a parameter {list(parameter.shape)} that the optimizer does not train"
    raise ConfigError(explain(passed, "parameters of its groups", "Pass the parameter of the model itself"))
