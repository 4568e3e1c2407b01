"""Offloaded AdamW: the time of a step by mode and by the share that is offloaded, beside what the schedule predicts.

    python benchmarks/offload.py [--cases ...] [--rounds N] [--steps N] [--out FILE]

A BF16 decoder trains on random tokens. Each case has a model of its own, so cases are timed one after the other:
milliseconds from an idle device to an idle device over `--steps` steps, divided by them, `--rounds` times. Predictions
take the rates that `calibrate` measures in the same process, forward and backward without an optimizer, and the step
of AdamW over FP32 masters on the device. `hidden` is the part of the host's predicted work that the step does not
show. A case passes if its loss is finite and the prediction is within 15 %; on a CPU the host and the device are the
same processors, so that nothing is hidden and the comparison means nothing. The case `host` compares implementations
of the host's step, and needs no device.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from decoder import Decoder, DecoderConfig, next_token_loss
from harness import Contender, Report, Spread, arguments, interleave, ratio
from torch import nn

from deepseek_mp.backends import peak_memory_bytes, reset_peak_memory, synchronize
from deepseek_mp.optim import AdamW
from deepseek_mp.optim.offload import OffloadedOptimizer, OffloadSettings, calibrate
from deepseek_mp.optim.offload.schedule import Rates, Work, host_bytes, predict

SIZES = DecoderConfig(width=2048, heads=16, hidden=5632, layers=24)
SMALL = DecoderConfig(width=64, heads=4, hidden=128, layers=2, vocabulary=256)
BYTES_PER_VALUE = 14
"""That a value frees on the device: its FP32 master, two moments, and its gradient in BF16."""
ALLOWED = 0.15


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a case trains."""

    share: float
    """Of the values that are offloaded."""
    mode: str = "sync"
    undo: bool = True


CASES = {
    "device": Setup(share=0.0),
    "sync-25": Setup(share=0.25),
    "sync-50": Setup(share=0.5),
    "sync-75": Setup(share=0.75),
    "sync": Setup(share=1.0),
    "sync-without-undo": Setup(share=1.0, undo=False),
    "speculative-50": Setup(share=0.5, mode="speculative"),
    "speculative": Setup(share=1.0, mode="speculative"),
    "delayed": Setup(share=1.0, mode="delayed"),
}


@dataclass(frozen=True, kw_only=True)
class Known:
    """What predictions start from, measured once."""

    rates: Rates
    forward_backward: float
    """Seconds."""
    device_step: float


class Training:
    """A model and its batch; `step` trains with an optimizer, or without one."""

    def __init__(self, device: torch.device, *, small: bool) -> None:
        config = SMALL if small else SIZES
        torch.manual_seed(0)
        with torch.device(device):
            self.model = Decoder(config).to(torch.bfloat16)
        shape = (2, 33) if small else (8, 1025)
        tokens = torch.randint(0, config.vocabulary, shape, device=device)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]
        self.values = sum(p.numel() for p in self.model.parameters())

    def backward(self) -> torch.Tensor:
        loss = next_token_loss(self.model(self.inputs), self.targets)
        loss.backward()
        return loss.detach()

    def without_optimizer(self) -> torch.Tensor:
        loss = self.backward()
        self.model.zero_grad()
        return loss

    def with_optimizer(self, optimizer: OffloadedOptimizer) -> torch.Tensor:
        loss = self.backward()
        optimizer.step()
        return loss


def seconds(call: Callable[[], object], device: torch.device, *, rounds: int, steps: int) -> list[float]:
    """Of a call, once a round."""
    found = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            call()
        synchronize(device)
        found.append((time.perf_counter() - start) / steps)
    return found[1:]


def optimizer_of(training: Training, setup: Setup) -> OffloadedOptimizer:
    free = None if setup.share == 1.0 else int(setup.share * training.values) * BYTES_PER_VALUE
    settings = OffloadSettings(mode=setup.mode, undo=setup.undo, free_bytes=free, delay_from=0, cast="host")
    return OffloadedOptimizer(training.model.parameters(), lr=1e-4, model=training.model, settings=settings)


def measure_known(device: torch.device, args: Any) -> Known:
    training = Training(device, small=args.small)
    bare = Spread.of(seconds(training.without_optimizer, device, rounds=args.rounds, steps=args.steps)).median
    optimizer = optimizer_of(training, CASES["device"])
    whole = seconds(lambda: training.with_optimizer(optimizer), device, rounds=args.rounds, steps=args.steps)
    rates = calibrate(device)
    return Known(rates=rates, forward_backward=bare, device_step=max(Spread.of(whole).median - bare, 0.0))


def measure(setup: Setup, known: Known, device: torch.device, args: Any) -> dict[str, Any]:
    """One case: timed, and compared with its prediction."""
    training = Training(device, small=args.small)
    optimizer = optimizer_of(training, setup)
    losses: list[torch.Tensor] = []
    training.with_optimizer(optimizer)
    reset_peak_memory(device)
    times = seconds(
        lambda: losses.append(training.with_optimizer(optimizer)), device, rounds=args.rounds, steps=args.steps
    )
    work = Work(
        forward_backward=known.forward_backward, device_step=known.device_step, mode=setup.mode, keep=setup.undo
    )
    predicted = predict(optimizer.split, known.rates, work)
    taken = Spread.of([1e3 * each for each in times])
    error = 1e3 * predicted.total / taken.median - 1
    shown = taken.median / 1e3 - predicted.device
    finite = all(math.isfinite(float(loss)) for loss in losses)
    problems = [] if finite else ["a loss is not finite"]
    if abs(error) > ALLOWED and device.type != "cpu":
        problems.append(f"the prediction is {100 * error:+.0f} % off")
    return {
        "setup": asdict(setup),
        "share": optimizer.split.fraction,
        "step_ms": taken,
        "predicted_ms": 1e3 * predicted.total,
        "prediction": asdict(predicted),
        "prediction_error": error,
        "hidden": 1 - shown / predicted.host if predicted.host else None,
        "peak_memory_bytes": peak_memory_bytes(device),
        "pinned": optimizer.pinned,
        "host_bytes_per_value": host_bytes(work),
        "check": "; ".join(problems) or "passed",
    }


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


def main() -> int:
    args = arguments(__doc__ or "", ["host", *CASES])
    args.steps = args.steps or 3
    names = args.cases or ["host", *CASES]
    known = measure_known(args.device, args) if set(names) & set(CASES) else None
    given = {"rounds": args.rounds, "steps": args.steps, "threads": torch.get_num_threads()}
    report = Report("offload", args.device, given | {"known": known and asdict(known)})
    if "host" in names:
        report.run("host", lambda: measure_host(args))
    for name in names:
        if known is not None and name in CASES:
            report.run(name, partial(measure, CASES[name], known, args.device, args))
    rows = [["case", "step ms", "predicted", "hidden", "peak GB"]]
    for name, case in report.cases.items():
        for made, spread in case.get("host_ms", {}).items():
            rows.append([made, f"{spread['median']:.4g}", "", "", ""])
        if "step_ms" in case:
            hidden = "" if case["hidden"] is None else f"{case['hidden']:.2f}"
            peak = "" if case["peak_memory_bytes"] is None else f"{case['peak_memory_bytes'] / 1e9:.2f}"
            rows.append([name, f"{case['step_ms']['median']:.4g}", f"{case['predicted_ms']:.4g}", hidden, peak])
    return report.finish(args.out, rows)


if __name__ == "__main__":
    sys.exit(main())
