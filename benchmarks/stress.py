"""Which precision policies survive trainings that are made hard for low precision, and by how much FP32 is better.

    python benchmarks/stress.py [--cases ...] [--policies ...] [--seeds N] [--calm] [--size large] [--out FILE]

Seven scenarios (`deepseek_mp/workloads/stress_scenarios.py`), each under every policy from the same weights on the
same batches as FP32. Formats that the device has no units for are emulated: this is about loss, not about time. A
scenario passes if it breaks the policy that it is meant to break at every seed, and FP32 stays finite and near to
itself from weights that differ in their last bits. With `--calm` the stress is left out, and passed means that no
policy but pure BF16 breaks.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Report, positive

from deepseek_mp.backends import default_device
from deepseek_mp.records.lines import to_plain
from deepseek_mp.workloads.stress_policies import POLICIES
from deepseek_mp.workloads.stress_runs import Outcome, run
from deepseek_mp.workloads.stress_scenarios import LARGE, SCENARIOS, SMALL

SIZES = {"small": SMALL, "large": LARGE}
REPEAT = "fp32_nudged"
KEPT = ("seed", "reference", "gap", "own_gap", "gave_up", "skipped", "steps", "lowered")
NEAR = 0.003
"""How far FP32 may be from itself, relative to its loss."""


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One scenario under all policies, at all seeds."""
    scenario = SCENARIOS[name](SIZES[args.size], calm=args.calm)
    found = {}
    for policy in args.policies:
        outcomes = [run(scenario, policy, seed, device=args.device) for seed in range(args.seeds)]
        found[policy] = {**summed_up(outcomes), "runs": [_numbers(outcome) for outcome in outcomes]}
        print(f"  {policy}: {_cell(found[policy])}", file=sys.stderr, flush=True)
    return {
        "stresses": scenario.stresses,
        "steps": scenario.steps,
        "meant_to_break": scenario.breaks,
        "policies": found,
        "check": _check(found, None if args.calm else scenario.breaks),
    }


def summed_up(outcomes: list[Outcome]) -> dict[str, Any]:
    """Medians over the seeds; losses that are no numbers count as larger than any."""
    own = statistics.median(outcome.own_gap if outcome.finite else math.inf for outcome in outcomes)
    return {
        "gap": statistics.median(outcome.gap for outcome in outcomes),
        "own_gap": to_plain(own, "own_gap"),
        "widest_gap": max(abs(outcome.gap) for outcome in outcomes),
        "lowered": round(statistics.mean(outcome.lowered for outcome in outcomes), 4),
        "finite": sum(outcome.finite for outcome in outcomes),
        "broken": sum(outcome.broken for outcome in outcomes),
        "seeds": len(outcomes),
    }


def _numbers(outcome: Outcome) -> dict[str, Any]:
    """What a table may need of an outcome; of its decisions only those that were made while training ran."""
    values = outcome.to_json()
    kept = {key: values[key] for key in KEPT}
    return {**kept, "decisions": [decision for decision in values["decisions"] if decision["step"]]}


def _check(found: dict[str, dict[str, Any]], meant: str | None) -> str:
    problems = []
    if REPEAT in found and (found[REPEAT]["finite"] < found[REPEAT]["seeds"] or found[REPEAT]["widest_gap"] > NEAR):
        problems.append(f"FP32 is {100 * found[REPEAT]['widest_gap']:.2f} % from itself")
    if meant is not None and meant in found and found[meant]["broken"] < found[meant]["seeds"]:
        problems.append(f"{meant} breaks at {found[meant]['broken']} of {found[meant]['seeds']} seeds")
    if meant is None:
        problems += [
            f"{name} breaks without stress" for name, of in found.items() if of["broken"] and "pure" not in name
        ]
    return "; ".join(problems) or "passed"


def _cell(summary: dict[str, Any]) -> str:
    """Gap in FP32 and in the policy's own precision, and how many seeds broke."""
    broken = f", broken {summary['broken']}/{summary['seeds']}" if summary["broken"] else ""
    if summary["finite"] < summary["seeds"]:
        return f"not finite{broken}"
    return f"{100 * summary['gap']:+.2f} / {100 * summary['own_gap']:+.2f} %{broken}"


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="CASE")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--seeds", type=positive, default=3, help="of weights and order (default %(default)s)")
    parser.add_argument("--calm", action="store_true", help="leave the stress out")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of models and batches")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file to write (default: benchmarks/results/NAME-DEVICE.json)")
    return parser.parse_args()


def main() -> int:
    warnings.simplefilter("ignore")
    logging.getLogger("deepseek_mp").setLevel(logging.ERROR)  # skipped steps are what is counted here
    args = arguments()
    name = "stress-calm" if args.calm else "stress"
    report = Report(name, args.device, vars(args))
    rows = [("case", *args.policies, "check")]
    for case in args.cases:
        report.run(case, partial(measure, case, args))
        result = report.cases[case]
        cells = [_cell(result["policies"][policy]) if "policies" in result else "-" for policy in args.policies]
        rows.append((case, *cells, result["check"]))
    return report.finish(args.out, rows)


if __name__ == "__main__":
    raise SystemExit(main())
