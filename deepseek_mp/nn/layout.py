"""The memory format of convolution weights: channels_last and back, in place and exactly undone.

Only strides change. The Parameter stays the same object with the same values, so optimizers, ties
and names do not notice. Convert before the optimizer makes its state: fused optimizers want state and
parameter in one layout.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deepseek_mp.nn.unit import CONVOLUTIONS, Unit, original_class
from deepseek_mp.precision.plan import MemoryFormat

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight whose memory format a plan decides: that of a 2-D or 3-D convolution."""
    if original_class(module) not in CONVOLUTIONS:
        return None
    weight = module._parameters.get("weight")  # noqa: SLF001 - module.weight may be computed by a hook
    if weight is None or weight.dim() not in _CHANNELS_LAST or 0 in weight.stride():
        return None
    return weight


def original_strides(module: nn.Module) -> tuple[int, ...] | None:
    """Strides to put back on revert: those of the first conversion, or of now."""
    if isinstance(module, Unit):
        return module.unit_precision.original_strides
    weight = layout_weight(module)
    return None if weight is None else weight.stride()


def is_channels_last(weight: Tensor) -> bool:
    """Whether the weight is channels_last and not also contiguous (as 1x1 kernels are)."""
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=_CHANNELS_LAST[weight.dim()])


def memory_format_of(model: nn.Module) -> MemoryFormat:
    """The memory format the model's convolutions have now: channels_last if any weight has it."""
    weights = (layout_weight(module) for module in model.modules())
    return "channels_last" if any(w is not None and is_channels_last(w) for w in weights) else "contiguous"


def laid_out(modules: Iterable[nn.Module], memory_format: MemoryFormat) -> list[tuple[nn.Parameter, Tensor]]:
    """Each weight that has another layout now, with its values in the one asked for."""
    weights = {id(weight): weight for weight in map(layout_weight, modules) if weight is not None}
    changes = []
    for weight in weights.values():
        channels_last = _canonical_strides(weight, _CHANNELS_LAST[weight.dim()])
        if memory_format == "channels_last" and weight.stride() != channels_last:
            changes.append((weight, weight.data.clone(memory_format=_CHANNELS_LAST[weight.dim()])))
        elif memory_format == "contiguous" and (is_channels_last(weight) or weight.stride() == channels_last):
            plain = _canonical_strides(weight, torch.contiguous_format)
            if weight.stride() != plain:
                changes.append((weight, weight.data.clone(memory_format=torch.contiguous_format)))
    return changes


def _canonical_strides(weight: Tensor, memory_format: torch.memory_format) -> tuple[int, ...]:
    """The strides a new tensor of that format has.

    A 1x1 kernel is contiguous and channels_last at once whatever the strides of its last dimensions,
    but only with these do cuDNN's gradients come in the layout of the weight and need no copy.
    """
    return torch.empty(weight.shape, device="meta", memory_format=memory_format).stride()


def restored(converted: Iterable[Unit]) -> list[tuple[nn.Parameter, Tensor]]:
    """Each weight that has other strides than before its conversion, with its values in those."""
    changes: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for unit in converted:
        weight, strides = layout_weight(unit), unit.unit_precision.original_strides
        if weight is None or strides is None or id(weight) in changes or weight.stride() == strides:
            continue
        if weight.dim() == len(strides):
            data = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
            changes[id(weight)] = weight, data.copy_(weight.data)
    return list(changes.values())
