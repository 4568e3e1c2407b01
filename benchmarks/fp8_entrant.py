"""One contender of the FP8 benchmark, in a process of its own: trains a case and prints one line of JSON.

`fp8.py` starts it. Every contender trains from the same weights on the same batches: a few steps to
warm up, then the timed ones. The losses of all steps are kept, so that a fast step that computes
something else does not count.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from cases import Case, OptimizerFactory, bert_base, decoder_1b, decoder_8b_slice, resnet50
from harness import Spread, laps
from peers import HandLoop, Mode
from torch._dynamo.utils import counters

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.backends import energy_joules, peak_memory_bytes, reset_peak_memory, synchronize
from deepseek_mp.precision import PrecisionPlan

CASES: dict[str, Callable[..., Case]] = {
    "decoder-8b-slice": decoder_8b_slice,
    "decoder-1.3b": decoder_1b,
    "bert-base": bert_base,
    "resnet50": resnet50,
}
TORCHAO = {"tensor": "tensorwise", "row": "rowwise", "row_gw_hp": "rowwise_with_gw_hp"}
"""Our names of the recipes, and torchao's."""
NAME = re.compile(r"(?:(?P<side>ours|torchao)-)?(?P<recipe>\w+?)(?P<compiled>-compiled(?P<loss>-loss)?)?")
PACKAGES = ("torch", "torchao", "triton", "transformers", "torchvision", "nvidia-ml-py")
WARMUP, TIMED = 5, 10
SEED = 0
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A contender by its name: bf16, torchao-tensor, ours-block or auto, each also with -compiled.

    The others' loss is compiled with -compiled-loss; ours is compiled along with the model.
    """

    name: str
    side: str
    """'ours', 'torchao', or 'torch' for PyTorch alone."""
    recipe: str
    compiled: bool
    compiled_loss: bool = False

    @classmethod
    def parse(cls, name: str) -> Entrant:
        """`ValueError` for a name that is none."""
        found = NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} is no contender; give for example bf16, torchao-tensor-compiled or ours-block")
        recipe = found["recipe"]
        side = found["side"] or ("ours" if recipe == "auto" else "torch")
        known = {"torch": ("fp32", "tf32", "bf16", "fp16"), "torchao": tuple(TORCHAO)}.get(side)
        if known is not None and recipe not in known:
            raise ValueError(f"{name!r} is no contender: after {side!r} comes one of {', '.join(known)}")
        if side == "ours" and found["loss"]:
            raise ValueError(f"{name!r} is no contender: ours compiles its loss with the model; leave out -loss")
        return cls(
            name=name,
            side=side,
            recipe=recipe,
            compiled=found["compiled"] is not None,
            compiled_loss=found["loss"] is not None,
        )


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What is timed: `step()` trains on the next batch, `loss` reads what it returned."""

    step: Callable[[], Any]
    loss: Callable[[Any], float]
    settings: Callable[[], AbstractContextManager[object]]
    about: Callable[[], dict[str, Any]]
    """What is known after the steps: formats chosen, steps skipped."""


def make_loop(
    entrant: Entrant, case: Case, optimizer: OptimizerFactory, device: torch.device, *, regional: bool
) -> Loop:
    """The contender's loop, ready for its first step."""
    compile: bool | Literal["regional"] = ("regional" if regional else True) if entrant.compiled else False
    if entrant.side == "ours":
        return _our_loop(entrant, case, optimizer, device, compile)
    mode = Mode(format="bf16" if entrant.side == "torchao" else entrant.recipe, channels_last=case.images)
    mode = replace(
        mode,
        compile=compile,
        compile_loss=entrant.compiled_loss,
        float8=TORCHAO[entrant.recipe] if entrant.side == "torchao" else "",
    )
    loop = HandLoop(case, mode, optimizer, device)
    return Loop(step=loop.step, loss=float, settings=loop.flags, about=lambda: {"mode": mode.name})


