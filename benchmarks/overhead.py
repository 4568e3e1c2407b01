"""What `trainer.step` costs over a hand-written loop with autocast and GradScaler.

    python benchmarks/overhead.py [--cases ...] [--rounds N] [--out FILE]

Both loops train the same model from the same weights on the same batches, in turn in one process. In
the same run their losses are compared, and on a device that can tell, the host's waits for it are
counted: the trainer must add none.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import Case, bert_base, demo_gpt, resnet50
from harness import Contender, Report, Spread, agree, arguments, interleave, ratio
from peers import SAFE_SCALE, HandLoop, Mode, fastest_optimizer
from torch import Tensor

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.backends import synchronize
from deepseek_mp.controller.loss_scale import DynamicLossScale
from deepseek_mp.precision import RECIPES, PrecisionPlan


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model, the mode both loops train it in, and the overhead that is allowed."""

    build: Callable[..., Case]
    mode: Mode
    allowed: float
    steps: int
    """Steps in a block."""


CPU = {
    "gpt-fp32": Pair(build=demo_gpt, mode=Mode(format="fp32"), allowed=0.02, steps=2),
    "gpt-bf16": Pair(build=demo_gpt, mode=Mode(format="bf16"), allowed=0.02, steps=4),
}
GPU = {
    "resnet50-bf16": Pair(build=resnet50, mode=Mode(format="bf16", channels_last=True), allowed=0.01, steps=10),
    "resnet50-fp16": Pair(build=resnet50, mode=Mode(format="fp16", channels_last=True), allowed=0.01, steps=10),
    "bert-base-bf16": Pair(build=bert_base, mode=Mode(format="bf16"), allowed=0.01, steps=8),
}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
WARMUP = 6
COMPARED = 3
SYNC_STEPS = 4


class TrainerLoop:
    """The trainer on the same terms as `HandLoop`: `step` trains on the next batch."""

    def __init__(self, case: Case, mode: Mode, optimizer: Callable[..., Any], device: torch.device) -> None:
        self.trainer = MixedPrecisionTrainer(
            case.model(),
            PrecisionPlan(
                base=RECIPES[mode.format], memory_format="channels_last" if mode.channels_last else "contiguous"
            ),
            loss_fn=case.loss_fn,
            optimizer=optimizer,
            loss_scale_policy=DynamicLossScale(SAFE_SCALE),  # as HandLoop: neither loop skips a step
            device=device,
            progress=False,
        )
        self.batches = itertools.cycle(case.batches)

    def step(self) -> Any:
        return self.trainer.step(next(self.batches))


def measure(pair: Pair, device: torch.device, args: Any) -> dict[str, Any]:
    """One case: losses compared, waits counted, then timed in turn."""
    mode, case = pair.mode, pair.build(device, small=args.small)
    optimizer_name, optimizer = fastest_optimizer(case, device)
    hand = HandLoop(case, mode, optimizer, device)
    ours = TrainerLoop(case, mode, optimizer, device)
    with hand.flags():
        losses = compare_losses(ours, hand, device)
        waits = count_waits(ours, hand, device)
        contenders = {"trainer": Contender(call=ours.step), "hand": Contender(call=hand.step)}
        times = interleave(contenders, device, rounds=args.rounds, steps=args.steps or pair.steps)
        final, final_hand = ours.step().loss, float(hand.step())
    over = ratio(times, "trainer", "hand")
    equal = all(agree(a, b, TOLERANCE[mode.format]) for a, b in losses) and math.isfinite(final + final_hand)
    problems = []
    if not equal:
        problems.append("the losses of the two loops differ, or one is not finite")
    if waits is not None and waits["trainer"] > 0:
        problems.append(f"the trainer waits for the device {waits['trainer']} times a step")
    if over.median > 1 + pair.allowed:
        problems.append(f"overhead {100 * (over.median - 1):.2f} % is above {100 * pair.allowed:.0f} %")
    return {
        "mode": mode.name,
        "optimizer": optimizer_name,
        "trainer_ms": Spread.of(times["trainer"]),
        "hand_ms": Spread.of(times["hand"]),
        "ratio": over,
        "allowed_ratio": 1 + pair.allowed,
        "losses": [{"trainer": a, "hand": b} for a, b in losses],
        "final_loss": {"trainer": final, "hand": final_hand},
        "host_waits_per_step": waits,
        "check": "; ".join(problems) or "passed",
    }


def compare_losses(ours: TrainerLoop, hand: HandLoop, device: torch.device) -> list[tuple[float, float]]:
    """The first losses of both loops, as (trainer, hand); then both are warmed up.

    Later losses drift apart where the order of sums differs, as two runs of one loop do.
    """
    pairs = []
    for seed in range(COMPARED):
        torch.manual_seed(seed)  # both draw the same dropout masks
        loss = ours.step().loss
        torch.manual_seed(seed)
        pairs.append((loss, float(hand.step())))
    for _ in range(WARMUP):
        hand.step()
        ours.step()
    synchronize(device)
    return pairs


def count_waits(ours: TrainerLoop, hand: HandLoop, device: torch.device) -> dict[str, float] | None:
    """Times per step that the host waits for the device, for each loop; None where nobody can tell.

    The trainer's steps run in the mode in which a wait is an error; if the model itself waits in
    forward or backward, in the mode that warns, and the model's own waits are taken off.
    """
    if device.type == "cpu" or not hasattr(torch.get_device_module(device), "set_sync_debug_mode"):
        return None
    module: Any = torch.get_device_module(device)
    own = _warned_waits(module, hand.gradients)
    hand.optimizer.zero_grad(set_to_none=True)
    bare = _warned_waits(module, hand.step)
    if own > 0:
        return {"trainer": _warned_waits(module, ours.step) - own, "hand": bare - own, "model": own}
    module.set_sync_debug_mode("error")
    try:
        for _ in range(SYNC_STEPS):
            ours.step()
    finally:
        module.set_sync_debug_mode("default")
    return {"trainer": 0.0, "hand": bare, "model": 0.0}


def _warned_waits(module: Any, step: Callable[[], Tensor | Any]) -> float:
    module.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(SYNC_STEPS):
                step()
    finally:
        module.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen) / SYNC_STEPS


def main() -> int:
    args = arguments(__doc__ or "", [*CPU, *GPU])
    device: torch.device = args.device
    table = CPU if device.type == "cpu" else GPU
    report = Report("overhead", device, vars(args))
    for name in args.cases or table:
        pair = (CPU | GPU)[name]
        report.run(name, partial(measure, pair, device, args))
    rows = [("case", "trainer ms", "hand ms", "ratio", "waits/step", "check")]
    for name, case in report.cases.items():
        waits = case.get("host_waits_per_step")
        cells = [Spread(**case[key]) if key in case else "-" for key in ("trainer_ms", "hand_ms", "ratio")]
        rows.append((name, *map(str, cells), "-" if waits is None else str(waits["trainer"]), case["check"]))
    return report.finish(args.out, rows)


if __name__ == "__main__":
    raise SystemExit(main())
