"""When what happens in a step of the offloaded decoder: on the device, in the training's thread and in the host's.

    python benchmarks/offload_timeline.py [--arms immediate-60 ...] [--threads 32 24 ...] [--teams N] [--block N]

For each arm and each number of threads: the time of a step, of two that begin with an idle device and of eight; then,
of two steps (one of an arm with micro-batches), milliseconds from their beginning. The host's thread takes a chunk, is
at work on it when its gradients have arrived, and sends it when it is stepped. Arms are those of mode 'immediate' in
`offload_arms.py`. On a CPU, --small tries the script, and times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from decoder import next_token_loss
from harness import positive
from offload_arms import ARMS, Training, settings_of

from deepseek_mp.backends import default_device, synchronize
from deepseek_mp.optim.offload import HostMemory, OffloadedOptimizer, crew, host_chunk

WARM, ROUNDS = 4, 5
"""Steps before times are taken, and measurements; of an arm with micro-batches fewer."""
STEPS = (2, 8)
"""Of one measurement each."""


Notes = list[tuple[float, str]]


@contextmanager
def noted(notes: Notes) -> Iterator[None]:
    """Inside, what the host's thread does with each chunk is noted: it waits for gradients, begins, and sends."""
    names = ("begin_taken", "send", "land")
    whole: list[Callable[..., Any]] = [getattr(host_chunk.HostChunk, name) for name in names]

    def around(method: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def call(chunk: host_chunk.HostChunk, *args: Any, **options: Any) -> Any:
            notes.append((time.perf_counter(), f"  host {before} {chunk.number}"))
            made = method(chunk, *args, **options)
            notes.append((time.perf_counter(), f"  host {after} {chunk.number}"))
            return made

        return call

    words = (("takes", "is at work on"), ("is done with", "has sent"), ("adds up", "has added up"))
    for name, method, (before, after) in zip(names, whole, words, strict=True):
        setattr(host_chunk.HostChunk, name, around(method, before, after))
    try:
        yield
    finally:
        for name, method in zip(names, whole, strict=True):
            setattr(host_chunk.HostChunk, name, method)


def milliseconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """A step's, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / steps


def timeline(training: Training, optimizer: OffloadedOptimizer, notes: Notes, steps: int, micro: int) -> list[str]:
    """Lines of what happened, in order."""
    on_device = training.device.type != "cpu"
    event = partial(torch.get_device_module(training.device).Event, enable_timing=True) if on_device else None
    marks: list[tuple[str, Any]] = []

    def note(what: str) -> None:
        notes.append((time.perf_counter(), what))
        if event is not None and "step" not in what:
            marks.append((what, event()))
            marks[-1][1].record()

    synchronize(training.device)
    start = time.perf_counter()
    for number in range(steps):
        for batch in range(micro):
            of = f"{number}.{batch}"
            note(f"forward {of} is asked for")
            loss = next_token_loss(training.model(training.inputs), training.targets)
            note(f"backward {of} is asked for")
            loss.backward()
            note(f"all of {of} is asked for")
        optimizer.step()
        note(f"step {number} has returned")
    optimizer.wait_for_weights()  # the host's thread is at work on the last step
    synchronize(training.device)
    note("step: all is done")
    lines = [f"{1e3 * (at - start):8.1f}  {what}" for at, what in sorted(notes)]
    if marks:
        first = marks[0][1]
        lines += [f"{first.elapsed_time(mark):8.1f}  device reaches: {what}" for what, mark in marks]
    return lines


def show(name: str, training: Training, memory: HostMemory) -> None:
    """An arm's times and its timeline."""
    settings, rate = settings_of(training, ARMS[name])
    optimizer = OffloadedOptimizer(
        training.model.parameters(), lr=rate, model=training.model, settings=settings, memory=memory
    )

    def step() -> None:
        training.backward(ARMS[name].micro)
        optimizer.step()

    for _ in range(max(2, WARM // ARMS[name].micro)):
        step()
    rounds = max(2, ROUNDS // ARMS[name].micro)
    found = [[milliseconds(step, steps, training.device) for _ in range(rounds)] for steps in STEPS]
    each = ", ".join(f"of {n}: {statistics.median(ms):.1f} ms" for n, ms in zip(STEPS, found, strict=True))
    print(f"{name}, {torch.get_num_threads()} threads: a step {each}", flush=True)
    notes: Notes = []
    with noted(notes):
        print(
            *timeline(training, optimizer, notes, 2 if ARMS[name].micro == 1 else 1, ARMS[name].micro),
            sep="\n",
            flush=True,
        )
    optimizer.close()
    training.model.zero_grad()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, arm in ARMS.items() if arm.mode == "immediate" and not arm.fp32]
    parser.add_argument("--arms", nargs="+", choices=known, default=["immediate-60", "backward-60"])
    parser.add_argument("--threads", nargs="+", type=positive, default=[torch.get_num_threads()])
    parser.add_argument(
        "--teams", type=positive, default=crew.TEAMS, help="of the host's threads (default %(default)s)"
    )
    parser.add_argument(
        "--block", type=positive, default=host_chunk.BLOCK, help="values for each thread (default %(default)s)"
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    crew.TEAMS, host_chunk.BLOCK = args.teams, args.block
    training, memory = Training(args.device, small=args.small), HostMemory()
    for name in args.arms:
        for threads in args.threads:
            torch.set_num_threads(threads)  # a crew is made of so many
            show(name, training, memory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
