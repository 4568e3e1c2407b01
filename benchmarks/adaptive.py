"""Live precision in real training: a GPT on the text of installed Python packages, under several policies.

    python benchmarks/adaptive.py [--arms ...] [--steps N] [--seeds N] [--width N] [--layers N] [--out FILE]

Arms of one seed train from the same weights on the same batches, one after the other in one process: TF32, BF16,
`nudged` (BF16 from weights that differ in their last bit: how far BF16 is from itself), FP8 in every layer that takes
it (`tensor`, `block`, `delayed`), `once` (BF16, layers allocated once after the warm-up and then left), `adaptive`,
`random` and `worst` (as large a share of the multiply-adds lowered as by `adaptive` in the mean, drawn at random, or
what its last readings hold for the worst), and `all` (all that it controls). Losses are means over fixed validation
windows, of the weights in BF16. Milliseconds are the median of the steps of the second half, without validation. With
`--recipes` layers are lowered to those, emulated where the device lacks them; then times mean nothing. `--merge` keeps
the cases of an earlier run's file. With `--shared N` the first N of the steps are in BF16 and one for all arms of a
seed: when a byte-level GPT leaves its first plateau is chance, which decides by how much BF16 differs from itself at
the end.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Report, Spread, commit, positive
from python_text import text
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from deepseek_mp import AdaptivePrecision, AdaptiveSettings, Callback, MixedPrecisionTrainer
from deepseek_mp.backends import default_device, energy_joules, peak_memory_bytes, reset_peak_memory, synchronize
from deepseek_mp.controller.height import parts_of
from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.precision import RECIPES, Recipe, Role
from deepseek_mp.precision.composite import with_roles
from deepseek_mp.precision.planning import NOISE_BUDGET, SMALL_LOSS
from deepseek_mp.sensitivity.prediction import Predictor
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.workloads.data import TextWindows
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss
from deepseek_mp.workloads.stress_policies import nudge

ARMS = ("tf32", "bf16", "nudged", "tensor", "block", "delayed", "once", "adaptive", "random", "worst", "all")
LOWER_AS_MANY = ("random", "worst", "all")
TEXT_BYTES = 48 * 2**20
LEARNING_RATE, WARM_UP, FLOOR = 3e-4, 100, 0.1
VALIDATION_WINDOWS = 16
MARGIN = 0.0025
"""Relative loss over BF16's within which an arm counts."""


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

    def mean(self) -> float:
        """Of the steps of the second half, with probes and compilations."""
        return statistics.fmean(self.milliseconds())


def schedule(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to a tenth."""

    def factor(step: int) -> float:
        if step < WARM_UP:
            return (step + 1) / WARM_UP
        done = min(1.0, (step - WARM_UP) / max(1, steps - WARM_UP))
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def warm_up(args: argparse.Namespace) -> int:
    """Steps after those that all arms share before layers are lowered."""
    return max(20, min(200, int(args.steps) // 5) - int(args.shared))


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the arms of a seed begin."""

    step: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def after(cls, trainer: MixedPrecisionTrainer, step: int) -> Start:
        """On the CPU, so that the device's memory stays that of an arm."""
        model, optimizer = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
        return cls(step=step, **map_leaves({"model": model, "optimizer": optimizer}, _to_cpu))

    def load(self, trainer: MixedPrecisionTrainer) -> None:
        if self.step:
            trainer.model.load_state_dict(self.model)
            trainer.optimizer.load_state_dict(copy.deepcopy(self.optimizer))  # which keeps what is on its device


def _to_cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


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
        recipe, own = (
            statistics.mode(parts_of(d.new)[0] for d in live.decisions if parts_of(d.new)[0] in recipes),
            live.settings,
        )
        predictor = Predictor(controller.readings, controller.loss, curvature=controller.curvature)
        costs: dict[str, float] = {}
        for name, reading in controller.readings.items():
            if recipe not in reading.effects:
                continue
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
        whole = sum(self.macs.values()) * (len(Role) if any(" " in part for part in parts) else 1)
        left = math.inf if how == "all" else self.share * whole
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


def trainer_of(
    mode: str,
    seed: int,
    args: argparse.Namespace,
    device: torch.device,
    done: int = 0,
    callbacks: Sequence[Callback] = (),
) -> MixedPrecisionTrainer:
    """Of a new model, whose learning rate goes on after `done` steps."""
    config = GPTConfig(width=args.width, heads=args.width // 128, layers=args.layers, context=args.length)
    factor = schedule(args.steps)
    return MixedPrecisionTrainer(
        byte_gpt(config, seed=seed),
        mode,
        loss_fn=next_byte_loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True),
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: factor(step + done)),
        max_grad_norm=1.0,
        emulate=bool(args.recipes),
        device=device,
        compile=args.compile,
        seed=seed,
        callbacks=callbacks,
        progress=False,
    )


