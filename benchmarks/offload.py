"""Offloaded AdamW on a decoder of 1.36 billion weights: time of a step, device memory, exactness, and what is hidden.

    python benchmarks/offload.py [--cases ...] [--rounds N] [--steps N] [--out FILE]

Cases are `host` (implementations of the host's step; needs no device), `exact` (a small FP32 model, offloaded beside
AdamW on the host and on the device, on the same gradients) and the arms of `offload_arms.py`: masters and moments on
the device, offloaded by this package, and by torchao's `CPUOffloadOptimizer` where it is installed. Of a BF16 model
torchao keeps no FP32 masters and its moments are BF16, so it moves half the bytes; the arms `fp32-...` train an FP32
model under autocast, where both keep the same.

Arms share one model, and one after the other the same host memory. A time is milliseconds from an idle device to an
idle device over `--steps` steps, divided by them, `--rounds` times. Predictions take the rates that `calibrate`
measures in the same process and the time of forward and backward without an optimizer; what the next forward hides is
seen once in `--steps`. `state` is what the device's
allocator holds after backward beyond the model and its batch. `host step` is the call of `step` after the device has
ended, in mode 'sync'; `hidden` is the part of it that another mode's step does not show.

The report is written after each case, so that a time limit loses only the rest. Cases run in the order in which the
demands need them; `targets` has the outcome of each demand. On a CPU the host is the device: nothing is hidden there,
and times mean nothing.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import offload_exact
import torch
from decoder import Decoder, next_token_loss
from harness import Contender, Report, Spread, arguments, interleave, ratio
from offload_arms import ARMS, SMALL, Arm, Steps, Training, optimizer_of, why_not
from offload_targets import targets
from torch import nn

from deepseek_mp.backends import peak_memory_bytes, reset_peak_memory, synchronize
from deepseek_mp.optim import AdamW
from deepseek_mp.optim.offload import HostMemory, OffloadedOptimizer, calibrate
from deepseek_mp.optim.offload.schedule import Rates, Work, host_bytes, predict

ROUNDS, STEPS = 3, 4
"""A block of more steps is closer to a training, whose forward hides what the last step of a block shows."""
HOST_STEPS = 2
"""Of the call of `step` alone."""
TOUCHED = 32 << 30
"""Bytes of the host's memory that are written before anything is measured: a virtual machine may get its memory as it
first uses it, and what comes first is no faster than that."""


class Bench:
    """What the arms share: the model, host memory, and what was measured once."""

    def __init__(self, args: Any) -> None:
        self.args, self.device = args, args.device
        self._training: Training | None = None
        self._is_fp32 = False
        self._memory = HostMemory()
        self._bare: dict[tuple[bool, int], float] = {}
        self._rates: Rates | None = None
        self.device_step = 0.0
        """Seconds of the step of all values on the device, once its arm has run."""

    def training(self, arm: Arm) -> Training:
        """A model for this arm: the one of the arm before, unless that has left hooks on it or has another format."""
        fp32 = arm.fp32
        if self._training is None or self._is_fp32 != fp32 or arm.kind == "torchao":
            if self._training is not None and self._is_fp32 != fp32:
                self._memory = HostMemory()  # blocks of other sizes
            self._training = None
            self.release()
            self._training, self._is_fp32 = Training(self.device, small=self.args.small, fp32=fp32), fp32
        return self._training

    def forget_model(self) -> None:
        """Somebody has left hooks on it."""
        self._training = None

    @property
    def memory(self) -> HostMemory:
        return self._memory

    @property
    def rates(self) -> Rates:
        if self._rates is None:
            self._rates = calibrate(self.device, step_values=1 << (14 if self.args.small else 24))
        return self._rates

    def bare(self, training: Training, arm: Arm) -> float:
        """Seconds of a window's forward and backward passes without an optimizer, gradients added up in place."""
        known = (arm.fp32, arm.micro)
        if known not in self._bare:
            for _ in range(2):
                training.without_optimizer(1)
            times = self.seconds(lambda: training.without_optimizer(arm.micro), steps=3)
            self._bare[known] = Spread.of(times).median
        return self._bare[known]

    def seconds(self, call: Callable[[], object], *, steps: int, rounds: int | None = None) -> list[float]:
        """Of a call, once a round."""
        found = []
        for _ in range(rounds or self.args.rounds):
            synchronize(self.device)
            start = time.perf_counter()
            for _ in range(steps):
                call()
            synchronize(self.device)
            found.append((time.perf_counter() - start) / steps)
        return found

    def allocated(self) -> int | None:
        """Bytes of tensors on the device; None on a CPU, where nobody counts them."""
        if self.device.type == "cpu":
            return None
        synchronize(self.device)
        self.release()  # what another stream has used counts as free only then
        return int(torch.get_device_module(self.device).memory_allocated(self.device))

    def release(self) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()


