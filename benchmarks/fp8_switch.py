"""How long a change of recipe of a whole model takes between two steps: `fp8.py --switch`.

A trainer trains a decoder in bf16. Its model is converted to an FP8 recipe, back, and to that recipe again, with a few
steps after each conversion. A switch costs what the conversion and the step after it take; that step is shown beside
the median of the steps that follow. From the second switch on, both plans have run before: nothing may be compiled any
more, and the whole must be over within a second. What is compiled, is compiled block by block.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fp8_entrant import CASES, SEED, Entrant
from fp8_process import in_process
from harness import Report, Spread
from torch._dynamo.utils import counters

from deepseek_mp import MixedPrecisionTrainer, PrecisionPlan
from deepseek_mp.backends import synchronize
from deepseek_mp.precision import RECIPES

CASE = "decoder-1.3b"
START = "bf16"
CONTENDERS = ("ours-block", "ours-block-compiled", "ours-delayed", "ours-delayed-compiled")
WARMUP, STEPS = 3, 5
"""Steps before the first stay in a plan, and those of a stay whose median counts."""
MOST_SECONDS = 1.0


def chosen(names: Sequence[str] | None) -> list[Entrant]:
    """The contenders asked for; `ValueError` for one whose recipe is no FP8 recipe of ours."""
    found = [Entrant.parse(name) for name in dict.fromkeys(CONTENDERS if names in (None, ["all"]) else names)]
    for entrant in found:
        if entrant.side != "ours" or entrant.recipe not in RECIPES or RECIPES[entrant.recipe].is_plain:
            raise ValueError(f"{entrant.name!r} is nothing to switch to; give for example {', '.join(CONTENDERS)}")
    return found


def measure(args: argparse.Namespace) -> int:
    """Each contender in a process of its own, written after each; 1 if a demand was missed or something failed."""
    report = Report("fp8-switch", args.device, {**vars(args), "regional": True})
    for entrant in chosen(args.contenders):
        result = in_process(["--switch", "--child", entrant.name], args)
        report.cases[entrant.name] = result
        print(f"{CASE} {entrant.name}: {result['check']}, took {result['seconds']} s", file=sys.stderr, flush=True)
        report.write(args.out)
    return report.finish(args.out, _rows(report.cases))


def main(entrant: Entrant, device: torch.device, *, small: bool) -> None:
    """One contender: run it and print the line of JSON."""
    print(json.dumps(run(entrant, device, small=small), default=vars), flush=True)


def run(entrant: Entrant, device: torch.device, *, small: bool) -> dict[str, Any]:
    """Train, switch and switch back; the result is plain JSON values."""
    training = _Training(entrant, device, small=small)
    start = training.stay(warmup=WARMUP)
    switches = [training.switch(to) for to in (entrant.recipe, START, entrant.recipe)]
    for number, switch in enumerate(switches):
        switch["outcome"] = _outcome(switch, small=small) if number else "the first time"
    problems = [f"to {s['to']}: {s['outcome']}" for s in switches[1:] if s["outcome"] != "met"]
    problems += ["void: a step was not applied"] * (None in training.losses)
    return {
        "case": CASE,
        "start": {"plan": START, **start},
        "switches": switches,
        "losses": training.losses,
        "check": "; ".join(problems) or "passed",
    }


def _outcome(switch: Mapping[str, Any], *, small: bool) -> str:
    """Of a switch to a plan that has run before; tiny sizes are not judged by their time."""
    if switch["compilations"]:
        return f"missed: {switch['compilations']} compilations"
    late = not small and switch["in_all_s"] > MOST_SECONDS
    return f"missed: more than {MOST_SECONDS:g} s" if late else "met"


class _Training:
    """A trainer on the case, and its steps by the clock."""

    def __init__(self, entrant: Entrant, device: torch.device, *, small: bool) -> None:
        torch.manual_seed(SEED)
        case = CASES[CASE](device, small=small)
        self.device = device
        self.trainer = MixedPrecisionTrainer(
            case.model(), START, loss_fn=case.loss_fn, optimizer=list(case.optimizers.values())[-1], device=device,
            compile="regional" if entrant.compiled else False, emulate=device.type == "cpu", progress=False,
        )  # fmt: skip
        self.batches = itertools.cycle(case.batches)
        self.losses: list[float | None] = []

    def switch(self, recipe: str) -> dict[str, Any]:
        """Change the plan between two steps, and stay there for some."""
        before, start = _compilations(), time.perf_counter()
        plan = self.trainer.change_plan(recipe)
        synchronize(self.device)
        apply_s, first_step_s = time.perf_counter() - start, self.step()
        return {
            "to": recipe,
            "apply_s": round(apply_s, 4),
            "first_step_s": round(first_step_s, 4),
            "in_all_s": round(apply_s + first_step_s, 4),
            **self.stay(),
            "compilations": _compilations() - before,
            "layers": _layers(plan),
        }

    def stay(self, warmup: int = 0) -> dict[str, Any]:
        """Steps in the plan in force, and how many compilations they needed."""
        before = _compilations()
        for _ in range(warmup):
            self.step()
        times = [1e3 * self.step() for _ in range(STEPS)]
        return {"step_ms": Spread.of(times), "compilations": _compilations() - before}

    def step(self) -> float:
        """Seconds of one step, to its end on the device."""
        start = time.perf_counter()
        result = self.trainer.step(next(self.batches))
        self.trainer.settle()
        synchronize(self.device)
        elapsed = time.perf_counter() - start
        self.losses.append(result.loss if result.status == "applied" else None)
        return elapsed


def _compilations() -> int:
    """Graphs that were compiled so far in this process."""
    return int(counters["stats"]["unique_graphs"])


def _layers(plan: PrecisionPlan) -> dict[str, int]:
    """How many layers run in which recipe: whether the switch took place."""
    return dict(Counter(decision.new for decision in plan.decisions if decision.layer))


def _rows(cases: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table: a line per switch."""
    heading = ("contender", "switch to", "apply s", "first step s", "in all s", "median ms", "compilations", "outcome")
    rows: list[tuple[str, ...]] = [heading]
    for name, case in cases.items():
        for switch in case.get("switches", ()):
            seconds = [f"{switch[key]:.3f}" for key in ("apply_s", "first_step_s", "in_all_s")]
            times = str(Spread(**switch["step_ms"]))
            rows.append((name, switch["to"], *seconds, times, str(switch["compilations"]), switch["outcome"]))
    return rows
