"""Times of calls that take a GPU less than the host needs to launch them: recorded several in a row, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from harness import Contender, interleave
from torch import Tensor

from deepseek_mp.backends import synchronize

STEPS = 20
COPIES_BYTES = 256 * 2**20
"""Of all copies of what a call reads: several times the cache of an H200."""
MOST_COPIES = 20


def times(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds per call of those that run, in turn, and why the others do not."""
    steps = 1 if device.type == "cpu" else STEPS
    ready: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        block = _Block(call, device, steps)
        failed[name] = problem(block.prepare)
        if not failed[name]:
            ready[name] = Contender(call=block)
    taken = interleave(ready, device, rounds=rounds, steps=1)
    return {name: [ms / steps for ms in values] for name, values in taken.items()}, only_failed(failed)


def turns(run: Callable[..., Tensor], operands: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The call, which takes another copy of its last operands each time: none is in a cache when it is read."""
    bytes_each = sum(tensor.nbytes for tensor in operands)
    count = min(MOST_COPIES, -(-COPIES_BYTES // bytes_each)) if operands[0].device.type != "cpu" else 1
    copies = cycle([operands, *([tensor.clone() for tensor in operands] for _ in range(count - 1))])
    return lambda *first: run(*first, *next(copies))


class _Block:
    """Several calls in a row, recorded once and replayed, so that the host's time to launch does not count."""

    def __init__(self, call: Callable[[], object], device: torch.device, steps: int) -> None:
        self.call, self.device, self.steps = call, device, steps
        self.replay: Callable[[], object] = call

    def prepare(self) -> None:
        """Compile and tune what is called, then record it; on a CPU there is nothing to record."""
        if self.device.type == "cpu":
            self._warm()
            return
        module: Any = torch.get_device_module(self.device)
        graph, stream = module.CUDAGraph(), module.Stream()
        stream.wait_stream(module.current_stream())
        # The stream that is recorded: a backward waits for those that its leaves were used on.
        with module.stream(stream):
            self._warm()
        with module.graph(graph, stream=stream):
            for _ in range(self.steps):
                self.call()
        self.replay = graph.replay
        self.replay()

    def _warm(self) -> None:
        for _ in range(3):
            self.call()
        synchronize(self.device)

    def __call__(self) -> object:
        return self.replay()


def problem(call: Callable[[], object]) -> str:
    """Why the call fails, in one line; empty if it does not. An implementation that a device lacks is an answer."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - compilers of kernels raise classes of their own
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return ""


def only_failed(problems: Mapping[str, str]) -> dict[str, str]:
    """Without the empty ones."""
    return {name: why for name, why in problems.items() if why}
