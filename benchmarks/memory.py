"""Peak memory and step time of whole trainings, by arm; and with --quality, what the arms' trainings come to.

    python benchmarks/memory.py [--cases ...] [--arms ...] [--compile] [--rounds N] [--steps N] [--out FILE]
    python benchmarks/memory.py --quality [--cases ...] [--arms ...] [--seeds N] [--steps N] [--merge FILE]

Arms are fp32 and bf16 of PyTorch alone (autocast; images in channels_last) and the trainer under the options in
`memory_arms.py`; `--compile` adds a compiled one of each but fp32. All train from the same weights on the same
batches with the same optimizer, and the first losses must be close to those of the first arm. On an accelerator each
visit to an arm is a process of its own, so that its memory is its own; arms take turns, every other round in reverse.

Memory is counted twice: from building the model until it is warm (first steps, searches for algorithms, what `auto`
tries), and in warm steps. `peak` is of tensors, `reserved` what the allocator took from the device: tensors and gaps.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import memory_quality
import torch
from cases import Case, bert_base_with_loss, decoder_1b, detector, resnet50
from harness import Report, Spread, agree, laps, positive
from memory_arms import ARMS, Arm, Loop, Setting, make_loop
from peers import resident_tensors
from process import run_script
from torch import Tensor

from deepseek_mp.backends import (
    default_device,
    peak_memory_bytes,
    peak_reserved_bytes,
    reset_peak_memory,
    synchronize,
)
from deepseek_mp.costs import is_out_of_memory
from deepseek_mp.costs.memory import distinct_bytes, peak_during

CASES: dict[str, Callable[..., Case]] = {
    "resnet50": resnet50,
    "decoder-1.3b": decoder_1b,
    "bert-base": bert_base_with_loss,
    "detector": detector,
}
NEEDS = {"resnet50": "torchvision", "bert-base": "transformers"}
TOLERANCE = {"resnet50": 0.02, "decoder-1.3b": 0.01, "bert-base": 0.01, "detector": 0.05}
"""How far the first losses may be from those of the first arm, relative. The detector's places are chosen by rank."""
WARMUP, WATCHED, COMPARED = 4, 2, 3
"""Steps until warm, warm steps whose memory is watched, first steps whose losses are compared."""
MEMORY = ("peak_mib", "reserved_mib", "start_peak_mib", "start_reserved_mib", "resident_mib")


def visit(case_name: str, arm: Arm, device: torch.device, *, small: bool, steps: int) -> dict[str, Any]:
    """Train one arm for some steps; the result is plain JSON values. Running out of memory is an answer."""
    try:
        return _visit(case_name, arm, device, small=small, steps=steps)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"check": "failed: out of memory"}


