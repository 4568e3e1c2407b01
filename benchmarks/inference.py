"""Latency, energy and memory of models served: this package's forms beside PyTorch's own ways and torchao's.

    python benchmarks/inference.py [--cases ...] [--seconds S] [--energy-seconds S] [--limit S] [--out FILE]
    python benchmarks/inference.py --small --device cpu --no-compile     # to try the script; the numbers mean nothing

A case is a process of its own, in which all arms are built and then called in turn, round by round, every other round
in reverse. `ms` is a call as whoever waits for it sees it, with an idle device before and after; `queued_ms` is that of
calls issued one behind the other. `error` is the divergence of the outputs' softmax from that of the reference (FP32,
BF16 where that does not fit) in nats; outputs that are not finite, or far from it, void an arm. Energy is the device's
own counter over a window of calls, whole and less what it draws idle: that of the arms that a target compares, with
--energy-all of all.

Arms that a case has no time left for are given up, which is said; --limit gives each case more. All cases together take
eight minutes at most with the limits that they have, most of it compilation.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Report, Spread, laps, positive, print_table
from inference_arms import Arm, Builder
from inference_cases import CASES, Case
from inference_targets import TARGETS, contenders, judge, ours, passed
from process import run_script
from torch import Tensor, nn

from deepseek_mp.backends import default_device, synchronize
from deepseek_mp.costs.memory import distinct_bytes
from deepseek_mp.inference import Latency, energy, kl, relative
from deepseek_mp.inference.fidelity import is_finite

SAFE = 0.95
"""Of a case's time, that it plans with."""
LEAST_S = 2.0
"""Below that nothing more is built."""
MOST_KL = 0.05
"""Nats from the reference, beyond which outputs are another model's and a time says nothing."""
START_S = 30
"""Of a process, until its own clock runs."""
QUEUED = 10
"""Calls one behind the other."""
WARM = 3

Call = Callable[[], Any]


