"""`auto` against each of PyTorch's own ways to train, in one run.

    python benchmarks/auto.py [--cases ...] [--compile] [--rounds N] [--out FILE]

Every contender trains the same model from the same weights with the same optimizer, the fastest for
the device. All stay loaded and take turns. `auto` starts without any stored timing.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import Case, bert_base, decoder_1b, large_matmuls, many_tiny, resnet50
from harness import Contender, Report, Spread, arguments, interleave, ratio
from peers import HandLoop, Mode, fastest_optimizer, resident_tensors

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.backends import synchronize
from deepseek_mp.costs.memory import peak_during

OURS = "auto"
WARMUP = 3
LONGER = 3
"""How many times as long the blocks are in which `auto` and the best mode take turns."""
MARGIN = 1.02
"""How much slower than the best mode still counts as equal: the noise of one run."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A model, PyTorch's own modes for it, and what is promised."""

    build: Callable[..., Case]
    modes: tuple[Mode, ...]
    compiled: tuple[Mode, ...] = ()
    expected: str = ""
    """The format that `auto` must pick; empty when the fastest mode decides."""
    least_speedup: float = 0.0
    """Over fp32."""
    steps: int
    """Steps in a block of all modes in turn."""


CPU_MODES = (Mode(format="fp32"), Mode(format="fp32", onednn="bf16"), Mode(format="bf16"))
CPU = {
    "large-matmuls": Contest(build=large_matmuls, modes=CPU_MODES, expected="bf16", least_speedup=1.5, steps=1),
    "many-tiny": Contest(build=many_tiny, modes=CPU_MODES, expected="fp32", steps=100),
}
GPU = {
    "resnet50": Contest(
        build=resnet50,
        steps=4,
        modes=(
            Mode(format="fp32"),
            Mode(format="tf32"),
            Mode(format="bf16"),
            Mode(format="bf16", channels_last=True),
            Mode(format="fp16", channels_last=True),
        ),
        compiled=(
            Mode(format="bf16", channels_last=True, compile=True),
            Mode(format="fp16", channels_last=True, compile=True),
        ),
    ),
    "bert-base": Contest(
        build=bert_base,
        steps=4,
        modes=tuple(Mode(format=name) for name in ("fp32", "tf32", "bf16", "fp16")),
        compiled=(Mode(format="bf16", compile=True),),
    ),
    "decoder-1.3b": Contest(build=decoder_1b, steps=2, modes=(Mode(format="bf16"),)),
}


class Auto:
    """The trainer with `precision_mode='auto'`, timed while it decides on its first step."""

    def __init__(self, case: Case, optimizer: Callable[..., Any], device: torch.device, *, compile: bool) -> None:
        self.case, self.device, self.calls = case, device, 0
        self.trainer = MixedPrecisionTrainer(
            case.model(), "auto", loss_fn=case.loss_fn, optimizer=optimizer, device=device, compile=compile,
            progress=False,
        )  # fmt: skip
        synchronize(device)
        start = time.perf_counter()
        self.step()
        synchronize(device)
        self.first_step_s = time.perf_counter() - start

    def step(self) -> Any:
        self.calls += 1
        return self.trainer.step(self.case.batches[self.calls % len(self.case.batches)])

    def choice(self) -> dict[str, Any]:
        """What was chosen, and the evidence."""
        plan = self.trainer.plan
        whole = [decision.to_json() for decision in plan.decisions if not decision.layer]
        return {"format": plan.base.name, "memory_format": plan.memory_format, "decisions": whole}


