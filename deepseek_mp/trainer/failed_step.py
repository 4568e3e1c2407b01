"""What a step that fails would leave behind: half of an optimizer's state, and memory that nobody can use.

An exception keeps the frames that it came through, and these the activations, as long as somebody handles it. Who
catches that memory ran out and tries a smaller batch at once would find none free. So of such an exception, and of no
other, the local variables are let go. What a backward had still to do keeps its graph, and is let go too.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepseek_mp.costs.restore import release_memory
from deepseek_mp.costs.timing import is_out_of_memory
from deepseek_mp.optim.offload import OffloadedOptimizer

BEGUN = (
    "The optimizer had begun to change its parameters when this was raised: they, and its state, are between two "
    "steps. Load a checkpoint before training on"
)


@contextmanager
def undone_if_it_fails(optimizer: Optimizer) -> Iterator[None]:
    """Whatever the optimizer's step raises inside, the state that it had made is dropped again.

    Optimizers make the state of a group of parameters before they write to any, and add each parameter's at the end of
    `state`. If one had begun to write, the error says so. That is read off the first parameter: the first that a loop
    comes to, and among those that a fused operation writes at once. An offloaded optimizer takes its step back itself.
    """
    if isinstance(optimizer, OffloadedOptimizer):
        yield
        return
    known, first = len(optimizer.state), next(iter(_trained(optimizer)), None)
    versions = _versions(optimizer, first)
    try:
        yield
    except BaseException as error:
        if _versions(optimizer, first)[: len(versions)] != versions:
            error.add_note(BEGUN)
        else:
            for parameter in list(optimizer.state)[known:]:
                del optimizer.state[parameter]
        raise


def _versions(optimizer: Optimizer, first: Tensor | None) -> list[int]:
    """Those of the parameter and its state; a version grows with every write."""
    if first is None:
        return []
    state = optimizer.state.get(first, {})
    tensors = [first, *(value for value in state.values() if isinstance(value, Tensor))]
    return [tensor._version for tensor in tensors]  # noqa: SLF001 - there is no public one


def _trained(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def let_go(error: BaseException, device: torch.device) -> None:
    """Free the memory that the error holds, and that the device's allocator does, if it says that memory ran out."""
    if not is_out_of_memory(error):
        return
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)  # those that are still running are left alone
    _forget_backward()
    release_memory(device)


def _forget_backward() -> None:
    """Have autograd let go of what a backward that failed had still to do on this thread.

    Nodes that were ready, such as the other branch of a residual block, stay in the thread's queue, and with them the
    graph before them and what it saved, until the thread's next backward comes to the queue. Smaller batches would run
    out of memory in their forward and never get there. On a CPU, and wherever a step is counted, it is this thread's.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        torch.zeros((), device="cpu", requires_grad=True).backward()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from or while handling."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