def _visit(case_name: str, arm: Arm, device: torch.device, *, small: bool, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    case = CASES[case_name](device, small=small)
    optimizer_name, optimizer = list(case.optimizers.items())[-1]  # fused, which needs the least memory
    setting = Setting(case=case, optimizer=optimizer, device=device, batches=lambda: itertools.cycle(case.batches))
    synchronize(device)
    reset_peak_memory(device)
    loop = make_loop(arm, setting)
    outcomes: list[Any] = []

    def step() -> None:
        torch.manual_seed(len(outcomes))  # all draw the same dropout masks, where they draw them alike
        outcomes.append(loop.step())

    def watched() -> None:
        for _ in range(WATCHED):
            step()

    with loop.settings():
        for _ in range(WARMUP):
            step()
        synchronize(device)
        start: dict[str, float | None] = {"start_peak_mib": None, "start_reserved_mib": None}
        if device.type != "cpu":
            start = {"start_peak_mib": _mib(peak_memory_bytes(device)),
                     "start_reserved_mib": _mib(peak_reserved_bytes(device))}  # fmt: skip
            torch.get_device_module(device).empty_cache()
        peak = peak_during(watched, device, resident=_resident(loop, device))
        reserved = peak_reserved_bytes(device)
        times = laps(step, device, steps)
        losses = [loop.loss(outcome) for outcome in outcomes]
    return {
        "steps_ms": [round(value, 3) for value in times],
        "peak_mib": _mib(peak),
        "reserved_mib": _mib(reserved),
        **start,
        "resident_mib": _mib(distinct_bytes(_resident(loop, device))),
        "losses": [loss if math.isfinite(loss) else None for loss in losses],
        "optimizer": optimizer_name,
        **loop.about(),
        "check": "passed" if all(map(math.isfinite, losses)) else "void: a loss is not finite",
    }


def _resident(loop: Loop, device: torch.device) -> Iterator[Tensor]:
    """Parameters, buffers and optimizer states on the device; listed when asked for, so none is kept alive."""
    yield from (t for t in resident_tensors(loop.model, loop.optimizer) if t.device.type == device.type)


def _mib(count: int | None) -> float | None:
    return None if count is None else round(count / 2**20, 1)


def measure(case_name: str, arms: Sequence[Arm], args: argparse.Namespace) -> dict[str, Any]:
    """All arms of a case in turn, round by round; an arm that failed is not visited again."""
    visits: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for number in range(args.rounds):
        for arm in list(arms)[:: 1 if number % 2 == 0 else -1]:
            done = visits[arm.name]
            if done and "steps_ms" not in done[-1]:
                continue
            done.append(_visited(case_name, arm, args))
            print(f"  {case_name} {arm.name}: {_line(done[-1])}", file=sys.stderr, flush=True)
    results = {name: combined(done) for name, done in visits.items()}
    return {"arms": results, **compared(case_name, visits, results)}


def _visited(case_name: str, arm: Arm, args: argparse.Namespace) -> dict[str, Any]:
    """A visit, on an accelerator in a process of its own."""
    if args.device.type == "cpu":
        return visit(case_name, arm, args.device, small=args.small, steps=args.steps)
    passed = ["--child", arm.name, "--cases", case_name, "--device", str(args.device), "--steps", str(args.steps)]
    # Compilers keep their caches: it is memory that is measured here, not how long they take.
    return run_script(Path(__file__), [*passed, *["--small"] * args.small], limit=args.limit, keep_caches=True)


def combined(visits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One arm's visits as one: the largest of each peak, the spread of all steps, and the check that failed first."""
    last = dict(visits[-1])
    check = next((one["check"] for one in visits if one["check"] != "passed"), "passed")
    if any("steps_ms" not in one for one in visits):
        return {**last, "check": check}
    known = {key: [one[key] for one in visits if one[key] is not None] for key in MEMORY}
    peaks = {key: max(values, default=None) for key, values in known.items()}
    steps = [ms for one in visits for ms in one["steps_ms"]]
    return {"step_ms": Spread.of(steps), **peaks, **{k: v for k, v in last.items() if k not in (*MEMORY, "steps_ms")},
            "check": check}  # fmt: skip


def compared(
    case_name: str, visits: Mapping[str, Sequence[Mapping[str, Any]]], results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What each arm saves and costs against bf16; arms whose first losses are off become void, in place."""
    reference = next((name for name, result in results.items() if result["check"] == "passed"), None)
    problems = []
    for name, result in results.items():
        if result["check"] == "passed" and reference is not None:
            pairs = zip(result["losses"][:COMPARED], results[reference]["losses"][:COMPARED], strict=True)
            apart = [(a, b) for a, b in pairs if not agree(a, b, TOLERANCE[case_name])]
            if apart:
                result["check"] = f"void: a loss of {apart[0][0]:.4f}, where {reference} has {apart[0][1]:.4f}"
        if result["check"] != "passed":
            problems.append(f"{name}: {result['check']}")
    base = results.get("bf16", {})
    against = {}
    for name, result in results.items():
        if base.get("check") == result["check"] == "passed":
            rounds = zip(visits[name], visits["bf16"], strict=True)
            ratios = [statistics.median(a["steps_ms"]) / statistics.median(b["steps_ms"]) for a, b in rounds]
            memory = {key: _ratio(result[key], base[key]) for key in MEMORY}
            against[name] = {"step_ms": Spread.of(ratios), **memory}
    return {"over_bf16": against, "check": "; ".join(problems) or "passed"}


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else round(value / base, 4)


def _line(result: Mapping[str, Any]) -> str:
    if "steps_ms" not in result:
        return str(result["check"])
    memory = ", ".join(f"{key.removesuffix('_mib')} {result[key]}" for key in MEMORY)
    return f"{statistics.median(result['steps_ms']):.1f} ms; MiB: {memory}; {result['check']}"


def rows(report: Report) -> list[tuple[str, ...]]:
    """The table of a report: an arm of a case in each row."""
    found: list[tuple[str, ...]] = [
        ("case", "arm", "ms", "x bf16", "peak MiB", "x bf16", "reserved", "until warm", "resident", "check")
    ]
    for name, case in report.cases.items():
        for arm, result in case.get("arms", {}).items():
            if "step_ms" not in result:
                found.append((name, arm, *["-"] * 7, result["check"]))
                continue
            against = case["over_bf16"].get(arm)
            slower = f"{against['step_ms']['median']:.3f}" if against else "-"
            more = _shown(against["peak_mib"], 3) if against else "-"
            memory = [_shown(result[key]) for key in ("reserved_mib", "start_reserved_mib", "resident_mib")]
            ms = str(Spread(**result["step_ms"]))
            found.append((name, arm, ms, slower, _shown(result["peak_mib"]), more, *memory, result["check"]))
    return found


def _shown(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def chosen(args: argparse.Namespace) -> list[Arm]:
    """The arms asked for; `ValueError` for a name that is none."""
    arms = [Arm.parse(name) for name in args.arms or (memory_quality.ARMS if args.quality else ARMS)]
    if args.compile:
        arms += [Arm.parse(f"{arm.name}-compiled") for arm in arms if arm.name in ARMS and arm.base != "fp32"]
    return list(dict.fromkeys(arms))


def installed(cases: Sequence[str]) -> list[str]:
    """The cases whose packages are there; says which are left out."""
    missing = [name for name in cases if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    for name in missing:
        print(f"left out: {name} needs {NEEDS[name]}, which is not installed", file=sys.stderr)
    return [name for name in cases if name not in missing]


def arguments() -> argparse.Namespace:
    """The options of the command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = dict.fromkeys((*CASES, *memory_quality.TASKS))
    parser.add_argument("--cases", nargs="+", choices=list(known), metavar="CASE", help=f"some of: {', '.join(known)}")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"some of: {', '.join(ARMS)}; also with -compiled")
    parser.add_argument("--compile", action="store_true", help="a compiled arm beside each but fp32")
    parser.add_argument("--rounds", type=positive, help="visits to each arm (default 2, with --small 1)")
    parser.add_argument("--steps", type=positive, help="timed steps of a visit, or of a training with --quality")
    parser.add_argument("--quality", action="store_true", help="train, and compare what comes out")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings of each arm with --quality")
    parser.add_argument("--merge", type=Path, help="a file of --quality whose cases are kept")
    parser.add_argument("--limit", type=positive, default=240, help="seconds for one visit (default %(default)s)")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="file to write (default: benchmarks/results/NAME-DEVICE.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        args.chosen = chosen(args)
        allowed = memory_quality.TASKS if args.quality else CASES
        memory_quality.check(args.cases or (), list(allowed))
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    args = arguments()
    if args.quality:
        return memory_quality.main(args, args.cases or installed(list(memory_quality.TASKS)), args.chosen)
    args.steps, args.rounds = args.steps or (2 if args.small else 10), args.rounds or (1 if args.small else 2)
    if args.child:
        result = visit(args.cases[0], Arm.parse(args.child), args.device, small=args.small, steps=args.steps)
        print(json.dumps(result, default=str), flush=True)
        return 0
    report = Report("memory", args.device, {k: v for k, v in vars(args).items() if k != "chosen"})
    for name in args.cases or installed(list(CASES)):
        report.run(name, partial(measure, name, args.chosen, args))
        report.write(args.out)
    return report.finish(args.out, rows(report))


if __name__ == "__main__":
    raise SystemExit(main())
