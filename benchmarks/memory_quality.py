"""What trainings come to under the arms of the memory benchmark: loss curves, and loss and quality on unseen data.

`memory.py --quality` runs it. The detector trains on scenes, ResNet-50 tells the direction of gratings, a GPT reads
Python. Arms of one seed train from the same weights on the same batches. How far an arm may be from fp32 is told by the
nudged arms, which differ from their own by the last bits of the first weights only, and by the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import Case as TrainingCase
from cases import adamw, cross_entropy, seeded, sgd_fused
from harness import Report
from memory_arms import OURS, Arm, Loop, Setting, make_loop
from python_text import text
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.workloads.data import Pair, TextWindows
from deepseek_mp.workloads.detection_loss import detection_loss
from deepseek_mp.workloads.detections import detect, mean_average_precision
from deepseek_mp.workloads.detector import TINY_DETECTOR, Detector, DetectorConfig
from deepseek_mp.workloads.gpt import ByteGPT, GPTConfig, next_byte_loss
from deepseek_mp.workloads.gratings import CLASSES, Gratings
from deepseek_mp.workloads.scenes import TINY_SCENES, SceneConfig, Scenes

BASE = "bf16"
"""The arm that others are compared with."""
ARMS = ("fp32", "fp32-nudged", "bf16", "bf16-nudged", *OURS)
WINDOW = 25
"""Steps that are averaged for a point of the curve."""
WARM_UP = 0.05
"""Of the steps, in which the learning rate rises; in the last fifth it falls to 0."""
UNSEEN = 10**6
"""Added to the seed of what is not trained on."""
BEFORE = 10**5
"""Added to the seed of what a model begins with."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, images to train it on, and what it is judged by."""

    model: Callable[[], nn.Module]
    optimizer: Callable[[Any], Optimizer]
    loss_fn: Callable[[Any, Any], Tensor]
    data: Callable[..., Iterable[Pair]]
    """Batches on a `device`, `count` of them from a `seed`."""
    steps: int
    judged_on: int
    """Batches of unseen images."""
    judge: Callable[[list[Any], list[Tensor]], float]
    """From outputs and targets of all batches to a number, larger is better."""
    least: float
    """What has learned reaches more."""
    begun: int
    """Steps in BF16 before, the same for all arms of a seed: when a model leaves its first plateaus is chance, which
    would decide by how much arms differ."""
    images: bool = True


def detector_task(*, small: bool) -> Task:
    """The detector on scenes of 320 x 320, judged by mAP at an overlap of 0.5."""
    config = TINY_DETECTOR if small else DetectorConfig()
    scenes = TINY_SCENES if small else SceneConfig(side=320, objects=8, smallest=0.07)
    return Task(
        model=lambda: Detector(config),
        optimizer=lambda parameters: _with_rate(adamw(parameters), 3e-3 if small else 1e-3),
        loss_fn=detection_loss,
        data=partial(Scenes, scenes, batch_size=4 if small else 32),
        steps=10 if small else 1000,
        judged_on=1 if small else 16,
        judge=_mean_average_precision,
        least=0.0 if small else 0.5,
        begun=0,
    )


def resnet_task(*, small: bool) -> Task:
    """ResNet-50 on gratings of 128 x 128, judged by the accuracy of their classes."""
    import torchvision

    return Task(
        model=lambda: torchvision.models.resnet50(num_classes=CLASSES),
        optimizer=lambda parameters: _with_rate(sgd_fused(parameters), 0.05),
        loss_fn=cross_entropy,
        data=partial(Gratings, side=64 if small else 128, batch_size=4 if small else 128),
        steps=4 if small else 500,
        judged_on=1 if small else 16,
        judge=_accuracy,
        least=0.0 if small else 0.5,
        begun=4 if small else 400,
    )


def gpt_task(*, small: bool) -> Task:
    """A GPT of 8 blocks 1024 wide on 16 x 512 bytes of Python, judged by how many bytes it foretells."""
    whole = text(2**20 if small else 48 * 2**20)
    length = 32 if small else 512
    config = GPTConfig(width=32, layers=2, context=length) if small else GPTConfig(
        width=1024, heads=8, layers=8, context=length
    )  # fmt: skip
    return Task(
        model=lambda: ByteGPT(config),
        optimizer=lambda parameters: _with_rate(adamw(parameters), 3e-4),
        loss_fn=next_byte_loss,
        data=partial(_windows, whole, length=length, batch_size=2 if small else 16),
        steps=4 if small else 1000,
        judged_on=1 if small else 32,
        judge=_accuracy,
        least=0.0 if small else 0.5,
        begun=4 if small else 500,
        images=False,
    )


def _windows(
    whole: Tensor, *, count: int, seed: int, device: torch.device, length: int, batch_size: int
) -> Iterator[Pair]:
    """Of the last thirtieth for seeds of unseen data, else of what is before."""
    cut = len(whole) - len(whole) // 30
    part = whole[cut:] if seed >= UNSEEN else whole[:cut]
    for inputs, targets in TextWindows(part, count=count, seed=seed, length=length, batch_size=batch_size):
        yield inputs.to(device), targets.to(device)


TASKS: dict[str, Callable[..., Task]] = {"detector": detector_task, "resnet50": resnet_task, "gpt": gpt_task}


def _mean_average_precision(outputs: list[Any], targets: list[Tensor]) -> float:
    found = [detections for output in outputs for detections in detect(output)]
    return mean_average_precision(found, [rows for target in targets for rows in target])[0]


