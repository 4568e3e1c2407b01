"""What may be loaded into an offloaded optimizer: a state of AdamW that fits, looked at before anything changes.

PyTorch's fused AdamW trusts the sizes of its states: with smaller ones it would write beyond their memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.optim.offload import rule

MASTER = "master"
"""Key of a saved state: the FP32 weight of a parameter that is not FP32 on the device."""


def check_rule(groups: Sequence[Mapping[str, Any]], what: str) -> None:
    """`ConfigError` if groups want another rule than AdamW's without `amsgrad` and `maximize`.

    Args:
        groups: of an optimizer or of its saved state.
        what: they are, for the message.
    """
    for group in groups:
        wanted = [option for option in ("amsgrad", "maximize", "differentiable") if group.get(option)]
        if wanted:
            passed = f"{what} with {' and '.join(wanted)}"
            raise ConfigError(explain(passed, "AdamW without them", "Train on with torch.optim.AdamW"))
        if group.get("weight_decay") and not group.get("decoupled_weight_decay", True):
            passed = f"{what} of Adam, whose weight decay is part of the gradient"
            change = "Train on with torch.optim.Adam, or set its weight_decay to 0 before saving"
            raise ConfigError(explain(passed, "AdamW", change))


def check_loaded(state_dict: Mapping[str, Any], masters: Sequence[Tensor]) -> None:
    """`ConfigError` unless a state is one of AdamW over these masters; the number of parameters is not looked at.

    Args:
        state_dict: as `Optimizer.state_dict` gives it.
        masters: in the order of the groups.
    """
    check_rule(state_dict["param_groups"], "a state")
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, master in zip(numbers, masters, strict=False):
        check_entries(state_dict["state"].get(number, {}), master)


def check_entries(entries: Mapping[str, Any], master: Tensor) -> None:
    """`ConfigError` unless these are the state of a master, or empty."""
    if not entries or set(entries) == {MASTER}:
        names: Sequence[str] = ()
    else:
        names = ("step", *rule.MOMENTS)
    missing = [name for name in names if name not in entries]
    if missing:
        passed = f"a state of a parameter {list(master.shape)} without {' and '.join(missing)}"
        change = "Load the state of an AdamW or of an OffloadedOptimizer"
        raise ConfigError(explain(passed, ", ".join(("step", *rule.MOMENTS)), change))
    for name in (*rule.MOMENTS, MASTER):
        if name in entries and torch.as_tensor(entries[name]).shape != master.shape:
            passed = f"a state whose {name} is {list(torch.as_tensor(entries[name]).shape)}"
            change = "Load the state of the same model, its parameters in the same order"
            raise ConfigError(explain(passed, f"{list(master.shape)}, as the parameter is", change))
