"""Live precision in real training: a GPT on the text of installed Python packages, under several policies.

    python benchmarks/adaptive.py [--arms ...] [--steps N] [--seeds N] [--width N] [--layers N] [--out FILE]
    python benchmarks/adaptive.py --overhead

Arms of one seed train from the same weights on the same batches, one after the other in one process: TF32, BF16,
`nudged` (BF16 from weights that differ in their last bit: how far BF16 is from itself), FP8 in every layer that takes
it (`tensor`, `block`), `once` (BF16, layers allocated once after the warm-up and then left), `adaptive`, `random` and
`worst` (as large a share of the multiply-adds lowered as by `adaptive` in the mean, drawn at random, or what its last
readings hold for the worst), and `all` (all that it controls). Losses are means over fixed validation windows, of the
weights in BF16. Milliseconds are the median of the steps of the second half, without validation. With `--recipes`
layers are lowered to those, emulated where the device lacks them, and times mean nothing. `--overhead` gives the cost
of probes on the 1.3B decoder instead. `--merge` keeps the cases of an earlier run's file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import random
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import decoder_1b
from harness import Report, Spread, commit, positive
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from deepseek_mp import AdaptivePrecision, AdaptiveSettings, Callback, MixedPrecisionTrainer
from deepseek_mp.backends import default_device, energy_joules, peak_memory_bytes, reset_peak_memory, synchronize
from deepseek_mp.controller.height import parts_of
from deepseek_mp.precision import RECIPES, Recipe, Role
from deepseek_mp.precision.composite import with_roles
from deepseek_mp.precision.planning import NOISE_BUDGET, SMALL_LOSS
from deepseek_mp.sensitivity.prediction import Predictor
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.workloads.data import TextWindows
from deepseek_mp.workloads.gpt import ByteGPT, GPTConfig, byte_gpt, next_byte_loss
from deepseek_mp.workloads.stress_policies import nudge

ARMS = ("tf32", "bf16", "nudged", "tensor", "block", "once", "adaptive", "random", "worst", "all")
LOWER_AS_MANY = ("random", "worst", "all")
TEXT_BYTES = 48 * 2**20
LEARNING_RATE, WARM_UP, FLOOR = 3e-4, 100, 0.1
VALIDATION_WINDOWS = 16
MARGIN = 0.0025
"""Relative loss over BF16's within which an arm counts."""


def text(limit: int) -> Tensor:
    """The first `limit` bytes of the Python files of the standard library and of the installed packages."""
    found = bytearray()
    for folder in dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib")):
        for path in sorted(Path(folder).rglob("*.py")):
            found += path.read_bytes()
            if len(found) >= limit:
                return torch.frombuffer(found[:limit], dtype=torch.uint8)
    return torch.frombuffer(found, dtype=torch.uint8)


