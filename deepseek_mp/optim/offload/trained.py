"""What an offloaded optimizer is made for: groups, their parameters and the model, all checked before it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.optim.offload.host_chunk import Member

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def as_groups(params: Any) -> list[dict[str, Any]]:
    """The groups of an optimizer, each with a list of its own; one if there are parameters only."""
    listed = list(params)
    if not listed:
        raise ConfigError(explain("no parameters", "one or more", "Pass model.parameters()"))
    groups = listed if isinstance(listed[0], dict) else [{"params": listed}]
    return [
        {**group, "params": [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])}
        for group in groups
    ]


def check_model(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """`ConfigError` unless the model's hooks can wait for all of these parameters."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        passed = "a DistributedDataParallel model, whose gradients are averaged after ours have been sent"
        change = "Pass the inner model, and average the gradients of the masters before each step"
        raise ConfigError(explain(passed, "a model that trains on its own gradients", change))
    own = {id(parameter) for parameter in model.parameters()}
    if foreign := sum(id(parameter) not in own for parameter in parameters):
        passed = f"model= without {foreign} of the {len(parameters)} parameters, whose weights it would not wait for"
        raise ConfigError(explain(passed, "the model that has all of them", "Pass the whole model, or leave it out"))


def members_of(groups: Sequence[Mapping[str, Any]]) -> list[Member]:
    """The parameters of all groups, in their order."""
    return [Member(parameter=p, group=index) for index, group in enumerate(groups) for p in group["params"]]


def check_parameters(parameters: Sequence[Tensor]) -> torch.device:
    """The one device of the parameters; `ConfigError` for any that cannot be offloaded."""
    if not all(isinstance(parameter, nn.Parameter) for parameter in parameters):
        change = "Pass model.parameters(), without names"
        raise ConfigError(explain("something that is no parameter", "parameters, or groups of them", change))
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        change = "Leave the second one out; model.parameters() has each once"
        raise ConfigError(explain("a parameter that is there twice", "each once", change))
    for parameter in parameters:
        if parameter.dtype not in _DTYPES:
            passed = f"a parameter {list(parameter.shape)} of {parameter.dtype}"
            raise ConfigError(
                explain(passed, ", ".join(map(str, _DTYPES)), "Convert the model, or use another optimizer")
            )
    if not parameters:
        raise ConfigError(explain("groups without parameters", "one parameter or more", "Pass model.parameters()"))
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) != 1:
        passed = f"parameters on {' and '.join(devices)}"
        raise ConfigError(explain(passed, "one device", "Make one optimizer for each device"))
    return parameters[0].device