def _accuracy(outputs: list[Any], targets: list[Tensor]) -> float:
    right = [(output.argmax(dim=-1) == target).float().mean() for output, target in zip(outputs, targets, strict=True)]
    return float(torch.stack(right).mean())


def _with_rate(optimizer: Optimizer, rate: float) -> Optimizer:
    """The optimizer with another learning rate than the benchmarks of time use."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def train(task: Task, arm: Arm, seed: int, steps: int, device: torch.device) -> dict[str, Any]:
    """One training from its first weights; losses, and the judgement of what it did not train on."""

    def batches(of: int, count: int) -> Iterator[Pair]:
        return iter(task.data(count=count, seed=of, device=device))

    def rate(number: int) -> float:
        return min(1.0, (number + 1) / (WARM_UP * steps), (steps - number) / (0.2 * steps))

    model = seeded(task.model, device, seed=seed)
    if task.begun:
        model = partial(_begun, task, model, batches(seed + BEFORE, task.begun))
    setting = Setting(
        case=TrainingCase(model=model, batches=[], loss_fn=task.loss_fn, optimizers={}, images=task.images),
        optimizer=task.optimizer,
        device=device,
        batches=lambda: batches(seed, steps),
        schedule=partial(_schedule, rate=rate),
    )
    loop = make_loop(arm, setting)
    with loop.settings():
        outcomes = [loop.step() for _ in range(steps)]
        losses = [loop.loss(outcome) for outcome in outcomes]
        quality, unseen_loss = _judged(task, loop, batches(seed + UNSEEN, task.judged_on))
    curve = [statistics.mean(losses[start : start + WINDOW]) for start in range(0, steps, WINDOW)]
    problems = [] if all(map(math.isfinite, losses)) else ["a loss is not finite, or a step was not applied"]
    if not quality >= task.least:
        problems.append(f"it has not learned: {quality:.3f} is below {task.least}")
    return {
        "curve": [round(loss, 5) if math.isfinite(loss) else None for loss in curve],
        "final_loss": curve[-1] if math.isfinite(curve[-1]) else None,
        "unseen_loss": unseen_loss,
        "quality": quality,
        "steps": steps,
        **loop.about(),
        "check": "; ".join(problems) or "passed",
    }


def _schedule(optimizer: Optimizer, rate: Callable[[int], float]) -> LRScheduler:
    return LambdaLR(optimizer, rate)


def _begun(task: Task, make: Callable[[], nn.Module], batches: Iterator[Pair]) -> nn.Module:
    """The model after its first steps, by plain PyTorch: the same bits for every arm."""
    model = make()
    optimizer = task.optimizer(model.parameters())
    for number, (inputs, targets) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (number + 1) / (0.2 * task.begun)) * optimizer.defaults["lr"]
        with torch.autocast(inputs.device.type, torch.bfloat16):
            loss = task.loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def _judged(task: Task, loop: Loop, unseen: Iterator[Pair]) -> tuple[float, float]:
    """The task's number, and the mean loss of the outputs in FP32."""
    pairs = [(map_leaves(loop.predict(inputs), _in_fp32), target) for inputs, target in unseen]
    losses = [float(task.loss_fn(output, target)) for output, target in pairs]
    return task.judge([output for output, _ in pairs], [target for _, target in pairs]), statistics.mean(losses)


def _in_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(names: Sequence[str], allowed: Sequence[str]) -> None:
    """`ValueError` for a case that is not among those allowed, with --quality or without."""
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"cases {', '.join(unknown)}. Allowed here: {', '.join(allowed)}. Use one of these")


def main(args: argparse.Namespace, names: Sequence[str], arms: Sequence[Arm]) -> int:
    """Train the arms of each task at each seed in turn, write after each, and print what came out."""
    report = Report("memory-quality", args.device, {k: v for k, v in vars(args).items() if k != "chosen"})
    if args.merge:
        report.cases.update(json.loads(args.merge.read_text(encoding="utf-8"))["cases"])
    for name, seed, arm in itertools.product(names, range(args.seeds), arms):
        task = TASKS[name](small=args.small)
        steps = args.steps or task.steps
        report.run(f"{name} {arm.name} seed {seed}", partial(train, task, arm, seed, steps, args.device))
        report.write(args.out)
    return report.finish(args.out, rows(report))


def rows(report: Report) -> list[tuple[str, ...]]:
    """For each arm of each task its losses and judgements by seed, and the losses against fp32's."""
    found: list[tuple[str, ...]] = [("task", "arm", "final loss", "unseen loss", f"% over {BASE}'s", "mAP or accuracy")]
    arms: dict[tuple[str, str], dict[str, Any]] = {}
    for name, case in report.cases.items():
        task, arm, _, seed = name.split()
        arms.setdefault((task, arm), {})[seed] = case
    for (task, arm), cases in arms.items():
        base = arms.get((task, BASE), {})
        final, unseen = ([case.get(key) for case in cases.values()] for key in ("final_loss", "unseen_loss"))
        gaps = [_gap(case.get("unseen_loss"), base.get(seed, {}).get("unseen_loss")) for seed, case in cases.items()]
        qualities = [case.get("quality") for case in cases.values()]
        losses = (_list(final, "{:.4f}"), _list(unseen, "{:.4f}"))
        found.append((task, arm, *losses, _list(gaps, "{:+.2f}"), _list(qualities, "{:.3f}")))
    return found


def _gap(loss: float | None, base: float | None) -> float | None:
    """Percent that a loss is above another."""
    return None if loss is None or not base else 100 * (loss / base - 1)


def _list(values: list[float | None], form: str) -> str:
    return ", ".join("-" if value is None else form.format(value) for value in values)
