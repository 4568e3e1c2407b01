"""The state of every random generator a training step draws from, as tensors and JSON values.

Covers Python's `random`, numpy's global generator if numpy is imported, PyTorch on the CPU, and the
generator of the device that trains. Restored, each gives the same numbers from there on, bit by bit.
"""

from __future__ import annotations

import inspect
import logging
import random
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import CheckpointError, explain

logger = logging.getLogger(__name__)


def get_rng(device: torch.device) -> list[Tensor]:
    """States of PyTorch's generators that a forward may draw from: the CPU's and the device's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        get_state = torch.get_device_module(device).get_rng_state
        states.append(get_state(**_device_argument(get_state, device)))
    return states


def set_rng(states: list[Tensor], device: torch.device) -> None:
    """Put back what `get_rng` returned."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        set_state = torch.get_device_module(device).set_rng_state
        set_state(states[1], **_device_argument(set_state, device))


def rng_state(device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The generators' states: uint8, int64 and uint32 tensors on the CPU, and JSON values.

    `device` is the one that trains; no other accelerator is touched.
    """
    device = torch.device(device)
    version, words, gauss_next = random.getstate()
    states = get_rng(device)
    tensors = {"python": torch.tensor(words, dtype=torch.int64), "torch": states[0]}
    values: dict[str, Any] = {"python": {"version": version, "gauss_next": gauss_next}}
    if (numpy := sys.modules.get("numpy")) is not None:
        values["numpy"] = _without_arrays(numpy.random.get_state(legacy=False), "numpy", tensors)
    if device.type != "cpu":
        tensors["device"] = states[1].cpu()
        values["device"] = device.type
    return tensors, values


def set_rng_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
    """Put all generators into the states that `rng_state` returned.

    A state of another kind of device than `device`, or of a numpy that is not here, is left out with
    a warning: the run goes on, with other random numbers. `CheckpointError` if a state is not valid;
    the generators are as they were then.
    """
    device = torch.device(device)
    before = rng_state(device)
    try:
        _set(tensors, values, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        _set(*before, device)
        raise CheckpointError(
            explain(
                f"random generator state cannot be restored ({type(error).__name__}: {error})",
                "what rng_state returned",
                "Resume from another checkpoint",
            )
        ) from error


def _set(tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device) -> None:
    python = values["python"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss_next"]))
    torch.set_rng_state(tensors["torch"].cpu())
    if "numpy" in values:
        _set_numpy(values["numpy"], tensors)
    saved_on = values.get("device", "cpu")
    if saved_on != device.type:
        logger.warning("generator state of a %s device cannot be used on %s", saved_on, device.type)
    elif device.type != "cpu":
        set_state = torch.get_device_module(device).set_rng_state
        set_state(tensors["device"].cpu(), **_device_argument(set_state, device))


def _device_argument(call: Callable[..., Any], device: torch.device) -> dict[str, torch.device]:
    """The device as a keyword, for those device modules whose calls take one."""
    return {"device": device} if _takes_device(call) else {}


@cache
def _takes_device(call: Callable[..., Any]) -> bool:
    return "device" in inspect.signature(call).parameters


def _set_numpy(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        logger.warning("numpy is not imported: its generator's state is not used")
        return
    numpy.random.set_state(_with_arrays(state, "numpy", tensors))


def _without_arrays(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each array in it moved to `tensors` under its path, and None in its place."""
    if isinstance(value, dict):
        return {key: _without_arrays(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if hasattr(value, "__array_interface__") and value.shape:
        tensors[path] = torch.from_numpy(value)
        return None
    return value.item() if hasattr(value, "item") else value


def _with_arrays(value: Any, path: str, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `_without_arrays`."""
    if path in tensors:
        return tensors[path].cpu().numpy()
    if isinstance(value, Mapping):
        return {key: _with_arrays(item, f"{path}.{key}", tensors) for key, item in value.items()}
    return value
