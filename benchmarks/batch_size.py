"""The largest batch that fits into a part of a device: FP32, BF16, BF16 with its loss as it is, and `memory='auto'`.

    python benchmarks/batch_size.py [--cases ...] [--gib N] [--out FILE]

Each arm is a process of its own: `find_batch_size` on the trainer, then two steps with what was found, which have to be
applied. `times` is over FP32, whose loss is as it is and whose max pools are PyTorch's. Models of images and their
batches are in channels_last in all arms, FP32's too. Batches are on the host, as a loader's are. On a CPU, whose memory
is not counted, --small tries the script; then numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case, bert_base_with_loss, decoder_1b, resnet50
from harness import Report, positive
from process import run_script
from torch import Tensor, nn

from deepseek_mp import MixedPrecisionTrainer, find_batch_size
from deepseek_mp.backends import default_device
from deepseek_mp.nn.nested import map_leaves

CASES: dict[str, Callable[..., Case]] = {
    "resnet50": resnet50,
    "bert-base": bert_base_with_loss,
    "decoder-1.3b": decoder_1b,
}
NEEDS = {"resnet50": "torchvision", "bert-base": "transformers"}
ARMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision_mode": "fp32", "fused_loss": False},
    "bf16": {"precision_mode": "bf16"},
    "bf16-plain-loss": {"precision_mode": "bf16", "fused_loss": False},
    "bf16-auto": {"precision_mode": "bf16", "memory": "auto"},
}
WITHOUT = {"resnet50": ("bf16-plain-loss",)}
"""Arms that would repeat another one: no head of a language model there."""
AT_LEAST = {"bf16": 2.0, "bf16-auto": 4.0}
"""How many times FP32's batch is asked for."""
STEPS = 2
SAMPLES = 8
"""Those that a batch repeats."""
SMALL_LIMIT = 16


def larger(batch: Any, size: int) -> Any:
    """A batch of so many samples, those of the given one again and again; images in channels_last stay so."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        samples = value[torch.arange(size, device=value.device) % len(value)]
        return samples.contiguous(memory_format=memory_format(value))

    return map_leaves(batch, leaf)


def memory_format(value: Tensor) -> torch.memory_format:
    """The one that the tensor has; a tensor that has several is contiguous."""
    last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def on_host(tree: Any) -> Any:
    """A batch of the first samples, on the host, its images in channels_last."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        samples = value[:SAMPLES].cpu()
        return samples.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else samples

    return map_leaves(tree, leaf)


def visit(name: str, arm: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """One arm, as plain JSON values."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        total = module.get_device_properties(device).total_memory
        module.set_per_process_memory_fraction(min(1.0, args.gib * 2**30 / total), device.index)
    case = CASES[name](device, small=args.small)
    model, batch = case.model(), on_host(case.batches[0])
    case.batches.clear()
    if case.images:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for pool in (module for module in model.modules() if arm == "fp32" and isinstance(module, nn.MaxPool2d)):
        # The trainer leaves alone what has a forward that somebody has put there.
        vars(pool)["forward"] = partial(nn.MaxPool2d.forward, pool)
    trainer = MixedPrecisionTrainer(
        model, loss_fn=case.loss_fn, optimizer=list(case.optimizers.values())[-1], device=device,
        progress=False, emulate=device.type == "cpu", **ARMS[arm],
    )  # fmt: skip
    limit = SMALL_LIMIT if device.type == "cpu" else None
    found = find_batch_size(trainer, partial(larger, batch), limit=limit)
    outcomes = [trainer.step(larger(batch, found.size)) for _ in range(STEPS)]
    applied = all(outcome.status == "applied" for outcome in outcomes)
    return {
        "size": found.size,
        "too_large": found.too_large,
        "as_it_was": found.as_it_was,
        "measures": list(found.measures),
        "taken": None if trainer.memory is None else list(trainer.memory.taken),
        "losses": [float(outcome.loss) for outcome in outcomes],
        "tried": [asdict(one) for one in found.tried],
        "check": "passed" if applied else "a step of that size was not applied",
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All arms of a case."""
    results: dict[str, dict[str, Any]] = {}
    passed = ["--cases", name, "--device", str(args.device), "--gib", str(args.gib), *["--small"] * args.small]
    for arm in args.arms or [arm for arm in ARMS if arm not in WITHOUT.get(name, ())]:
        results[arm] = run_script(Path(__file__), ["--child", arm, *passed], limit=args.limit, keep_caches=True)
        print(f"  {name} {arm}: {results[arm].get('size')} ({results[arm]['check']})", file=sys.stderr, flush=True)
    base = results.get("fp32", {}).get("size")
    for result in results.values():
        result["check"] = ": ".join([result["check"], *result.get("error", [])[-1:]])
    problems = [f"{arm}: {result['check']}" for arm, result in results.items() if result["check"] != "passed"]
    for arm, result in results.items():
        result["times"] = result["size"] / base if base and "size" in result else None
        wanted = AT_LEAST.get(arm)
        if wanted and result["times"] is not None and result["times"] < wanted and args.device.type != "cpu":
            problems.append(f"{arm}: {result['times']:.2f} times FP32's batch, {wanted:g} asked")
    return {"gib": args.gib, "arms": results, "check": "; ".join(problems) or "passed"}


def rows(report: Report) -> list[tuple[str, ...]]:
    """The table of a report."""
    found: list[tuple[str, ...]] = [("case", "arm", "batch", "times", "with", "check")]
    for name, case in report.cases.items():
        for arm, result in case.get("arms", {}).items():
            times = "-" if result.get("times") is None else f"{result['times']:.2f}"
            used = ", ".join(result.get("measures", ()))
            found.append((name, arm, str(result.get("size", "-")), times, used, result["check"]))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: those that the case has")
    parser.add_argument("--gib", type=positive, default=32, help="of the device's memory (default %(default)s)")
    parser.add_argument("--limit", type=positive, default=300, help="seconds for one arm (default %(default)s)")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=list(ARMS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    names = args.cases or [n for n in CASES if n not in NEEDS or importlib.util.find_spec(NEEDS[n]) is not None]
    if args.child:
        logging.basicConfig(format="%(relativeCreated)d ms: %(message)s")
        logging.getLogger("deepseek_mp.trials").setLevel(logging.INFO)
        print(json.dumps(visit(names[0], args.child, args.device, args)), flush=True)
        return 0
    report = Report("batch-size", args.device, vars(args))
    for name in names:
        report.run(name, partial(measure, name, args))
        report.write(args.out)
    return report.finish(args.out, rows(report))


if __name__ == "__main__":
    raise SystemExit(main())
