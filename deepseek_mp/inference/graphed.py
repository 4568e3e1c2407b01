"""Calls recorded once for each kind of input and replayed after that: a device's own time without the host's.

A replay reads and writes the memory of its recording. So inputs are copied in, and outputs come out as copies: no
result is overwritten by a later call. Each is one kernel, which casts too. A model's state (buffers written in place,
as a cache of keys and values) is where it was, and a call changes it once, the first call included.
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
from deepseek_mp.programs.flat_call import FlatCall

MOST = 16
"""Recordings that are kept; the one that was not used for longest goes first."""
_VALUES = (type(None), bool, int, float, complex, str, bytes, slice, Enum, torch.dtype, torch.device, torch.layout)
"""What may stand between tensors: values that are what they are for good."""
_set_gradients = torch._C._set_grad_enabled  # noqa: SLF001 - what `no_grad` calls, which takes a microsecond more


@dataclass(frozen=True)
class _Recording:
    inputs: list[Tensor]
    replay: Callable[[], object]
    outputs: Any
    flat: FlatCall
    """Of calls that it serves."""


class Graphed:
    """`call(args, kwargs)`, recorded for each signature of its inputs, without gradients.

    Calls come one at a time, from one stream.

    Args:
        call: from the positional and the keyword arguments to the outputs.
        model: whose buffers, and tensors in attributes, are the state. What it holds may change in place, not be
            replaced.
        device: of all tensors.
        fixed: gives the buffers that no call writes to. They need not be saved while warming up, and kernels may read
            them before those in front have ended.
        into: what is done to each input on its way in: a recording's own are like the result, and a call's are copied
            into them.
        out: what is done to each output on its way out. A copy is made where that is nothing, as on the way in.
        recorder: how calls are recorded; the device's own if None.

    Raises:
        ConfigError: the device records nothing. When called: inputs or outputs that cannot be copied in and out, a
            call that writes to inputs to which nothing is done on their way in, or that replaces buffers. What the
            recording raises is raised.
    """

    def __init__(
        self,
        call: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        model: nn.Module,
        device: torch.device,
        *,
        fixed: Callable[[], Iterable[Tensor]] = tuple,
        into: Callable[[Any], Any] | None = None,
        out: Callable[[Any], Any] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if recorder is None and not records(device):
            passed = f"a form with CUDA graphs on {device}"
            raise ConfigError(explain(passed, "graphed=True on a device that records calls", "Leave it out"))
        self._call, self._model, self._device = call, model, device
        self._fixed, self._into, self._out = fixed, into, out
        self._recorder = recorder or DeviceRecorder(device)
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._last: _Recording | None = None

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def bytes(self) -> int:
        """Memory that belongs to recordings, beside weights, state and inputs."""
        return self._recorder.bytes

    def forget(self) -> None:
        """Drop all recordings: what they read is not what it was."""
        self._recordings.clear()
        self._last = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        gradients = torch.is_grad_enabled()
        try:
            _set_gradients(False)
            found = self._last
            given = None if found is None else found.flat.tensors(args, kwargs)
            if found is None or given is None:
                found, given = self._found(args, kwargs)
            for _ in map(Tensor.copy_, found.inputs, given):  # as many: what is alike has as many tensors
                pass
            found.replay()
            outputs = found.outputs
            return self._taken(outputs) if type(outputs) is Tensor else map_leaves(outputs, self._taken)
        finally:
            _set_gradients(gradients)

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Recording, list[Tensor]]:
        """The recording of such a call, the last one from now on, and what is to be copied into its inputs."""
        for known, found in reversed(self._recordings.items()):
            given = None if found is self._last else found.flat.tensors(args, kwargs)
            if given is not None:
                key = known
                break
        else:
            key, given = signature((args, kwargs), self._device), list(tensors((args, kwargs)))
        self._last = None  # it may be what goes
        if key not in self._recordings:
            while len(self._recordings) >= MOST:
                self._recordings.popitem(last=False)
            self._recordings[key] = self._recorded(args, kwargs)
        self._recordings.move_to_end(key)
        self._last = self._recordings[key]
        return self._last, given

    def _owned(self, leaf: Any) -> Any:
        return _changed(leaf, self._into)

    def _is_same(self, given: Tensor) -> bool:
        return self._into is None or self._into(given) is given

    def _taken(self, leaf: Any) -> Any:
        return _changed(leaf, self._out)

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recording:
        # In inference mode a later call outside of it could not be copied in; without that mode gradients are enabled.
        with torch.inference_mode(False), torch.no_grad():
            own_args, own_kwargs = map_leaves((args, kwargs), self._owned)
        inputs = list(tensors((own_args, own_kwargs)))
        # What is made on the way in is the recording's own in every form, and filled again before each replay.
        whole = [mine for mine, given in zip(inputs, tensors((args, kwargs)), strict=True) if self._is_same(given)]
        versions = _versions(whole)

        def run() -> Any:
            return self._call(own_args, own_kwargs)

        with kept_state(self._model, self._fixed()) as replaced, unwritten(self._fixed()):
            self._recorder.warm(run)
            replay, outputs = self._recorder.record(run)
        if replaced:
            passed = f"a forward that replaces its buffers {', '.join(replaced)}"
            raise ConfigError(explain(passed, "buffers written in place", "Write with copy_ or index_copy_"))
        if versions != _versions(whole):
            passed = "a forward that writes to its inputs, which a recorded call does to copies of them"
            raise ConfigError(explain(passed, "state in buffers of the model", "Keep it there, or leave graphs out"))
        map_leaves(outputs, _checked)
        return _Recording(inputs, replay, outputs, FlatCall(args, kwargs))


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


def _changed(leaf: Any, change: Callable[[Any], Any] | None) -> Any:
    """Never the leaf itself, if that is a tensor."""
    made = leaf if change is None else change(leaf)
    return leaf.clone() if made is leaf and isinstance(leaf, Tensor) else made


def _checked(leaf: Any) -> Any:
    if not isinstance(leaf, (Tensor, *_VALUES)):
        raise _unfit(f"outputs with a {type(leaf).__name__}")
    return leaf


def _unfit(what: str) -> ConfigError:
    allowed = "dense tensors on the model's device and plain values, in tuples, lists and mappings"
    return ConfigError(explain(f"{what} in a call to be recorded", allowed, "Pass these, or leave graphs out"))
