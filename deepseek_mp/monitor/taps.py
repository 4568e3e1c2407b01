"""What sits in PyTorch's way on a sampled step: a dispatch mode that counts, and hooks on modules.

The mode is handed every operation that runs on the thread, and by autograd on the threads of its
backward, after autocast and autograd have done their part: it counts what runs, not what was asked
for. It looks at types and shapes only, so nothing waits for the device, and it keeps no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from deepseek_mp.monitor import internals
from deepseek_mp.monitor.classify import classify, computes, op_name
from deepseek_mp.monitor.counts import Phase
from deepseek_mp.monitor.places import OUTSIDE, Place, Places, is_narrow
from deepseek_mp.monitor.reasons import why_wide
from deepseek_mp.monitor.tally import Tally
from deepseek_mp.nn.again import is_computed_again
from deepseek_mp.ops.own_work import is_own_work
from deepseek_mp.precision import Reason

# Autograd's own, beside the dispatcher: it computes nothing and makes no node.
_DETACH = torch.ops.aten.detach.default


class Recorder:
    """Counts the operations of one sampled step.

    Counted are all operations inside the model's modules, those of a backward, and those between
    the forward and the first backward (the loss, as layer ''). What runs after the backward outside
    the model, such as unscaling and clipping gradients, is not the model's.
    """

    def __init__(self, tally: Tally, places: Places, decided: Mapping[str, Reason]) -> None:
        self.tally, self.places, self.decided = tally, places, decided
        self.counting = True
        self.backward_seen = False

    def phase(self, func: Any) -> Phase | None:
        """The phase of the operation about to run on this thread, None if it is not counted."""
        if self._in_backward():
            self.backward_seen = True
            return "backward"
        if op_name(func) == "ones_like" and internals.called_by_autograd():
            self.backward_seen = True
            self.places.new_backward()
            return "backward"
        if self.places.here.stack or not self.backward_seen:
            return "forward"
        return None

    def run(self, phase: Phase, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation and count it; one that raises is not counted."""
        out = func(*args, **kwargs)
        track = self.places.here
        frame = track.frame
        made_it = internals.backward_node() if frame is None and phase == "backward" else None
        ran = classify(func, args, kwargs, out)
        if frame is None and phase == "backward":
            place = OUTSIDE if made_it is None else self.places.of_node(made_it)
            reason = place.reason if ran.reads and ran.wide else None
        else:
            layer = frame.layer if frame else ""
            region_around = frame is not None and frame.in_region
            region_here = ran.wide and _region(ran.device, func, around=region_around)
            reason = why_wide(ran, layer, self.decided, region_here=region_here, region_around=region_around)
            place = Place(layer, reason)
        track.mark_operation(place)
        if computes(func):
            self.tally.add(place.layer, ran.op, ran.format, phase, reason)
        return out

    def _in_backward(self) -> bool:
        if internals.BACKWARD:
            return internals.backward_task() != internals.NO_TASK
        # Without the task's number: autograd evaluates its nodes with gradients off.
        return not torch.is_grad_enabled() and not self.places.here.stack


class DispatchTap(TorchDispatchMode):
    """The dispatch mode of one sampled step; passes everything on once the recorder has stopped."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compilation is none of the step's operations."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind is not torch.Tensor and kind is not nn.Parameter for kind in types):
            return NotImplemented  # the subclass takes the operation apart, and the parts come here
        counts = self.recorder.counting and func is not _DETACH and not is_own_work() and not is_computed_again()
        phase = self.recorder.phase(func) if counts else None
        if phase is None:
            return func(*args, **(kwargs or {}))
        return self.recorder.run(phase, func, args, kwargs or {})


def hook_modules(
    model: nn.Module, entered: Callable[[nn.Module, Any], None], left: Callable[[nn.Module, Any, Any], None]
) -> list[RemovableHandle]:
    """Call `entered` and `left` before and after each module's forward, until the handles are removed.

    The hooks are global ones, so no module gets a hook of its own: `nn.TransformerEncoderLayer`
    chooses another implementation when it has one. Only where parts of the model are wrapped by
    `torch.compile`, which warns of global hooks, each module is hooked.
    """
    modules = list(model.modules())
    if not any(type(module).__name__ == "OptimizedModule" for module in modules):
        return [
            global_hooks.register_module_forward_pre_hook(entered),
            global_hooks.register_module_forward_hook(left, always_call=True),
        ]
    before = [module.register_forward_pre_hook(entered) for module in modules]
    return before + [module.register_forward_hook(left, always_call=True) for module in modules]


def layer_names(model: nn.Module) -> tuple[dict[int, str], dict[int, str]]:
    """id of each module -> its name, id of each parameter -> name of the first module that has it.

    The part of a name that `torch.compile` adds is left out.
    """
    layers: dict[int, str] = {}
    parameters: dict[int, str] = {}
    for name, module in model.named_modules():
        layer = ".".join(part for part in name.split(".") if part != "_orig_mod")
        layers[id(module)] = layer
        for parameter in module.parameters(recurse=False):
            parameters.setdefault(id(parameter), layer)
    return layers, parameters


def _region(device: torch.device | None, func: Any, *, around: bool) -> bool:
    """Whether the operation was called with 16-bit autocast on for its device; if that is not known, as `around` it."""
    if not internals.REGIONS or not isinstance(func, OpOverload):
        return around
    if device is None:
        return False
    with internals.caller_state():
        return is_narrow(internals.autocast_type(device.type))