class Laps(Callback):
    """When each step was known to be done, on the host's clock."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_step(self, trainer: MixedPrecisionTrainer, facts: StepFacts) -> None:  # noqa: ARG002
        self.times.append(time.perf_counter())
        self.losses.append(facts.loss)

    def milliseconds(self) -> list[float]:
        """Of the steps of the second half."""
        half = self.times[len(self.times) // 2 :]
        return [1e3 * (b - a) for a, b in itertools.pairwise(half)]


def schedule(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to a tenth."""

    def factor(step: int) -> float:
        if step < WARM_UP:
            return (step + 1) / WARM_UP
        done = min(1.0, (step - WARM_UP) / max(1, steps - WARM_UP))
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def warm_up(args: argparse.Namespace) -> int:
    return min(200, int(args.steps) // 5)


def settings(args: argparse.Namespace, *, once: bool) -> AdaptiveSettings:
    return AdaptiveSettings(
        warm_up=warm_up(args),
        decide_every=10**9 if once else None,
        recipes=tuple(args.recipes or ()) or None,
        loss_budget=args.loss_budget,
        noise_budget=args.noise_budget,
        by_role=args.by_role,
    )


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """How much live precision had lowered, for the arms that lower as much without its choice."""

    recipe: str = "block"
    share: float = 0.0
    """Of the multiply-adds of all that it controlled, in the mean over the steps after the warm-up."""
    macs: dict[str, float] = field(default_factory=dict)
    """Multiply-adds of one product of every layer that it controlled."""
    costs: dict[str, float] = field(default_factory=dict)
    """By layer, or by product where it decided by product (`head fprop`): the larger share of the two budgets that the
    recipe was predicted to take, in its last reading."""

    @classmethod
    def by(cls, live: AdaptivePrecision, share: float) -> Lowered:
        controller = live.controller
        recipes = {parts_of(decision.new)[0] for decision in live.decisions} - {"bf16", "fp32", "tf32"}
        if controller is None or not recipes:
            return cls()
        recipe, own = min(recipes), live.settings
        predictor = Predictor(controller.readings, controller.loss, curvature=controller.curvature)
        costs: dict[str, float] = {}
        for name in controller.readings:
            loss = predictor.loss(name, RECIPES[recipe]) / own.loss_budget
            noise = {role: predictor.noise(name, RECIPES[recipe], role) / own.noise_budget for role in Role}
            if own.by_role:
                costs |= {f"{name} {role}": max(noise[role], loss * (role is Role.FPROP)) for role in Role}
            else:
                costs[name] = max(loss, sum(noise.values()))
        macs = {name: unit.macs for name, unit in controller.units.items()}
        return cls(recipe=recipe, share=share, macs=macs, costs=costs)

    def others(self, how: str, seed: int) -> dict[str, Recipe]:
        """Recipes of layers that make up the same share, drawn at random or the costliest first."""
        parts = sorted(self.costs)
        random.Random(seed).shuffle(parts)
        if how == "worst":
            parts.sort(key=lambda part: -self.costs[part])
        size = {part: self.macs[part.split()[0]] for part in parts}
        left = math.inf if how == "all" else self.share * sum(size.values())
        chosen: dict[str, list[Role]] = {}
        for part in parts:
            if size[part] <= left * (1 + 1e-9):
                name, *role = part.split()
                chosen.setdefault(name, []).extend(map(Role, role or Role))
                left -= size[part]
        return {name: with_roles(RECIPES[self.recipe], roles, RECIPES["bf16"]) for name, roles in chosen.items()}


class Once(Callback):
    """Lowers the layers given after as many steps as live precision waits."""

    def __init__(self, recipes: dict[str, Recipe], step: int) -> None:
        self.recipes, self.at = recipes, step

    def on_step_start(self, trainer: MixedPrecisionTrainer, batch: Any) -> None:  # noqa: ARG002
        if trainer.steps_attempted == self.at and self.recipes:
            trainer.settle()
            trainer.change_plan("bf16", pin=self.recipes)
            self.recipes = {}


class Share(Callback):
    """The share of multiply-adds that live precision had lowered, in the mean over its steps from `start` on."""

    def __init__(self, live: AdaptivePrecision, start: int) -> None:
        self.live, self.start, self.shares = live, start, list[float]()

    def on_step(self, trainer: MixedPrecisionTrainer, facts: StepFacts) -> None:  # noqa: ARG002
        controller = self.live.controller
        if controller is None or trainer.steps_attempted <= self.start:
            return
        now = {name: controller.states[name].recipe for name in controller.lowered}
        low = sum(controller.units[name].macs * len(parts_of(recipe)[1]) for name, recipe in now.items())
        self.shares.append(low / sum(unit.macs * len(Role) for unit in controller.units.values()))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.shares) if self.shares else 0.0


def arm(
    name: str,
    seed: int,
    args: argparse.Namespace,
    device: torch.device,
    data: dict[str, Tensor],
    lowered: dict[int, Lowered],
) -> dict[str, Any]:
    """One training: losses, times, memory, energy, and what became of the layers."""
    model: ByteGPT = byte_gpt(
        GPTConfig(width=args.width, heads=args.width // 128, layers=args.layers, context=args.length), seed=seed
    )
    windows = partial(TextWindows, batch_size=args.batch, length=args.length)
    live = AdaptivePrecision(settings(args, once=name == "once"))
    laps, share = Laps(), Share(live, warm_up(args))
    callbacks: list[Callback] = [laps, share]
    if name == "nudged":
        nudge(model)
    if name in ("once", "adaptive"):
        callbacks.append(live)
    if name in LOWER_AS_MANY:
        most = lowered.get(seed, Lowered())
        callbacks.append(Once(most.others(name, seed), warm_up(args)))
    trainer = MixedPrecisionTrainer(
        model,
        name if name in ("tf32", "tensor", "block") else "bf16",
        loss_fn=next_byte_loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True),
        scheduler=lambda optimizer: LambdaLR(optimizer, schedule(args.steps)),
        max_grad_norm=1.0,
        emulate=bool(args.recipes),
        device=device,
        compile=args.compile,
        seed=seed,
        callbacks=callbacks,
        progress=False,
    )
    reset_peak_memory(device)
    joules = energy_joules(device)
    started = time.perf_counter()
    trainer.fit(windows(data["train"], count=args.steps, seed=seed), epochs=1)
    synchronize(device)
    seconds = time.perf_counter() - started
    spent = energy_joules(device)
    validation = windows(data["validation"], count=VALIDATION_WINDOWS, seed=0, fixed=True)
    own = trainer.evaluate(validation)["loss"]
    if name == "adaptive":
        lowered[seed] = Lowered.by(live, share.mean)
    rules = {rule.pattern: rule.recipe.name for rule in trainer.plan.rules}
    if str(trainer.plan.base) != "bf16" or trainer.plan.rules:
        trainer.change_plan("bf16", pin={})
    loss = trainer.evaluate(validation)["loss"]
    return {
        "loss": loss,
        "own_loss": own,
        "ms": Spread.of(laps.milliseconds()),
        "seconds": seconds,
        "joules": None if spent is None or joules is None else spent - joules,
        "peak_gib": (peak_memory_bytes(device) or 0) / 2**30,
        "curve": [round(statistics.fmean(laps.losses[i : i + 50]), 5) for i in range(0, len(laps.losses), 50)],
        "lowered": rules,
        "share": share.mean,
        "allocation": asdict(lowered[seed]) if name == "adaptive" else None,
        "decisions": [_short(decision) for decision in live.decisions],
        "disabled": live.disabled,
        "probes": live.controller.probes if live.controller is not None else 0,
        "check": "passed" if math.isfinite(loss) else "void: not finite",
    }


