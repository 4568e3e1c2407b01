"""What each fusion of compiled FP8 code buys: `fp8.py --fusions`.

The step of a decoder, compiled with all fusions of `nn.joint_graph`, and with each left out in turn. Every variant
is compiled in a process of its own, from empty caches: two variants of one graph must never share compiled code.
A variant is a subclass of the pass, given to Inductor as a user gives one of his own. Casts are counted in the graph
as the variant leaves it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import fp8_entrant
import torch
from fp8_entrant import Entrant
from fp8_process import in_process
from fp8_targets import check_losses, number
from harness import Report, Spread
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor import config

from deepseek_mp.nn.graph_casts import MadeCast, casts_of
from deepseek_mp.nn.joint_graph import FuseProducers
from deepseek_mp.precision import RECIPES

CASE = "decoder-8b-slice"
REFERENCE = "all-on"
DEFAULT_RECIPES = ("delayed",)


class AllOn(FuseProducers):
    """The pass as it is; the variants change it."""

    def __init__(self) -> None:
        self.casts: Counter[str] = Counter()

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        self.count(graph)

    def uuid(self) -> Any:
        return super().uuid(), type(self).__name__

    def count(self, graph: fx.Graph) -> None:
        """Add the graph's casts by the names of their ops, and by the type of a tensor that is read as it is."""
        types = {cast.node: f" of {str(cast.x.meta['val'].dtype).removeprefix('torch.')}" for cast in casts_of(graph)}
        for node in graph.nodes:
            op = node.args[0] if node.target is auto_functionalized_v2 else node.target
            if getattr(op, "namespace", "") == "deepseek_mp" and op.__name__.startswith("quantise"):
                self.casts[op.__name__.partition(".")[0] + types.get(node, "")] += 1


class NoSharing(AllOn):
    """Layers that read one tensor cast it once each."""

    def share(self, graph: fx.Graph) -> None:
        pass


class NoActivations(AllOn):
    """Activations are stored, and casts read them."""

    def recognise(self, graph: fx.Graph) -> list[MadeCast]:
        backward = in_backward(graph)
        return [made for made in super().recognise(graph) if made.cast.node in backward]


class NoGradients(AllOn):
    """The gradients of activations are stored, and casts read them."""

    def recognise(self, graph: fx.Graph) -> list[MadeCast]:
        backward = in_backward(graph)
        return [made for made in super().recognise(graph) if made.cast.node not in backward]


class NoMerging(AllOn):
    """The two gradients of a gate are computed inside their casts, but by one kernel each."""

    def pair(self, made: Sequence[MadeCast]) -> list[tuple[MadeCast, MadeCast]]:
        del made  # each stays a call of its own
        return []


class Keeping(AllOn):
    """The transposed product of a gate is kept between forward and backward."""

    def make_again(self, pair: tuple[MadeCast, MadeCast], made: Sequence[MadeCast]) -> None:
        del pair, made


class NoNarrowing(AllOn):
    """What is computed in FP32 before a cast stays in FP32."""

    def narrow(self, graph: fx.Graph) -> None:
        pass


class AllOff(AllOn):
    """The graph stays as it was."""

    def __call__(self, graph: fx.Graph) -> None:
        self.count(graph)


VARIANTS: Mapping[str, type[AllOn]] = {
    REFERENCE: AllOn,
    "no-sharing": NoSharing,
    "no-activations": NoActivations,
    "no-gradients": NoGradients,
    "no-merging": NoMerging,
    "keeping": Keeping,
    "no-narrowing": NoNarrowing,
    "all-off": AllOff,
}


def in_backward(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a joint graph that are computed of the output's gradients, which it calls tangents."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and "tangents" in node.target
        if given or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def check(args: argparse.Namespace) -> None:
    """`ValueError` for arguments that make no sense here."""
    unknown = [name for name in args.contenders or () if name not in (*VARIANTS, "all")]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no variant; give some of {', '.join(VARIANTS)}")
    plain = [name for name in args.recipes or () if name not in RECIPES or RECIPES[name].is_plain]
    if plain:
        raise ValueError(f"{plain[0]!r} is no FP8 recipe; give for example delayed or block")
    if args.keep_caches:
        raise ValueError("--keep-caches with --fusions: every variant must be compiled anew; leave it out")


def measure(args: argparse.Namespace) -> int:
    """Each variant in a process of its own, written after each; 1 if one failed or has other losses."""
    report = Report("fp8-fusions", args.device, vars(args))
    wanted = VARIANTS if args.contenders in (None, ["all"]) else dict.fromkeys((REFERENCE, *args.contenders))
    for recipe in dict.fromkeys(args.recipes or DEFAULT_RECIPES):
        results: dict[str, dict[str, Any]] = {}
        for variant in wanted:
            found = in_process(["--fusions", "--recipes", recipe, "--child", variant], args)
            results[variant] = _compared(found, results.get(REFERENCE))
            print(f"{CASE} {recipe} {variant}: {_line(results[variant])}", file=sys.stderr, flush=True)
            problems = [f"{name}: {result['check']}" for name, result in results.items() if result["check"] != "passed"]
            report.cases[recipe] = {"case": CASE, "variants": results, "check": "; ".join(problems) or "passed"}
            report.write(args.out)
    return report.finish(args.out, _rows(report.cases))


def main(variant: str, recipe: str, device: torch.device, *, small: bool, regional: bool) -> None:
    """One variant: train with it and print the line of JSON."""
    fuse = VARIANTS[variant]()
    config.joint_custom_pre_pass = fuse  # the trainer leaves a pass of its caller in place of its own
    entrant = Entrant.parse(f"ours-{recipe}-compiled")
    result = fp8_entrant.run(CASE, entrant, device, small=small, regional=regional)
    print(json.dumps({**result, "casts": dict(fuse.casts)}, default=vars), flush=True)


def _compared(result: dict[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
    """The result with `check`, and what it has more than the pass with all fusions: the fusion bought that."""
    if "check" in result:  # it has no losses
        return result
    against = result if reference is None else reference
    if "losses" not in against:
        return {**result, "check": f"void: {REFERENCE} did not run, so nothing to compare with"}
    outcome, worst = check_losses(result["losses"], against["losses"], whose=REFERENCE)
    result = {**result, "check": outcome, "largest_loss_difference": worst}
    for key in ("step_ms", "peak_gib"):
        mine, base = number(result, key), number({**against, "check": "passed"}, key)
        result[f"more_{key}"] = None if mine is None or base is None else round(mine - base, 3)
    return result


def _line(result: Mapping[str, Any]) -> str:
    measured = f"{Spread(**result['step_ms'])} ms, " if "step_ms" in result else ""
    return f"{measured}{result['check']}, took {result['seconds']} s"


def _rows(cases: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table: a line per variant."""
    rows: list[tuple[str, ...]] = [
        ("recipe", "variant", "ms", "more ms", "peak GiB", "more GiB", "casts", "compile s", "check")
    ]
    for recipe, case in cases.items():
        for name, result in case["variants"].items():
            if "step_ms" not in result:
                rows.append((recipe, name, *["-"] * 6, result["check"]))
                continue
            keys = ("more_step_ms", "peak_gib", "more_peak_gib")
            more_ms, peak, more_gib = ("-" if result.get(key) is None else f"{result[key]:.2f}" for key in keys)
            counted, warmup = str(sum(result["casts"].values())), f"{result['warmup_s']:.0f}"
            times = str(Spread(**result["step_ms"]))
            rows.append((recipe, name, times, more_ms, peak, more_gib, counted, warmup, result["check"]))
    return rows