def measure(name: str, bench: Bench) -> dict[str, Any]:
    """One arm: timed, its memory, and compared with its prediction."""
    arm = ARMS[name]
    training = bench.training(arm)
    bare = bench.bare(training, arm)
    rates = bench.rates  # measured once, and not in the time that making takes
    before = bench.allocated()
    start = time.perf_counter()
    optimizer = optimizer_of(training, arm, bench.memory, rates)
    made = time.perf_counter() - start
    losses: list[torch.Tensor] = []

    def step() -> None:
        losses.append(training.backward(arm.micro))
        optimizer.step()

    try:
        step()
        state = _state_bytes(bench, training, arm, optimizer, before)
        step()  # the allocator's memory was given back for that
        reset_peak_memory(bench.device)
        times = bench.seconds(step, steps=bench.args.steps)
        result = {
            "arm": asdict(arm),
            "step_ms": Spread.of([1e3 * each for each in times]),
            "bare_ms": 1e3 * bare,
            "making_s": made,
            "state_bytes": state,
            "state_bytes_per_value": None if state is None else state / training.values,
            "peak_memory_bytes": peak_memory_bytes(bench.device),
            "check": "passed" if all(math.isfinite(float(loss)) for loss in losses) else "a loss is not finite",
        }
        if isinstance(optimizer, OffloadedOptimizer):
            result |= _offloaded(bench, training, arm, optimizer, bare)
        elif arm.kind == "device" and arm.micro == 1:
            bench.device_step = max(Spread.of(times).median - bare, 0.0)
        return result
    finally:
        optimizer.close()
        training.model.zero_grad()
        if arm.kind == "torchao":
            bench.forget_model()


def _state_bytes(bench: Bench, training: Training, arm: Arm, optimizer: Steps, before: int | None) -> int | None:
    """Bytes on the device between backward and step, beyond the model and its batch."""
    training.backward(arm.micro)
    now = bench.allocated()
    optimizer.step()
    return None if now is None or before is None else now - before


def _offloaded(
    bench: Bench, training: Training, arm: Arm, optimizer: OffloadedOptimizer, bare: float
) -> dict[str, Any]:
    work = Work(
        forward_backward=bare,
        device_step=bench.device_step,
        micro_steps=arm.micro,
        mode=arm.mode,
        keep=arm.undo,
        wire="fp32" if arm.fp32 else "bf16",
        cast=optimizer.casts_on_host and not arm.fp32,
    )
    predicted = predict(optimizer.split, bench.rates, work)
    host = []
    if arm.mode == "sync":
        for _ in range(HOST_STEPS):
            training.backward(arm.micro)
            synchronize(bench.device)
            start = time.perf_counter()
            optimizer.step()
            host.append(time.perf_counter() - start)
    return {
        "share": optimizer.split.fraction,
        "predicted_ms": 1e3 * (predicted.total + predicted.after / bench.args.steps),
        "prediction": asdict(predicted),
        "host_step_ms": 1e3 * min(host) if host else None,
        "pinned": optimizer.pinned,
        "host_bytes_per_value": host_bytes(work),
        "huge_pages": _huge_pages(),
    }


