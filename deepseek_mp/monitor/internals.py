"""The functions of PyTorch without a public name that the monitor uses, checked in this one place.

None is needed to train. Where a release lacks some, the monitor says less and says so: without
`BACKWARD` it cannot tell the layer of an operation in the backward, without `REGIONS` it knows the
autocast state only as it was at the entry of a module, without `OPEN_ENDED` it samples inside
`sample()` only, and without `FUNC` a model must not be called under `torch.func` while it is sampled.
"""

# ruff: noqa: SLF001
from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _python_dispatch as dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode


def _has(owner: object, *names: str) -> bool:
    return all(hasattr(owner, name) for name in names)


BACKWARD = _has(torch._C, "_current_graph_task_id", "_current_autograd_node") and _has(
    torch.autograd, "_get_sequence_nr"
)
REGIONS = _has(torch._C, "_RestorePythonTLSSnapshot")
OPEN_ENDED = _has(dispatch_stack, "_push_mode", "_pop_mode", "_get_current_dispatch_mode_stack")
FUNC = _has(torch._C, "_functorch") and _has(torch._C._functorch, "peek_interpreter_stack")
OP_LISTS = _has(torch._C, "_dispatch_get_all_op_names", "_dispatch_has_kernel_for_dispatch_key")

NO_TASK = -1


def backward_task() -> int:
    """Number of the backward that this thread is running, `NO_TASK` if none."""
    if BACKWARD:
        return torch._C._current_graph_task_id()
    return NO_TASK


def backward_node() -> Any:
    """The autograd node that this thread is evaluating, or None."""
    return torch._C._current_autograd_node() if BACKWARD else None


def next_node() -> int:
    """The number that the next autograd node made on this thread will get; they count up."""
    return int(torch.autograd._get_sequence_nr()) if BACKWARD else 0  # type: ignore[attr-defined]


def node_number(node: Any) -> int:
    """The number of an autograd node, counted on the thread that made it."""
    return int(node._sequence_nr())


def autocast_type(device_type: str) -> torch.dtype | None:
    """What autocast casts to here, None where it is off. Inside a dispatch mode use `caller_state`."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def caller_state() -> AbstractContextManager[object]:
    """Context for a dispatch handler: the thread's dispatch state as the Python caller of the operation had it.

    Inside a handler all keys above the Python key are masked, autocast's among them.
    """
    return torch._C._RestorePythonTLSSnapshot() if REGIONS else nullcontext()  # type: ignore[attr-defined]


@cache
def autocast_kernels(device_type: str) -> frozenset[str]:
    """Names of the aten operations that autocast handles on this device type, without overloads."""
    suffix = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}.get(device_type, "PrivateUse1")
    if not OP_LISTS:
        return frozenset()
    found = (
        name
        for name in torch._C._dispatch_get_all_op_names()
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, f"Autocast{suffix}")
    )
    return frozenset(name.removeprefix("aten::").split(".")[0] for name in found)


def push_lowest(mode: TorchDispatchMode) -> None:
    """Put a mode under all others on this thread's stack.

    There it sees what the other modes let run, and a `with` statement that ends while it is on the
    stack removes its own mode, not this one.
    """
    above = [dispatch_stack._pop_mode() for _ in dispatch_stack._get_current_dispatch_mode_stack()]
    dispatch_stack._push_mode(mode)
    for other in reversed(above):
        dispatch_stack._push_mode(other)


def remove_mode(mode: TorchDispatchMode) -> None:
    """Take a mode off this thread's stack, wherever it stands; nothing happens if it is not there."""
    if not on_stack(mode):
        return
    above: list[Any] = []
    while (top := dispatch_stack._pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        dispatch_stack._push_mode(other)


def on_stack(mode: TorchDispatchMode) -> bool:
    """Whether the mode is on this thread's stack."""
    return any(other is mode for other in dispatch_stack._get_current_dispatch_mode_stack())


def only_traced() -> bool:
    """Whether the model's code is being traced or faked on this thread, so that nothing really runs."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    stack = dispatch_stack._get_current_dispatch_mode_stack() if OPEN_ENDED else []
    return any(mode.is_infra_mode() for mode in stack)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work on this thread: tensors are not what they seem then."""
    return FUNC and torch._C._functorch.peek_interpreter_stack() is not None


def is_captured() -> bool:
    """Whether the accelerator's work is being recorded as a graph, to be replayed without Python."""
    # A build for an accelerator that no driver is there for raises when it is asked.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return False
    captures = getattr(torch.get_device_module(accelerator), "is_current_stream_capturing", None)
    return captures is not None and bool(captures())


def is_temporary() -> bool:
    """Whether a change of the dispatch stack made here would be undone, or half undone.

    A backward, and a call of a compiled function, put the thread's dispatch state back when they end.
    """
    if backward_task() != NO_TASK or only_traced():
        return True
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and _calling_frame(str(compiler.__file__), "compile_wrapper", depth=1000) is not None


def is_compiled(module: nn.Module) -> bool:
    """Whether calling this module runs compiled code, by `torch.compile(module)` or `module.compile()`."""
    return type(module).__name__ == "OptimizedModule" or compiled_call(module) is not None


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What `module.compile()` made `module(...)` call, or None."""
    return module.__dict__.get("_compiled_call_impl")


def set_compiled_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Let `module(...)` call this instead."""
    module.__dict__["_compiled_call_impl"] = call


def eager_stance() -> AbstractContextManager[object]:
    """From now until the context's exit, compiled functions run as the Python they were compiled from.

    Does nothing where the compiler was never loaded: nothing can be compiled then.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def functional_caller() -> str | None:
    """Name of the function of `torch.nn.functional` that called the operation being dispatched, or None."""
    frame = _calling_frame(functional.__file__)
    return None if frame is None else frame.f_code.co_name


def called_by_autograd() -> bool:
    """Whether `backward` or `grad` itself called the operation being dispatched, as it does for the first gradient."""
    return _calling_frame(torch.autograd.__file__) is not None


def _calling_frame(file: str, function: str | None = None, *, depth: int = 24) -> FrameType | None:
    """The innermost of the `depth` frames above that runs code of the file, and of that function if one is given."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(depth):
        if frame is None:
            return None
        code = frame.f_code
        if code.co_filename == file and function in (None, code.co_name):
            return frame
        frame = frame.f_back
    return None
