"""Calls recorded once for each kind of input and replayed after that: a device's own time without the host's.

A replay reads and writes the memory of its recording. So inputs are copied in, and outputs come out as copies: no
result is overwritten by a later call. A model's state (buffers written in place, as a cache of keys and values) is
where it was, and a call changes it once, the first call included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.inference.recorder import DeviceRecorder, Recorder, records
from deepseek_mp.nn.nested import map_leaves, tensors
from deepseek_mp.ops.early_launch import unwritten

MOST = 16
"""Recordings that are kept; the one that was not used for longest goes first."""
_VALUES = (type(None), bool, int, float, complex, str, bytes, slice, Enum, torch.dtype, torch.device, torch.layout)
"""What may stand between tensors: values that are what they are for good."""


@dataclass(frozen=True)
class _Recording:
    inputs: list[Tensor]
    replay: Callable[[], object]
    outputs: Any


class Graphed:
    """`call(args, kwargs)`, recorded for each signature of its inputs. Calls come one at a time, from one stream.

    Args:
        call: from the positional and the keyword arguments to the outputs.
        model: whose buffers, and tensors in attributes, are the state. What it holds may change in place, not be
            replaced.
        device: of all tensors.
        fixed: gives the buffers that no call writes to. They need not be saved while warming up, and kernels may read
            them before those in front have ended.
        out: what is done to each output on its way out; a copy is made where that is nothing.
        recorder: how calls are recorded; the device's own if None.

    Raises:
        ConfigError: the device records nothing. When called: inputs or outputs that cannot be copied in and out, a
            call that writes to its inputs or that replaces buffers. What the recording raises is raised.
    """

    def __init__(
        self,
        call: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        model: nn.Module,
        device: torch.device,
        *,
        fixed: Callable[[], Iterable[Tensor]] = tuple,
        out: Callable[[Any], Any] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if recorder is None and not records(device):
            passed = f"a form with CUDA graphs on {device}"
            raise ConfigError(explain(passed, "graphed=True on a device that records calls", "Leave it out"))
        self._call, self._model, self._device = call, model, device
        self._fixed, self._out = fixed, out
        self._recorder = recorder or DeviceRecorder(device)
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def bytes(self) -> int:
        """Memory that belongs to recordings, beside weights, state and inputs."""
        return self._recorder.bytes

    def forget(self) -> None:
        """Drop all recordings: what they read is not what it was."""
        self._recordings.clear()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = signature((args, kwargs), self._device)
        found = self._recordings.get(key)
        if found is None:
            while len(self._recordings) >= MOST:
                self._recordings.popitem(last=False)
            found = self._recordings[key] = self._recorded(args, kwargs)
        self._recordings.move_to_end(key)
        for mine, given in zip(found.inputs, tensors((args, kwargs)), strict=True):
            mine.copy_(given)
        found.replay()
        return map_leaves(found.outputs, self._taken)

    def _taken(self, leaf: Any) -> Any:
        made = leaf if self._out is None else self._out(leaf)
        return _copied(made) if made is leaf else made

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recording:
        with torch.inference_mode(False):  # or a later call outside of that mode could not be copied in
            own_args, own_kwargs = map_leaves((args, kwargs), _copied)
        inputs = list(tensors((own_args, own_kwargs)))
        versions = _versions(inputs)

        def run() -> Any:
            return self._call(own_args, own_kwargs)

        with kept_state(self._model, self._fixed()) as replaced, unwritten(self._fixed()):
            self._recorder.warm(run)
            replay, outputs = self._recorder.record(run)
        if replaced:
            passed = f"a forward that replaces its buffers {', '.join(replaced)}"
            raise ConfigError(explain(passed, "buffers written in place", "Write with copy_ or index_copy_"))
        if versions != _versions(inputs):
            passed = "a forward that writes to its inputs, which a recorded call does to copies of them"
            raise ConfigError(explain(passed, "state in buffers of the model", "Keep it there, or leave graphs out"))
        map_leaves(outputs, _checked)
        return _Recording(inputs, replay, outputs)


def signature(tree: Any, device: torch.device) -> Hashable:
    """What two calls have in common that one recording serves: structure, shapes, dtypes, strides and values.

    Raises:
        ConfigError: something that is neither a dense tensor on the device nor a plain value.
    """
    if isinstance(tree, Tensor):
        if (
            type(tree) not in (Tensor, nn.Parameter)
            or tree.layout is not torch.strided
            or tree.device.type != device.type
        ):
            raise _unfit(f"a {type(tree).__name__} on {tree.device}")
        return Tensor, tree.shape, tree.stride(), tree.dtype
    if isinstance(tree, Mapping) and not hasattr(tree, "to"):
        return type(tree), tuple((key, signature(value, device)) for key, value in tree.items())
    if isinstance(tree, tuple | list) and not hasattr(tree, "to"):
        return type(tree), tuple(signature(item, device) for item in tree)
    if not isinstance(tree, _VALUES):
        raise _unfit(f"a {type(tree).__name__}")
    return type(tree), repr(tree)  # 1 and True, 0.0 and -0.0 are equal, and slices have no hash in old Pythons


@contextmanager
def kept_state(model: nn.Module, fixed: Iterable[Tensor] = ()) -> Iterator[list[str]]:
    """What happens to the model's buffers inside, and to tensors in its attributes, is undone at the end.

    Args:
        fixed: buffers that nothing writes to, of which no copy is needed.

    Yields:
        A list, at the end that of the names of buffers that were replaced instead of written to.
    """
    spared = {id(tensor) for tensor in fixed}
    places = [(owner, name, tensor) for owner in model.modules() for name, tensor in owner.named_buffers(recurse=False)]
    others = [tensor for owner in model.modules() for tensor in vars(owner).values() if isinstance(tensor, Tensor)]
    state = {id(tensor): tensor for tensor in (*(tensor for _, _, tensor in places), *others)}
    kept = [(tensor, tensor.clone()) for key, tensor in state.items() if key not in spared and _is_writable(tensor)]
    replaced: list[str] = []
    try:
        yield replaced
    finally:
        for owner, name, tensor in places:
            if getattr(owner, name) is not tensor:
                replaced.append(name)
                setattr(owner, name, tensor)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def _is_writable(tensor: Tensor) -> bool:
    """Whether code can write to it in place at all: it cannot where elements share their memory."""
    if tensor.layout is not torch.strided:
        return False
    return all(stride or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _versions(inputs: Iterable[Tensor]) -> list[int]:
    """How often each was written to."""
    return [tensor._version for tensor in inputs]  # noqa: SLF001 - it has no public name


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _checked(leaf: Any) -> Any:
    if not isinstance(leaf, (Tensor, *_VALUES)):
        raise _unfit(f"outputs with a {type(leaf).__name__}")
    return leaf


def _unfit(what: str) -> ConfigError:
    allowed = "dense tensors on the model's device and plain values, in tuples, lists and mappings"
    return ConfigError(explain(f"{what} in a call to be recorded", allowed, "Pass these, or leave graphs out"))