def _short(decision: Any) -> dict[str, Any]:
    return {k: v for k, v in decision.to_json().items() if k != "role"}


def overhead(device: torch.device, small: bool) -> dict[str, Any]:
    """What live precision costs beside a step of the 1.3B decoder: a probe, a step whose statistics are sampled, and
    any other step, in which it looks at gradients and at the inputs of lowered layers (with all layers in `block`).
    """
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
    for number in range(9):
        for on in (True, False) if number % 2 else (False, True):
            trainer.callbacks = (live,) if on else ()
            if live.controller is not None:
                live._next_probe = 10**9 if number > 1 else 0  # noqa: SLF001 - one probe, and then none
                if not on:
                    live._look.close()  # noqa: SLF001
                    live.stop_watching(trainer)
            for _ in range(2):
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
    found = [["case", "loss", "own loss", "ms", "GiB", "layers lowered at the end"]]
    for name, value in report.cases.items():
        if value["check"] == "failed":
            continue
        if "loss" not in value:
            for part in ("probe", "statistics", "watched"):
                share = f"{value[f'{part}_share']:.3%} with one in {value[f'{part}_every']} steps"
                found.append(
                    [f"{name} {part}", spread(value[part]["step_ms"]), spread(value[part]["extra_ms"]), share, "", ""]
                )
            continue
        found.append(
            [
                name,
                f"{value['loss']:.5f}",
                f"{value['own_loss']:.5f}",
                spread(value["ms"]),
                f"{value['peak_gib']:.1f}",
                str(len(value["lowered"])),
            ]
        )
    return found


def spread(value: dict[str, float]) -> str:
    return str(Spread(**value))  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=[name for name in ARMS if name not in ("worst", "all")]
    )
    parser.add_argument("--overhead", action="store_true", help="measure what probes cost instead")
    for name, default in (
        ("steps", 1500),
        ("seeds", 3),
        ("width", 2048),
        ("layers", 6),
        ("length", 1024),
        ("batch", 16),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default)
    for name, budget in (("loss-budget", SMALL_LOSS), ("noise-budget", NOISE_BUDGET)):
        parser.add_argument(f"--{name}", type=float, default=budget, help="of live precision (default %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--by-role", action="store_true", help="decide on each product of a layer by itself")
    parser.add_argument("--recipes", nargs="+", choices=sorted(RECIPES), help="what may be lowered to, emulated")
    parser.add_argument("--merge", type=Path, help="a file of this benchmark whose cases are kept")
    parser.add_argument("--compile", choices=("regional",), default=False, help="compile the blocks in all arms")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = default_device()
    report = Report("adaptive-overhead" if args.overhead else "adaptive", device, vars(args))
    if args.overhead:
        report.run("decoder-1.3b", partial(overhead, device, args.small))
        return report.finish(args.out, rows(report))
    whole = text(2**21 if args.small else TEXT_BYTES)
    split = len(whole) - len(whole) // 20
    data = {"train": whole[:split], "validation": whole[split:]}
    lowered: dict[int, Lowered] = {}
    if args.merge:
        report.cases.update(json.loads(args.merge.read_text(encoding="utf-8"))["cases"])
        for name, value in report.cases.items():
            if value.get("allocation"):
                lowered[int(name.rpartition(" ")[2])] = Lowered(**value["allocation"])
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in args.arms:
            if name in ("tf32", "nudged") and seed:
                continue
            case = f"{name} seed {seed}"
            report.run(case, partial(arm, name, seed, args, device, data, lowered))
            report.cases[case]["commit"] = commit()
            report.write(args.out)  # what was measured outlives an end before time
            gc.collect()
    return report.finish(args.out, rows(report))


if __name__ == "__main__":
    raise SystemExit(main())