def shared_start(seed: int, args: argparse.Namespace, device: torch.device, batches: TextWindows) -> Start:
    """After the steps that all arms of a seed share, in BF16."""
    if not args.shared:
        return Start()
    trainer = trainer_of("bf16", seed, args, device)
    trainer.fit(batches, epochs=1)
    trainer.settle()
    return Start.after(trainer, args.shared)


def arm(
    name: str,
    seed: int,
    args: argparse.Namespace,
    device: torch.device,
    data: dict[str, Tensor],
    lowered: dict[int, Lowered],
    starts: dict[int, Start],
) -> dict[str, Any]:
    """One training: losses, times, memory, energy, and what became of the layers."""
    windows = partial(TextWindows, batch_size=args.batch, length=args.length)
    if seed not in starts:
        starts[seed] = shared_start(seed, args, device, windows(data["train"], count=args.shared or 1, seed=seed))
    live = AdaptivePrecision(settings(args, once=name == "once"))
    laps, share = Laps(), Share(live, warm_up(args))
    callbacks: list[Callback] = [laps, share]
    if name in ("once", "adaptive"):
        callbacks.append(live)
    if name in LOWER_AS_MANY:
        most = lowered.get(seed, Lowered())
        callbacks.append(Once(most.others(name, seed), warm_up(args)))
    mode = name if name in ("tf32", "tensor", "block", "delayed") else "bf16"
    trainer = trainer_of(mode, seed, args, device, starts[seed].step, callbacks)
    starts[seed].load(trainer)
    if name == "nudged":
        nudge(trainer.model)
    reset_peak_memory(device)
    joules = energy_joules(device)
    started = time.perf_counter()
    trainer.fit(windows(data["train"], count=args.steps - args.shared, seed=seed + args.shared), epochs=1)
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
        "mean_ms": laps.mean(),
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


def rows(report: Report) -> list[list[str]]:
    found = [["case", "loss", "own loss", "ms", "GiB", "layers lowered at the end"]]
    for name, value in report.cases.items():
        if value["check"] == "failed":
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
        "--arms", nargs="+", choices=ARMS, default=[name for name in ARMS if name not in ("delayed", "worst", "all")]
    )
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
    parser.add_argument("--shared", type=int, default=0, help="steps in BF16 that all arms of a seed share")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--by-role", action="store_true", help="decide on each product of a layer by itself")
    parser.add_argument("--recipes", nargs="+", choices=sorted(RECIPES), help="what may be lowered to, emulated")
    parser.add_argument("--merge", type=Path, help="a file of this benchmark whose cases are kept")
    parser.add_argument("--compile", choices=("regional",), default=False, help="compile the blocks in all arms")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = default_device()
    report = Report("adaptive", device, vars(args))
    whole = text(2**21 if args.small else TEXT_BYTES)
    split = len(whole) - len(whole) // 20
    data = {"train": whole[:split], "validation": whole[split:]}
    lowered: dict[int, Lowered] = {}
    starts: dict[int, Start] = {}
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
            report.run(case, partial(arm, name, seed, args, device, data, lowered, starts))
            report.cases[case]["commit"] = commit()
            report.write(args.out)  # what was measured outlives an end before time
            gc.collect()
    return report.finish(args.out, rows(report))


if __name__ == "__main__":
    raise SystemExit(main())