def _huge_pages() -> float | None:
    """Share of the process's own memory that is in huge pages: what has been given back in pieces gets few. Linux."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return found["AnonHugePages"] / found["Anonymous"] if found.get("Anonymous") else None


def measure_exact(bench: Bench) -> dict[str, Any]:
    """The numbers, on a small FP32 model."""
    torch.manual_seed(0)
    config = SMALL if bench.args.small else offload_exact.SIZES
    with torch.device(bench.device):
        model = Decoder(config)
        tokens = torch.randint(0, config.vocabulary, (4, 129))

    def backward() -> None:
        next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()

    return offload_exact.compare(model, backward, bench.device)


def measure_host(args: Any) -> dict[str, Any]:
    """AdamW's step on the host by the implementations that could be taken, on one FP32 parameter."""
    values = 1 << (16 if args.small else 24)
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "torch, fused": lambda params: torch.optim.AdamW(params, fused=True),
        "torch, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
        "deepseek_mp.optim.AdamW": AdamW,
    }
    contenders, losses = {}, []
    for name, make in makers.items():
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(values))
        parameter.grad = torch.randn(values)
        optimizer = make([parameter])
        optimizer.step()
        contenders[name] = Contender(call=optimizer.step)
        losses.append(parameter.detach().sum())
    times = interleave(contenders, torch.device("cpu"), rounds=args.rounds, steps=args.steps)
    agreed = all(torch.allclose(loss, losses[0], rtol=1e-4) for loss in losses)
    return {
        "values": values,
        "host_ms": {name: Spread.of(each) for name, each in times.items()},
        "ratio": {name: ratio(times, name, "torch, fused") for name in makers},
        "check": "passed" if agreed else "the implementations disagree",
    }


def cases(names: Iterable[str], bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is to be measured, by name; arms that cannot run here are left out, and said."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in names:
        if name == "host":
            found[name] = partial(measure_host, bench.args)
        elif name == "exact":
            found[name] = partial(measure_exact, bench)
        elif (reason := why_not(ARMS[name], bench.device)) is not None:
            print(f"offload: {name} is left out: {reason}", file=sys.stderr, flush=True)
        else:
            found[name] = partial(measure, name, bench)
    return found


def usable_cores() -> int:
    """Those that this process may run on; a container's quota counts, which PyTorch does not ask for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    limit, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return cores if limit == "max" else max(1, min(cores, round(int(limit) / int(period))))


def main() -> int:
    known = ["exact", *ARMS, "host"]
    args = arguments(__doc__ or "", known, rounds=ROUNDS)
    args.steps = args.steps or STEPS
    begun = time.perf_counter()
    bench = Bench(args)
    cores = usable_cores()
    if args.device.type != "cpu":
        torch.ones(TOUCHED // 8, dtype=torch.int64)
    torch.set_num_threads(min(torch.get_num_threads(), cores))  # more would wait for each other in every operation
    threads = torch.get_num_threads()
    given: dict[str, Any] = {"rounds": args.rounds, "steps": args.steps, "threads": threads, "cores": cores}
    report = Report("offload", args.device, given)
    for name, case in cases(args.cases or known, bench).items():
        report.run(name, case)
        given |= {"rates": asdict(bench.rates), "targets": targets(report.cases)}
        report.write(args.out)
        shown, spent = _line(report.cases[name]), time.perf_counter() - begun
        print(f"offload: {name} {shown}, {spent:.0f} s so far", file=sys.stderr, flush=True)
    rows = [["case", "step ms", "predicted", "host step ms", "state GB", "check"]]
    rows += [[name, *_cells(case)] for name, case in report.cases.items()]
    status = report.finish(args.out, rows)
    for target in given.get("targets", ()):
        print(f"{target['what']} [{target['contender']}]: {target['value']} ({target['outcome']})")
    return status


def _line(case: dict[str, Any]) -> str:
    said = f"{case['step_ms']['median']:.4g} ms" if "step_ms" in case else str(case["check"])
    return f"{said}: {case['seconds']} s"


def _cells(case: dict[str, Any]) -> list[str]:
    def number(key: str, scale: float = 1.0) -> str:
        value = case.get(key)
        return "" if value is None else f"{value * scale:.4g}"

    spread = f"{case['step_ms']['median']:.4g}" if "step_ms" in case else ""
    numbers = [number("predicted_ms"), number("host_step_ms"), number("state_bytes", 1e-9)]
    return [spread, *numbers, str(case["check"])]


if __name__ == "__main__":
    sys.exit(main())
