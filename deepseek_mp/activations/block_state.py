"""What a block's forward reads and writes beside its arguments, kept so that it can run again as it ran before.

Random generators, numbers and flags among the attributes of its modules, and buffers. Afterwards all of it is as if the
block had run once. A BatchNorm in training mode does not read its running statistics: it is given others to write to.
Values of other buffers are copied before a forward if one was seen to write them. PyTorch counts what is written to a
tensor, but not what `F.batch_norm` writes, so the first look compares values (`Writes.all_`).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_mp.activations.norm_relu import same_bits
from deepseek_mp.costs.restore import random_states, set_random_states
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn.again import computed_again
from deepseek_mp.nn.unit import original_class

Place = tuple[nn.Module, str]
"""A module and the name of one of its buffers."""
_WRITE_ONLY = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm})
_PLAIN = (bool, int, float, str, type(None))


class Writes:
    """The buffers that forwards were seen to write. With `all_`, a forward's are copied before, to see which."""

    def __init__(self, *, all_: bool = False) -> None:
        self.places: set[Place] = set()
        self.all_ = all_

    def copied(self, place: Place) -> bool:
        """Whether the buffer's value is copied before a forward."""
        return self.all_ or place in self.places


class _Buffer(NamedTuple):
    """A buffer as it was before the forward."""

    tensor: Tensor
    version: int
    read: bool
    """Whether the forward may read it."""
    value: Tensor | None
    """A copy, where there is to be one."""

    def is_written(self, now: Tensor | None) -> bool:
        """Whether the buffer, which now is this tensor, was written to since, as far as that can be told."""
        if now is not self.tensor or version_of(now) != self.version:
            return True
        return self.value is not None and not same_bits(self.value, now)

    def before(self) -> Tensor | None:
        """The value before the forward, as a tensor of its own; None if it is not known any more."""
        if self.value is not None:
            return self.value.clone()
        if self.read and version_of(self.tensor) != self.version:
            return None
        return self.tensor.detach().clone()


class BlockState:
    """The state of a block before a forward, taken when this is made; `forward_ended` must follow the forward."""

    def __init__(self, block: nn.Module, device: torch.device, writes: Writes) -> None:
        self.device, self._writes = device, writes
        self._random = random_states(device)
        self.modules = list(block.modules())
        self._numbers = [_numbers(module) for module in self.modules]
        self._buffers = [self._kept(module) for module in self.modules]

    def _kept(self, module: nn.Module) -> dict[str, _Buffer]:
        read = not (original_class(module) in _WRITE_ONLY and module.training)
        kept = {}
        for name, buffer in module._buffers.items():  # noqa: SLF001 - named_buffers() is 20x slower
            if buffer is not None:
                copied = read and self._writes.copied((module, name))
                value = buffer.detach().clone() if copied else None
                kept[name] = _Buffer(buffer, version_of(buffer), read, value)
        return kept

    def forward_ended(self) -> None:
        """Learn what the forward has written."""
        for module, buffers in zip(self.modules, self._buffers, strict=True):
            for name, kept in buffers.items():
                known = not kept.read or (module, name) in self._writes.places
                if not known and kept.is_written(module._buffers.get(name)):  # noqa: SLF001
                    self._writes.places.add((module, name))

    def put_in_place(self) -> None:
        """Make everything what it was before the forward, with copies of the buffers that it writes.

        Raises:
            ConfigError: a buffer's value is not known any more.
        """
        set_random_states(self._random, self.device)
        for module, numbers, buffers in zip(self.modules, self._numbers, self._buffers, strict=True):
            vars(module).update(numbers)
            for name, kept in buffers.items():
                now = module._buffers.get(name)  # noqa: SLF001
                changed = now is not kept.tensor or version_of(kept.tensor) != kept.version
                if changed or not kept.read or kept.value is not None:
                    if (value := kept.before()) is None:
                        raise _first_written(module, name)
                    module._buffers[name] = value  # noqa: SLF001


class Again:
    """Inside, a block's state is that of before its forward; afterwards it is what it was outside.

    It may be entered several times, one after the other: a graph that is kept is gone through twice.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state
        self._mark = computed_again()
        self._outside: list[tuple[nn.Module, dict[str, Any], dict[str, Tensor | None]]] = []
        self._random: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        state = self._state
        self._mark = computed_again()
        self._mark.__enter__()
        self._random = random_states(state.device)
        self._outside = [(module, dict(vars(module)), dict(module._buffers)) for module in state.modules]  # noqa: SLF001
        try:
            state.put_in_place()
        except BaseException:
            self._put_back()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for module, attributes, buffers in self._outside:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()  # noqa: SLF001
            module._buffers.update(buffers)  # noqa: SLF001
        self._outside = []
        set_random_states(self._random, self._state.device)
        self._mark.__exit__(None, None, None)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for one made in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - there is no public one


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


def _first_written(module: nn.Module, name: str) -> ConfigError:
    passed = f"a block that wrote the buffer {name!r} of a {type(module).__name__} for the first time"
    allowed = "blocks whose buffers are written in their first forward, or never"
    return ConfigError(explain(passed, allowed, "Give the batch again: from now on the buffer is copied before"))
