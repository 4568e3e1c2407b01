"""`recomputed_blocks`: the region around a forward in which blocks keep their inputs, and are computed again later.

PyTorch's `checkpoint` does the work. Here is what makes the second run equal to the first (`block_state`), and hooks
that count calls pass over it (`nn.again`). A block's own hooks stand outside and run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek_mp.activations.block_state import Again, BlockState, Writes
from deepseek_mp.nn.nested import map_leaves

Forward = Callable[..., Any]
Around = Callable[[nn.Module, Forward, tuple[Any, ...], dict[str, Any]], Any]
"""Calls a block's forward with these arguments, in its own way."""


@contextmanager
def recomputed_blocks(blocks: Iterable[nn.Module], device: torch.device, writes: Writes) -> Iterator[None]:
    """The forward inside keeps of these blocks the inputs only; the backward, inside or after, computes them again.

    Outputs, gradients, buffers and random numbers are those without this region, bit for bit. A block that runs
    without gradients is left alone. The inputs must not be written to until the backward, which PyTorch checks.

    Args:
        blocks: modules of one model; none within another.
        device: where they run, whose random numbers they draw.
        writes: the buffers that they are known to write; what is seen is added.
    """

    def around(block: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _checkpointed(forward, args, kwargs, BlockState(block, device, writes))

    with replaced_forwards(blocks, around):
        yield


@contextmanager
def replaced_forwards(blocks: Iterable[nn.Module], around: Around) -> Iterator[None]:
    """Inside, `around` calls the forwards of these blocks, where gradients are on."""
    replaced = []
    try:
        for block in blocks:
            own = vars(block).get("forward")
            vars(block)["forward"] = _Forward(block, block.forward, around)
            replaced.append((block, own))
        yield
    finally:
        for block, own in replaced:
            if own is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = own


class _Forward:
    """Stands in for the forward of a block."""

    def __init__(self, block: nn.Module, forward: Forward, around: Around) -> None:
        self._block, self._forward, self._around = block, forward, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return self._around(self._block, self._forward, args, kwargs)


def _checkpointed(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], state: BlockState) -> Any:
    tree, tensors = apart(args, kwargs)

    def run(*tensors: Tensor) -> Any:
        own_args, own_kwargs = together(tree, tensors)
        return forward(*own_args, **own_kwargs)

    output = checkpoint(
        run,
        *tensors,
        use_reentrant=False,
        preserve_rng_state=False,  # the state has all generators, Python's and NumPy's too
        context_fn=lambda: (nullcontext(), Again(state)),
    )
    state.forward_ended()
    return output


class _Leaf:
    """Stands for a tensor among arguments."""

    def __init__(self, number: int) -> None:
        self.number = number


def apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Arguments without their tensors, and these; one that is passed twice is one still, for who compares objects."""
    numbers: dict[int, int] = {}
    tensors: list[Tensor] = []

    def taken(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in numbers:
            numbers[id(leaf)] = len(tensors)
            tensors.append(leaf)
        return _Leaf(numbers[id(leaf)])

    return map_leaves((args, kwargs), taken), tensors


def together(tree: Any, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The reverse of `apart`."""
    args, kwargs = map_leaves(tree, lambda leaf: tensors[leaf.number] if isinstance(leaf, _Leaf) else leaf)
    return args, kwargs
