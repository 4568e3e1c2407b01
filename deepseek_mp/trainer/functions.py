"""Says which custom `autograd.Function` met operands of two formats.

Autocast is in force during a Function's forward and not during its backward, so a Function that was
written for FP32 may find a BF16 gradient beside an FP32 weight there. PyTorch's message names the
two formats and not the Function; its frame is in the traceback, which is where this looks.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch.autograd.function import BackwardCFunction

from deepseek_mp.errors import ConfigError, explain

WORDS = ("dtype", "scalar type")
"""One of them is in every message of PyTorch about operands of two formats."""


def mixed_formats(error: RuntimeError) -> ConfigError | None:
    """The error that names the Function, if `error` is about mixed formats and came from inside one."""
    if not any(word in str(error) for word in WORDS):
        return None
    context = _context(error.__traceback__)
    if context is None or hasattr(context, "_fwd_used_autocast"):  # set by custom_fwd
        return None
    function = getattr(type(context), "_forward_cls", type(context))
    return ConfigError(
        explain(
            f"autograd.Function {function.__qualname__} computed with operands of different formats ({error})",
            "in a 16-bit region, Functions that say how they are to be called in one",
            "Decorate its forward with torch.amp.custom_fwd(device_type=..., cast_inputs=torch.float32) and its "
            "backward with torch.amp.custom_bwd(device_type=...), or cast inside it",
        )
    )


def _context(trace: TracebackType | None) -> Any:
    """The first argument of the innermost frame that is a forward or backward of a Function."""
    found = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_argcount or code.co_flags & 0x04:
            first = trace.tb_frame.f_locals.get(code.co_varnames[0])
            found = first if isinstance(first, BackwardCFunction) else found
        trace = trace.tb_next
    return found
