"""FP8 training against bf16 and torchao, each contender in a process of its own.

    python benchmarks/fp8.py --case decoder-8b-slice [--contenders bf16 ours-block ... | all]
    python benchmarks/fp8.py --kernels
    python benchmarks/fp8.py --switch [--contenders ours-block ours-delayed-compiled ...]
    python benchmarks/fp8.py --fusions [--recipes delayed block] [--contenders no-sharing ... | all]

A contender is bf16, torchao-RECIPE, ours-RECIPE or auto, each also with -compiled (torch.compile of the
whole model, its repeated blocks with --regional; of ours the loss too, of the others with -compiled-loss).
bf16 in eager mode always runs: its losses are what the others' are compared with, and a timing whose losses
differ is void. The file is written after every contender. Compilers start with empty caches unless
--keep-caches is given. `--kernels` measures the casts and products themselves, and from their rates the
shortest time that each decoder's step can take. `--switch` measures how long a change of recipe of a whole model
takes between two steps, `--fusions` what each fusion of compiled FP8 code buys.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fp8_entrant
import fp8_fusions
import fp8_kernels
import fp8_switch
import torch
from fp8_entrant import Entrant
from fp8_process import in_process
from fp8_targets import CONTESTS, REFERENCE, Contest, check_losses, judge, number
from harness import RESULTS, Report, Spread, positive, print_table

from deepseek_mp.backends import default_device


def main() -> int:
    args = _arguments()
    if args.child:
        child(args)
        return 0
    if args.switch:
        return fp8_switch.measure(args)
    if args.fusions:
        return fp8_fusions.measure(args)
    if args.kernels:
        places = [args.out.parent] if args.out else []
        report = fp8_kernels.measure(args.device, vars(args), small=args.small, results=[*places, RESULTS])
        return report.finish(args.out, fp8_kernels.rows(report))
    return contest(args)


def child(args: argparse.Namespace) -> None:
    """What runs in a process of its own: one contender."""
    if args.switch:
        fp8_switch.main(Entrant.parse(args.child), args.device, small=args.small)
    elif args.fusions:
        fp8_fusions.main(args.child, args.recipes[0], args.device, small=args.small, regional=args.regional)
    else:
        entrant = Entrant.parse(args.child)
        fp8_entrant.main(args.case, entrant, args.device, small=args.small, regional=args.regional)


def contest(args: argparse.Namespace) -> int:
    """Run a case's contenders one after the other, writing after each; 1 if something was void or missed."""
    task = CONTESTS[args.case]
    report = Report(f"fp8-{args.case}", args.device, vars(args))
    results: dict[str, dict[str, Any]] = {}
    for entrant in chosen(task, args.contenders):
        found = in_process(["--case", args.case, "--child", entrant.name], args)
        results[entrant.name] = _checked(found, results.get(REFERENCE))
        print(f"{args.case} {entrant.name}: {_line(results[entrant.name])}", file=sys.stderr, flush=True)
        report.cases[args.case] = _summary(task, results, small=args.small)
        report.write(args.out)
    outcomes = report.cases[args.case]["targets"]
    if outcomes:
        print_table([("target", "contender", "value", "outcome"), *_target_rows(outcomes)])
    return report.finish(args.out, _rows(results))


def chosen(task: Contest, names: Sequence[str] | None) -> list[Entrant]:
    """The contenders asked for, bf16 in eager mode first; `ValueError` for a name that is none."""
    wanted = (*task.contenders, *task.more) if names == ["all"] else names or task.contenders
    return [Entrant.parse(name) for name in dict.fromkeys((REFERENCE, *wanted))]


def _checked(result: dict[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
    """The result with `check`: whether its timing counts."""
    if "check" in result:  # it has no losses
        return result
    against = result["losses"] if reference is None else reference.get("losses")
    if against is None:
        return {**result, "check": f"void: {REFERENCE} did not run, so nothing to compare the losses with"}
    check, worst = check_losses(result["losses"], against)
    return {**result, "check": check, "largest_loss_difference": worst}


def _summary(task: Contest, results: Mapping[str, dict[str, Any]], *, small: bool) -> dict[str, Any]:
    """The case as it is written: contenders, targets, and 'passed' or what is wrong."""
    outcomes = [] if small else [judge(target, results) for target in task.targets]
    problems = [
        f"{name}: {result['check']}"
        for name, result in results.items()
        if result["check"] != "passed" and not _left_out(name, result)
    ]
    problems += [f"{o['outcome']}: {o['what']}" for o in outcomes if o["outcome"] != "met"]
    return {"contenders": dict(results), "targets": outcomes, "check": "; ".join(problems) or "passed"}


def _left_out(name: str, result: Mapping[str, Any]) -> bool:
    """Whether it is torchao that is not installed: the row says so, and the demands that need it are not met."""
    return result["check"] == "not installed" and Entrant.parse(name).side == "torchao"


def _rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table of contenders; ratios are to bf16 in eager mode."""
    rows: list[tuple[str, ...]] = [
        ("contender", "ms", "bf16/ms", "peak GiB", "J/step", "first step s", "warm-up s", "loss", "check")
    ]
    base = number(results[REFERENCE], "step_ms")
    for name, result in results.items():
        if "step_ms" not in result:
            rows.append((name, *["-"] * 7, result["check"]))
            continue
        speedup = "-" if base is None else f"{base / result['step_ms']['median']:.3f}"
        shown = [_shown(result[key]) for key in ("peak_gib", "joules_per_step", "first_step_s", "warmup_s")]
        rows.append(
            (name, str(Spread(**result["step_ms"])), speedup, *shown, _shown(result["final_loss"], 4), _note(result))
        )
    return rows


def _note(result: Mapping[str, Any]) -> str:
    worst = result.get("largest_loss_difference")
    check: str = result["check"]
    return check + (f", losses within {100 * worst:.3f} %" if worst else "")


def _target_rows(outcomes: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [(o["what"], o["contender"] or "-", _shown(o["value"], 3), o["outcome"]) for o in outcomes]


def _shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _line(result: Mapping[str, Any]) -> str:
    time_ms = f"{Spread(**result['step_ms'])} ms, " if "step_ms" in result else ""
    return f"{time_ms}{_note(result)}, took {result['seconds']} s"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kernels", action="store_true", help="measure casts and products instead of a case")
    what.add_argument("--switch", action="store_true", help="measure changes of recipe between steps")
    what.add_argument("--fusions", action="store_true", help="measure compiled code without each of its fusions")
    what.add_argument("--case", choices=list(CONTESTS), help="the model to train")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="default: the case's own; all: every one")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="of --fusions (default: delayed)")
    parser.add_argument("--regional", action="store_true", help="compile repeated blocks, for all contenders alike")
    parser.add_argument("--keep-caches", action="store_true", help="compilers use the caches of this machine")
    parser.add_argument("--limit", type=positive, default=240, help="seconds for one contender (default %(default)s)")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="file to write (default: benchmarks/results/fp8-CASE-DEVICE.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        _check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    """`ValueError` for arguments that do not go together, before anything runs."""
    if args.switch:
        fp8_switch.chosen(args.contenders)
    elif args.fusions:
        fp8_fusions.check(args)
    elif args.case:
        chosen(CONTESTS[args.case], args.contenders)


if __name__ == "__main__":
    raise SystemExit(main())