def measure(contest: Contest, device: torch.device, args: Any, *, compile: bool) -> dict[str, Any]:
    """All modes of a contest: peak memory one by one, then time per step in turn."""
    case = contest.build(device, small=args.small)
    optimizer_name, optimizer = fastest_optimizer(case, device)
    peaks: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    held = _held(device)
    # First, while the process is cold: the time to decide includes the libraries' own searches.
    auto = Auto(case, optimizer, device, compile=compile)
    _warm_up(auto.step)
    peaks[OURS] = _peak(auto.step, auto.trainer.model, auto.trainer.optimizer, device, held)
    contenders = {OURS: Contender(call=auto.step)}
    for mode in contest.compiled if compile else contest.modes:
        held = _held(device)
        try:
            loop = HandLoop(case, mode, optimizer, device)
            with loop.flags():
                _warm_up(loop.step)
                peaks[mode.name] = _peak(loop.step, loop.model, loop.optimizer, device, held)
            contenders[mode.name] = Contender(call=loop.step, settings=loop.flags)
        except (RuntimeError, MemoryError) as error:  # one mode that does not run must not cost the others
            failed[mode.name] = str(error).splitlines()[0]
    times = interleave(contenders, device, rounds=args.rounds, steps=args.steps or contest.steps)
    losses = {name: _loss(contender) for name, contender in contenders.items()}
    for name, loss in losses.items():
        if name != OURS and not math.isfinite(loss):  # products of NaN are fast
            failed[name] = f"void: the loss is {loss}"
            del times[name]
    best = min((name for name in times if name != OURS), key=lambda name: Spread.of(times[name]).median)
    # In turn with that one alone, since after FP32's steps a device is hotter, and in longer blocks, since the first
    # step of a block finds an empty queue, which happens once in a training that never waits.
    pair = {name: contenders[name] for name in (OURS, best)}
    times |= interleave(pair, device, rounds=args.rounds, steps=LONGER * (args.steps or contest.steps))
    return _result(contest, times, best, auto, {
        "optimizer": optimizer_name,
        "peak_memory_mib": peaks,
        "failed_modes": failed,
        "final_loss": losses,
    })  # fmt: skip


def _result(
    contest: Contest, times: dict[str, list[float]], best: str, auto: Auto, more: dict[str, Any]
) -> dict[str, Any]:
    """The case's record; the times of `auto` and of the best are those of the two in turn."""
    spreads = {name: Spread.of(values) for name, values in times.items()}
    against_best = ratio(times, OURS, best)
    speedup = ratio(times, "fp32", OURS) if "fp32" in times else None
    choice = auto.choice()
    problems = []
    if not contest.expected and against_best.median > MARGIN:
        problems.append(f"auto takes {against_best.median:.3f} times as long as {best}")
    if contest.expected and choice["format"] != contest.expected:
        problems.append(f"auto picked {choice['format']}, not {contest.expected}")
    if speedup is not None and speedup.median < contest.least_speedup:
        problems.append(f"only {speedup.median:.2f} times as fast as fp32")
    if not math.isfinite(more["final_loss"][OURS]):
        problems.append("the loss is not finite")
    return {
        "step_ms": spreads,
        "best_of_pytorch": best,
        "auto_over_best": against_best,
        "fp32_over_auto": speedup,
        "choice": choice,
        "first_step_s": round(auto.first_step_s, 2),
        **more,
        "check": "; ".join(problems) or "passed",
    }


def _loss(contender: Contender) -> float:
    """The loss of one more step."""
    with contender.settings():
        result: Any = contender.call()
    return float(getattr(result, "loss", result))


def _warm_up(step: Callable[[], object]) -> None:
    for _ in range(WARMUP):
        step()


def _held(device: torch.device) -> int:
    """Bytes of tensors on an accelerator before a contender is built; its own peak is what comes on top."""
    return 0 if device.type == "cpu" else int(torch.get_device_module(device).memory_allocated(device))


def _peak(
    step: Callable[[], object], model: torch.nn.Module, optimizer: Any, device: torch.device, held: int
) -> float | None:
    peak = peak_during(step, device, resident=resident_tensors(model, optimizer))
    return None if peak is None else round((peak - held) / 2**20, 1)


def main() -> int:
    args = arguments(__doc__ or "", [*CPU, *GPU])
    device: torch.device = args.device
    os.environ["DEEPSEEK_MP_CACHE"] = "off"  # a cold decision is part of what is measured
    table = CPU if device.type == "cpu" else GPU
    report = Report("auto", device, vars(args))
    for name in args.cases or table:
        contest = (CPU | GPU)[name]
        report.run(name, partial(measure, contest, device, args, compile=False))
        if args.compile and contest.compiled:
            report.run(f"{name}-compiled", partial(measure, contest, device, args, compile=True))
    rows = [("case", "mode", "ms", "peak MiB", "note")]
    for name, case in report.cases.items():
        for mode, spread in case.get("step_ms", {}).items():
            memory = case["peak_memory_mib"][mode]
            shown = "-" if memory is None else f"{memory:.0f}"
            rows.append((name, mode, str(Spread(**spread)), shown, _note(case, mode)))
    return report.finish(args.out, rows)


def _note(case: dict[str, Any], mode: str) -> str:
    if mode == case["best_of_pytorch"]:
        return "best of PyTorch's own"
    if mode != OURS:
        return ""
    choice = case["choice"]
    against = Spread(**case["auto_over_best"])
    return f"{choice['format']} {choice['memory_format']}, {against} of the best, first step {case['first_step_s']} s"


if __name__ == "__main__":
    raise SystemExit(main())
