"""Measures a model's blocks in one forward: their time, what their backwards need, and whether they can run again.

What the forward saves is counted and dropped at once, so that no more memory is needed than without gradients. Each
block runs some more times: once to be compared, since a block that gives other numbers when it runs again must not be
computed again, and then to be timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from deepseek_mp.activations.block_state import Again, BlockState, Writes, version_of
from deepseek_mp.activations.checkpointed import Forward, apart, replaced_forwards
from deepseek_mp.activations.choice import BlockCost, ForwardCost
from deepseek_mp.activations.norm_relu import same_bits
from deepseek_mp.activations.origin import Held, is_plain
from deepseek_mp.costs.restore import preserved
from deepseek_mp.costs.timing import is_out_of_memory, time_call
from deepseek_mp.nn.again import computed_again
from deepseek_mp.nn.delayed import maxima_kept
from deepseek_mp.nn.lazy import Lazy
from deepseek_mp.nn.nested import tensors

_RUNS = 3
"""Timed runs of a block."""


def measure_blocks(
    model: nn.Module, blocks: Mapping[str, nn.Module], run: Callable[[], object], device: torch.device, writes: Writes
) -> ForwardCost:
    """What each block costs in the forward `run()`, in training mode and in the caller's region.

    The model is afterwards as before, random generators too. A forward that differentiates by itself fails on what is
    dropped; it runs again, with everything kept, and what it then raises propagates.

    Args:
        blocks: by name; none within another.
        writes: gets the buffers that the blocks write.
    """
    with computed_again():
        try:
            return _measured(model, blocks, run, device, writes, drop=True)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return _measured(model, blocks, run, device, writes, drop=False)


def _measured(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    run: Callable[[], object],
    device: torch.device,
    writes: Writes,
    *,
    drop: bool,
) -> ForwardCost:
    meter = _Meter(model, blocks, device, drop=drop)
    with (
        preserved(model, device),
        maxima_kept(model),
        torch.enable_grad(),
        saved_tensors_hooks(meter.pack, meter.unpack),
        replaced_forwards(blocks.values(), meter.around),
    ):
        run()
    torch.clear_autocast_cache()
    writes.places |= meter.writes.places
    return meter.cost()


@dataclass
class _Found:
    """What is known of a block."""

    ms: float = 0.0
    saved: set[int] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)
    given: list[tuple[Tensor, int]] = field(default_factory=list)
    """Inputs of its calls, with their versions."""
    obstacle: str = ""


class _Meter:
    """Sees what is saved, and where."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], device: torch.device, *, drop: bool) -> None:
        self.writes = Writes(all_=True)
        self._held, self._device, self._drop = Held(model), device, drop
        self._names = {block: name for name, block in blocks.items()}
        self._found = {name: _Found() for name in blocks}
        self._numbers: dict[StorageWeakRef, int] = {}
        self._sizes: list[int] = []
        self._elsewhere: set[int] = set()
        self._into: set[int] | None = self._elsewhere
        """Where what is saved now is noted; None: nowhere."""

    def pack(self, x: Tensor) -> Tensor | None:
        if self._into is not None and (number := self._number(x)) is not None:
            self._into.add(number)
        return None if self._drop else x

    def unpack(self, packed: Tensor | None) -> Tensor:
        if packed is None:
            raise RuntimeError("a forward that is measured was differentiated")
        return packed

    def _number(self, x: Tensor) -> int | None:
        """The number of a tensor's storage; None for what is there anyway: parameters, buffers, and casts of them."""
        if isinstance(x, Lazy):
            if x.promise.values is None:
                return None  # what it is made of is saved too
            x = x.promise.values
        if not is_plain(x):
            self._sizes.append(x.nbytes if x.layout is torch.strided else 0)
            return len(self._sizes) - 1
        if self._held.has(x) or self._held.has_source(x):
            return None
        storage = x.untyped_storage()
        known = self._numbers.setdefault(StorageWeakRef(storage), len(self._sizes))
        if known == len(self._sizes):
            self._sizes.append(storage.nbytes())
        return known

    def around(self, block: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's forward: its own, and once more to be compared and some times more to be timed."""
        found = self._found[self._names[block]]
        _, given = apart(args, kwargs)
        found.inputs |= {number for x in given if (number := self._number(x)) is not None}
        found.given += [(x.detach(), version_of(x)) for x in given if is_plain(x)]
        found.obstacle = found.obstacle or self._hidden()
        state = BlockState(block, self._device, self.writes)
        self._into = found.saved
        try:
            output = forward(*args, **kwargs)
            self._into = None
            state.forward_ended()
            if not found.obstacle:
                self._repeat(found, state, lambda: forward(*args, **kwargs), output)
        finally:
            self._into = self._elsewhere
        return output

    def _hidden(self) -> str:
        """Why nothing can be said of what a block saves: somebody else's hooks see it."""
        into, self._into = self._into, set()
        try:
            torch.ones((), device=self._device, requires_grad=True).exp()
            return "" if self._into else "it runs in saved-tensor hooks of the model's own, such as checkpointing has"
        finally:
            self._into = into

    def _repeat(self, found: _Found, state: BlockState, run: Callable[[], Any], output: Any) -> None:
        if _written(found):
            found.obstacle = "it writes to its input"
            return
        with Again(state):
            again = run()
        if not _same(output, again):
            found.obstacle = "it gives other numbers when it runs again"
            return
        del again
        with Again(state):
            timing = time_call(run, self._device, budget_s=0.0, min_runs=_RUNS, warmup=0, host_ahead=True)
        found.ms += timing.without_host_ms

    def cost(self) -> ForwardCost:
        for found in self._found.values():
            if not found.obstacle and _written(found):
                found.obstacle = "its input is written to after it has run"
        blocks = tuple(
            BlockCost(
                name=name,
                forward_ms=found.ms,
                saved=frozenset(found.saved),
                inputs=frozenset(found.inputs),
                obstacle=found.obstacle,
            )
            for name, found in self._found.items()
        )
        return ForwardCost(sizes=tuple(self._sizes), elsewhere=frozenset(self._elsewhere), blocks=blocks)


def _written(found: _Found) -> bool:
    return any(version_of(x) != version for x, version in found.given)


def _same(one: Any, other: Any) -> bool:
    """Whether two outputs are made of the same tensors, bit for bit."""
    ones, others = list(tensors(one)), list(tensors(other))
    return len(ones) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and same_bits(a, b) for a, b in zip(ones, others, strict=True)
    )
