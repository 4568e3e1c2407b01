"""What a measured cost depends on, as plain values: the machine, the model, and what it is given."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.backends import Capabilities
from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.nn.unit import original_class
from deepseek_mp.version import __version__

METHOD = 2
"""Raised when the way of measuring changes, so that older entries are not found any more."""


def environment(device: torch.device, capabilities: Capabilities) -> dict[str, Any]:
    """The device and the versions of everything that computes on it."""
    return {
        "method": METHOD,
        "package": __version__,
        "backend": capabilities.backend,
        "device": capabilities.device_name,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "build": _digest(torch.__config__.show()),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def model_digest(model: nn.Module) -> str:
    """A hash of the model's structure: every module's class and settings, every parameter's shape."""
    lines = [
        f"{name} {original_class(module).__module__}.{original_class(module).__qualname__}"
        f"({module.extra_repr()}) {module.training}"
        for name, module in model.named_modules()
    ]
    lines += [
        f"{name} {list(parameter.shape)} {parameter.dtype} {parameter.requires_grad}"
        for name, parameter in model.named_parameters()
    ]
    return _digest("\n".join(lines))


class _InputsSeen(BaseException):
    """Ends a forward before it began. No `Exception`, so that no handler in between keeps it."""


def first_inputs(model: nn.Module, run: Callable[[], object]) -> str:
    """Shapes and types of what `run()` first gives to the model.

    The forward is cut off before it starts. If `run` never calls the model itself, one whole forward
    is made and the answer is empty.
    """
    seen: list[str] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(str(map_leaves((args, kwargs), _shape)))
        raise _InputsSeen

    handle = model.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    except _InputsSeen:
        pass
    finally:
        handle.remove()
    return seen[0] if seen else ""


def _shape(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return repr(leaf) if leaf is None or isinstance(leaf, bool | int | str) else type(leaf).__name__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
