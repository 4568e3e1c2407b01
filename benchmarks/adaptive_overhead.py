"""What live precision costs beside a step of the 1.3B decoder.

    python benchmarks/adaptive_overhead.py [--small] [--out FILE]

Three parts: a probe, by the pace that its own cost gives it; a step whose statistics are sampled; and any other step,
in which live precision looks at gradients and at the inputs of lowered layers (with all layers in `block`). Steps with
and without alternate; the extra milliseconds are the median of their differences.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import decoder_1b
from harness import Report, Spread

from deepseek_mp import AdaptivePrecision, AdaptiveSettings, MixedPrecisionTrainer
from deepseek_mp.backends import default_device, synchronize


def overhead(device: torch.device, small: bool) -> dict[str, Any]:
    """The three parts, each with its share of the time."""
    live = AdaptivePrecision(AdaptiveSettings(warm_up=10**6))
    probed = alternating(decoder_1b(device, small=small), device, live)
    interval = max(live.settings.probe_every, math.ceil(probed["share"] / live.settings.probe_share))
    gc.collect()
    sampled = alternating(decoder_1b(device, small=small), device, None)
    gc.collect()
    watched = looked_at(decoder_1b(device, small=small), device)
    every = 50
    return {
        "watched": watched,
        "watched_every": 1,
        "watched_share": watched["share"],
        "probe": probed,
        "probe_every": interval,
        "probe_share": probed["share"] / interval,
        "controlled": 0 if live.controller is None else len(live.controller.units),
        "disabled": live.disabled,
        "statistics": sampled,
        "statistics_every": every,
        "statistics_share": sampled["share"] / every,
        "check": "passed",
    }


def alternating(case: Any, device: torch.device, live: AdaptivePrecision | None) -> dict[str, Any]:
    """Milliseconds of steps without and with a probe, or with statistics where there is no controller, in turn."""
    trainer = MixedPrecisionTrainer(
        case.model(),
        "bf16",
        loss_fn=case.loss_fn,
        optimizer=next(iter(case.optimizers.values())),
        callbacks=[] if live is None else [live],
        statistics_every=2 if live is None else 10**9,
        device=device,
        progress=False,
    )
    trainer.step(case.batches[0])
    times: list[list[float]] = [[], []]
    for number in range(24):
        if live is not None:
            live._next_probe = 10**9 if number % 2 else 0  # noqa: SLF001 - every second step has a probe
        synchronize(device)
        started = time.perf_counter()
        trainer.step(case.batches[number % len(case.batches)])
        synchronize(device)
        times[number % 2].append(1e3 * (time.perf_counter() - started))
    slow, fast = sorted((times[0][4:], times[1][4:]), key=statistics.median, reverse=True)
    extra = [a - b for a, b in zip(slow, fast, strict=True)]
    return {
        "step_ms": Spread.of(fast),
        "extra_ms": Spread.of(extra),
        "share": statistics.median(extra) / statistics.median(fast),
    }


def looked_at(case: Any, device: torch.device) -> dict[str, Any]:
    """Milliseconds of steps with all layers lowered, with live precision and without, some at a time in turn."""
    live = AdaptivePrecision(AdaptiveSettings(warm_up=10**6))
    trainer = MixedPrecisionTrainer(
        case.model(),
        "block",
        loss_fn=case.loss_fn,
        optimizer=next(iter(case.optimizers.values())),
        callbacks=[live],
        statistics_every=10**9,
        device=device,
        emulate=device.type == "cpu",
        progress=False,
    )
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(19):
        for on in (True, False) if number % 2 else (False, True):
            trainer.callbacks = (live,) if on else ()
            if live.controller is not None:
                live._next_probe = 10**9 if number > 1 else 0  # noqa: SLF001 - one probe, and then none
                if not on:
                    live._look.close()  # noqa: SLF001
                    live.stop_watching(trainer)
            trainer.step(case.batches[number % len(case.batches)])
            synchronize(device)
            started = time.perf_counter()
            for _ in range(3):
                trainer.step(case.batches[number % len(case.batches)])
            synchronize(device)
            times[on].append(1e3 * (time.perf_counter() - started) / 3)
    extra = [a - b for a, b in zip(times[True][3:], times[False][3:], strict=True)]
    return {
        "step_ms": Spread.of(times[False][3:]),
        "extra_ms": Spread.of(extra),
        "share": statistics.median(extra) / statistics.median(times[False][3:]),
        "lowered": 0 if live.controller is None else len(live.controller.lowered),
    }


def rows(report: Report) -> list[list[str]]:
    found = [["part", "ms of a step", "extra ms", "share of the time"]]
    for name, value in report.cases.items():
        for part in ("probe", "statistics", "watched") if value["check"] == "passed" else ():
            share = f"{value[f'{part}_share']:.3%} with one in {value[f'{part}_every']} steps"
            step, extra = (str(Spread(**value[part][key])) for key in ("step_ms", "extra_ms"))
            found.append([f"{name} {part}", step, extra, share])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model that a CPU can run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = default_device()
    report = Report("adaptive-overhead", device, vars(args))
    report.run("decoder-1.3b", partial(overhead, device, args.small))
    return report.finish(args.out, rows(report))


if __name__ == "__main__":
    raise SystemExit(main())