def visit(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process; after each stage what is known is in the file that the parent reads."""
    started, case = time.perf_counter(), CASES[name]
    torch.manual_seed(0)
    model, inputs = case.make(args.device, args.small)
    builder = Builder(model, inputs, args.device)
    result: dict[str, Any] = {"arms": {}, "check": "failed: stopped while arms were built"}
    calls: dict[str, Call] = {}
    reference: Any = None
    arms = arms_of(case, compile=args.compile)
    until = started + SAFE * args.limit - reserve(name, len(arms), args)
    for arm in arms:
        left = until - time.perf_counter()
        found, call, outputs = built(builder, arm, reference, left, args)
        if call is not None:
            calls[arm.name] = call
            if reference is None:
                reference, result["reference"] = outputs, arm.name
        result["arms"][arm.name] = found
        print(f"  {name} {arm.name}: {found['check']} ({found['build_s']} s)", file=sys.stderr, flush=True)
        save(result, args)
        gc.collect()  # what an arm that failed left behind, out of memory above all
    if builder.card is not None:
        result["card"] = builder.card.to_json()
    del reference
    time_all(calls, result["arms"], args)
    result["check"] = "failed: stopped while energy was measured"
    save(result, args)
    end = started + SAFE * args.limit
    measure_energy(
        calls, list(result["arms"]) if args.energy_all else contenders(name, result["arms"]), result, args, end
    )
    result["check"] = verdict(result["arms"])
    return result


def reserve(name: str, count: int, args: argparse.Namespace) -> float:
    """Seconds for what comes when so many arms are built: timing, and the energy of those that targets compare."""
    compared = {target.peers for target in TARGETS[name] if target.metric != "ms"}
    windows = count if args.energy_all else len(compared) + bool(compared)
    return 1.5 * float(args.seconds) * count + 1.4 * float(args.energy_seconds) * windows


def arms_of(case: Case, *, compile: bool) -> list[Arm]:
    return [arm for arm in case.arms if compile or not arm.needs_compiler]


def built(
    builder: Builder, arm: Arm, reference: Tensor | None, left: float, args: argparse.Namespace
) -> tuple[dict[str, Any], Call | None, Any]:
    """The arm, warm, with its outputs; or why it cannot be used. Without a reference it is one itself."""
    found: dict[str, Any] = {"check": "passed", "build_s": 0.0}
    if left < LEAST_S:
        return {**found, "check": "not built: no time left"}, None, None
    start = time.perf_counter()
    try:
        with at_most(left):
            call, model = builder.build(arm, compile=args.compile, formats=args.formats, seconds=args.seconds / 2)
            for _ in range(WARM):
                outputs = call()
            synchronize(args.device)
            found["weight_mib"] = weight_mib(model)
            if not is_finite(outputs):
                return {**found, "check": "void: its outputs are not finite"}, None, None
            outputs = outputs.clone()
            expected = outputs if reference is None else reference
            found |= {"error": kl(outputs, expected), "relative_error": relative(outputs, expected)}
            if not found["error"] <= MOST_KL:
                return {**found, "check": f"void: {found['error']:.2g} nats from the reference"}, None, None
    except (Exception, Late) as error:  # noqa: BLE001 - whatever a peer or a form raises is its answer
        found["check"] = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
        return {**found, "build_s": round(time.perf_counter() - start, 1)}, None, None
    return {**found, "build_s": round(time.perf_counter() - start, 1)}, call, outputs


def weight_mib(model: nn.Module) -> float:
    """Of what a checkpoint would hold: caches of keys and values are no part of it."""
    return round(distinct_bytes(part for kept in model.state_dict().values() for part in parts(kept)) / 2**20, 1)


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor of a class of its own is made of, as torchao's."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from parts(getattr(tensor, name))


class Late(BaseException):
    """An arm took longer to build than the case has left."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises `Late` in the code inside when it takes longer."""

    def late(*_: object) -> None:
        raise Late(f"given up after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def time_all(calls: Mapping[str, Call], arms: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Adds the times of those that run, in turn."""
    samples: dict[str, list[list[float]]] = {name: [] for name in calls}
    queued: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(args.rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            calls[name]()  # the first after another's finds their memory in the cache
            samples[name].append(waited(calls[name], args.device, args.seconds / args.rounds))
            queued[name].append(statistics.median(laps(calls[name], args.device, QUEUED)))
    for name, rounds in samples.items():
        whole = [ms for taken in rounds for ms in taken]
        arms[name] |= {
            "ms": vars(Spread.of(whole)),
            "p95_ms": round(Latency.of(whole).p95_ms, 4),
            "calls": len(whole),
            "round_ms": [round(statistics.median(taken), 4) for taken in rounds],
            "queued_ms": vars(Spread.of(queued[name])),
        }


def waited(call: Call, device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of calls, each with an idle device before and after."""
    taken: list[float] = []
    started = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - started < seconds:
        synchronize(device)
        before = time.perf_counter()
        call()
        synchronize(device)
        taken.append(1e3 * (time.perf_counter() - before))
    return taken


def measure_energy(
    calls: Mapping[str, Call], names: Sequence[str], result: dict[str, Any], args: argparse.Namespace, end: float
) -> None:
    """Adds the joules of some arms, as far as there is time; what was measured is saved after each."""
    for name in names:
        if args.energy_seconds <= 0 or name not in calls:
            continue
        if time.perf_counter() + 1.3 * args.energy_seconds > end:
            result["arms"][name]["energy_check"] = "not measured: no time left"
            continue
        found = energy(calls[name], args.device, seconds=args.energy_seconds)
        result["arms"][name]["energy"] = None if found is None else found.to_json()
        save(result, args)


def verdict(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """'passed' where all of ours run; peers may be missing."""
    problems = [f"{name}: {arms[name]['check']}" for name in ours(arms) if not passed(arms[name])]
    return "; ".join(problems) or "passed"


def save(result: Mapping[str, Any], args: argparse.Namespace) -> None:
    if args.partial is not None:
        args.partial.write_text(json.dumps(result), encoding="utf-8")


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A case in a process of its own, and what came of its targets."""
    limit = args.limit or CASES[name].limit
    with tempfile.TemporaryDirectory() as folder:
        partial_file = Path(folder, "partial.json")
        passed_on = [
            *("--child", name, "--partial", str(partial_file), "--device", str(args.device)),
            *("--limit", str(limit), "--rounds", str(args.rounds), "--seconds", str(args.seconds)),
            *("--energy-seconds", str(args.energy_seconds), *["--energy-all"] * args.energy_all),
            *(*["--small"] * args.small, *["--no-compile"] * (not args.compile)),
        ]
        # Compilers keep their caches: how long they take is not what is measured.
        result = run_script(Path(__file__), passed_on, limit=limit + START_S, keep_caches=True)
        if "arms" not in result and partial_file.exists():
            result = {**json.loads(partial_file.read_text(encoding="utf-8")), **result}
    arms = result.setdefault("arms", {})
    result["targets"] = [judge(target, arms) for target in TARGETS[name]]
    for line in table(name, result):
        print("  " + "  ".join(line), file=sys.stderr)
    return result


def table(name: str, result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A line for each arm of a case."""
    for arm, found in result["arms"].items():
        spent = found.get("energy") or {}
        numbers = (
            "-" if "ms" not in found else str(Spread(**found["ms"])),
            _number(found.get("p95_ms")),
            _number((found.get("queued_ms") or {}).get("median")),
            _number(spent.get("joules")),
            _number(spent.get("above_idle_joules")),
            _number(found.get("weight_mib")),
            "-" if found.get("error") is None else f"{found['error']:.2g}",
        )
        yield (name, arm, *numbers, found["check"][:60])
    for trial in (result.get("card") or {}).get("trials", ()):
        latency = trial["latency"] or {}
        weights, error = trial["weight_bytes"] / 2**20 or None, trial["error"]
        row = (_number(latency.get("median_ms")), _number(latency.get("p95_ms")), "-", "-", "-", _number(weights))
        distance = "-" if error is None else f"{error:.2g}"
        yield (name, f"tried {trial['name']}", *row, distance, trial["why"][:80])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def rows(report: Report) -> list[tuple[str, ...]]:
    """All arms."""
    head = ("case", "arm", "ms", "p95", "queued ms", "J", "J above idle", "weights MiB", "KL", "check")
    return [head, *(line for name, case in report.cases.items() if "arms" in case for line in table(name, case))]


def demands(report: Report) -> list[tuple[str, ...]]:
    """What came of the targets."""
    return [("case", "target", "outcome", "value", "ours", "peer")] + [
        (name, found["what"], found["outcome"], _number(found["value"]), str(found["ours"]), str(found["peer"]))
        for name, case in report.cases.items()
        for found in case.get("targets", ())
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--rounds", type=positive, default=4, help="visits to each arm (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.6, help="of timing for each arm (default %(default)s)")
    parser.add_argument(
        "--energy-seconds", type=float, default=5.0, help="of its window; 0: none (default %(default)s)"
    )
    parser.add_argument("--energy-all", action="store_true", help="of all arms, not only those that a target compares")
    parser.add_argument("--limit", type=positive, help="seconds for each case (default: the case's own)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave compiled arms out")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script; the numbers mean nothing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--partial", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.formats = ("bf16",) if args.device.type == "cpu" else ("bf16", "fp16")
    return args


def installed(name: str) -> bool:
    return not CASES[name].needs or importlib.util.find_spec(CASES[name].needs) is not None


def main() -> int:
    args = arguments()
    if args.child:
        print(json.dumps(visit(args.child, args)), flush=True)
        os._exit(0)  # a compiler that was given up would be waited for
    report = Report("inference", args.device, vars(args))
    for name in args.cases or CASES:
        if installed(name):
            report.run(name, partial(measure, name, args))
            report.write(args.out)
        else:
            print(f"{name}: left out, {CASES[name].needs} is not installed", file=sys.stderr)
    print_table(demands(report))
    return report.finish(args.out, rows(report))


if __name__ == "__main__":
    raise SystemExit(main())
