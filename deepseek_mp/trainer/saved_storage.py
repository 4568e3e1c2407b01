"""How the weights of a checkpoint are stored: found in it, and taken over before its values are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.nn.parameter_kinds import parameter_kinds
from deepseek_mp.optim import StoredOptimizer, set_storage
from deepseek_mp.optim.stored import STORAGE
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.precision.storage import StorageFormat

log = logging.getLogger("deepseek_mp")

Formats = Mapping[Tensor, StorageFormat]


def saved_formats(names: Mapping[int, str], optimizer: Any, tensors: Mapping[str, Tensor], values: Any) -> Formats:
    """The storage of each parameter whose state a checkpoint has; of `StoredOptimizer` only.

    Args:
        names: of the parameters, by id.
        optimizer: of the run at hand.
        tensors: of the optimizer in the checkpoint, as 'parameter/key'.
        values: what it saved besides.
    """
    if not isinstance(optimizer, StoredOptimizer):
        return {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        parameter: StorageFormat(values["values"].get(f"{names[id(parameter)]}/{STORAGE}", StorageFormat.FP32))
        for parameter in parameters
        if f"{names[id(parameter)]}/step" in tensors and parameter.dtype in (torch.float32, torch.bfloat16)
    }


def as_saved(here: Mapping[str, Tensor], parameters: Mapping[str, Tensor], formats: Formats) -> dict[str, Tensor]:
    """The tensors here, those in another storage than the saved ones as placeholders of the saved dtype."""
    expected = dict(here)
    for name, parameter in parameters.items():
        if name in here and parameter in formats:
            dtype = torch.bfloat16 if formats[parameter].is_bf16 else torch.float32
            expected[name] = torch.empty_like(parameter, dtype=dtype, device="meta")
    return expected


def adopt(optimizer: Any, formats: Formats) -> None:
    """Give the parameters the dtypes of their saved storages; the values are loaded after it."""
    for parameter, format in formats.items():
        optimizer.adopt(parameter, format)


def widen(model: nn.Module, optimizer: Any, plan: PrecisionPlan) -> None:
    """Store in FP32 what layers read that do not run in BF16, which loses nothing: the plan may be another one now."""
    if isinstance(optimizer, StoredOptimizer):
        for parameter, about in parameter_kinds(model, plan).items():
            if about.read_as != "bf16" and optimizer.storage(parameter).is_bf16:
                set_storage(optimizer, parameter, StorageFormat.FP32)
                log.warning("%s is stored in fp32 from now on, since its layer runs in %s", about.name, about.read_as)