def _our_loop(
    entrant: Entrant,
    case: Case,
    optimizer: OptimizerFactory,
    device: torch.device,
    compile: bool | Literal["regional"],
) -> Loop:
    plan: str | PrecisionPlan = "auto"
    if entrant.recipe != "auto":
        layout: Literal["channels_last", "contiguous"] = "channels_last" if case.images else "contiguous"
        plan = replace(PrecisionPlan.of(entrant.recipe), memory_format=layout)
    trainer = MixedPrecisionTrainer(
        case.model(), plan, loss_fn=case.loss_fn, optimizer=optimizer, device=device, compile=compile,
        emulate=plan != "auto" and device.type == "cpu", progress=False,
    )  # fmt: skip
    batches = itertools.cycle(case.batches)
    return Loop(
        step=lambda: trainer.step(next(batches)),
        loss=lambda result: float("nan") if result.status != "applied" else result.loss,
        settings=nullcontext,
        about=lambda: _plan_facts(trainer.plan),
    )


def _plan_facts(plan: PrecisionPlan) -> dict[str, Any]:
    """The plan in short: what whole-model decisions say, and how many layers run in what for which reason."""
    layers = Counter(f"{d.new} ({d.reason.value})" for d in plan.decisions if d.layer)
    return {
        "mode": plan.base.name,
        "memory_format": plan.memory_format,
        "decisions": [d.to_json() for d in plan.decisions if not d.layer],
        "layers": dict(layers),
    }


def run(case_name: str, entrant: Entrant, device: torch.device, *, small: bool, regional: bool) -> dict[str, Any]:
    """Train one contender; the result is plain JSON values."""
    torch.manual_seed(SEED)
    case = CASES[case_name](device, small=small)
    optimizer_name, optimizer = list(case.optimizers.items())[-1]  # fused, which is the fastest on GPUs
    synchronize(device)
    start = time.perf_counter()
    loop = make_loop(entrant, case, optimizer, device, regional=regional)
    outcomes: list[Any] = []

    def step() -> None:
        torch.manual_seed(len(outcomes))  # all draw the same dropout masks, where they draw them alike
        outcomes.append(loop.step())

    with loop.settings():
        synchronize(device)
        built = time.perf_counter()
        step()
        synchronize(device)
        first = time.perf_counter()
        for _ in range(WARMUP - 1):
            step()
        synchronize(device)
        warm = time.perf_counter()
        timed = _timed(step, device)
        losses = [_finite(loop.loss(outcome)) for outcome in outcomes]
    return {
        **timed,
        "build_s": round(built - start, 2),
        "first_step_s": round(first - built, 2),
        "warmup_s": round(warm - built, 2),
        "losses": losses,
        "final_loss": losses[-1],
        "optimizer": optimizer_name,
        **loop.about(),
        "compiled_graphs": counters["stats"].get("unique_graphs", 0),
        "graph_breaks": sum(counters["graph_break"].values()),
        "bf16_product_tflops": _product_tflops(device),
        "packages": _versions(),
    }


def _finite(loss: float) -> float | None:
    """None instead of NaN or an infinity, which JSON does not have."""
    return loss if math.isfinite(loss) else None


def _timed(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """The timed steps: time, peak memory and energy of each."""
    warmup_peak = peak_memory_bytes(device)
    reset_peak_memory(device)
    synchronize(device)
    before = energy_joules(device)
    times = laps(step, device, TIMED)
    after = energy_joules(device)
    peak = peak_memory_bytes(device)
    return {
        "step_ms": Spread.of(times),
        "steps_ms": [round(value, 3) for value in times],
        "peak_gib": None if peak is None else round(peak / GIB, 3),
        "warmup_peak_gib": None if warmup_peak is None else round(warmup_peak / GIB, 3),
        "joules_per_step": None if before is None or after is None else round((after - before) / TIMED, 2),
    }


def _product_tflops(device: torch.device) -> float | None:
    """The rate of one large bf16 product after the steps: whether all contenders met the same machine."""
    if device.type == "cpu":
        return None
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    laps(lambda: left @ right, device, 5)
    return round(2 * size**3 / statistics.median(laps(lambda: left @ right, device, 10)) / 1e9, 1)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(case_name: str, entrant: Entrant, device: torch.device, *, small: bool, regional: bool) -> None:
    """Run and print the line; torchao that is not there is an answer, all else is left to raise."""
    try:
        result = run(case_name, entrant, device, small=small, regional=regional)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("torchao", "torchvision", "transformers"):
            raise
        result = {"check": "not installed", "error": str(error)}
    print(json.dumps(result, default=vars), flush=True)
