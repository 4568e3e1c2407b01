"""INT8 on a CPU: how fast it is beside FP32, BF16 and torchao's own flow, and how much it loses after which training.

    python benchmarks/qat.py [--cases ...] [--threads N] [--seeds N] [--rounds N] [--merge FILE] [--out FILE]

Times: all arms in one process in turn, at each batch size. `torchao` is its flow for trained models as it comes
(0.18): prepare_pt2e, X86InductorQuantizer, convert_pt2e, torch.compile with frozen weights; `int8` is
`trainer.convert()` of the same weights, calibrated on the same batches. `fp32` and `bf16` are compiled by torch.compile
with frozen weights too; `bf16 graph` is called as `int8` is, without guards.

Accuracy, in points, by seed: FP32; torchao's and our INT8 of the same weights, without training; our INT8 trained, also
with learned steps. All had the same number of steps: where INT8 learns with its rounding, FP32 is trained on.

Cases named `... int4` are of accuracy alone, with the weights of large linear layers in 4 bits and all else in FP32:
FP32, its weights rounded without training, and trained with their rounding, also with learned steps. `mlp-folded` has a
BatchNorm at its inputs while it is trained, which then becomes a part of the first layer.

`--merge` keeps the cases of an earlier file that are not run now, each with its commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import Contender, Report, Spread, interleave, positive, ratio
from torch import Tensor, nn
from torch._inductor import config as inductor

from deepseek_mp import MixedPrecisionTrainer, QuantizationAwareTrainer
from deepseek_mp.inference import latencies, relative
from deepseek_mp.nn import revert
from deepseek_mp.qat import FloatingModel, Int8Model, SimulatedModel
from deepseek_mp.trainer.qat_weights import WeightsModel
from deepseek_mp.workloads.data import Data, digits, library_windows
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss
from deepseek_mp.workloads.resnet import class_loss, small_resnet

CPU = torch.device("cpu")
CALIBRATION = 8
"""Batches that ranges are observed on."""
BLOCK_S = 0.05
"""Seconds of calls before another arm has its turn."""
TORCHAO = 1.03
"""How many times torchao's time INT8 may take: the noise of one run."""
BF16 = 1.1
"""How many times as fast as BF16 INT8 is asked to be."""
SHARE = 0.2
"""Of the learning rate, in the last epochs: those with the rounding, and FP32's."""
TRAINED = {"int8 trained": False, "int8 trained, learned steps": True}
"""Whether the steps are learned, by arm."""
TRAINED4 = {"int4 trained": False, "int4 trained, learned steps": True}
"""The same, of weights in 4 bits."""
POINTS = 0.5
"""That a smaller format may lose after training."""
DISPARITY = 5.0
"""Channels of `mlp-disparate` are scaled by 2 to the power of minus this to this."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its data, and how it is trained."""

    build: Callable[[int], nn.Module]
    data: Callable[[int], Data]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    lr: float
    epochs: int
    tuning: int
    """Epochs with the rounding, or in FP32, at `SHARE` of the rate."""
    batches: tuple[int, ...] = (1, 64)
    change: Callable[[nn.Module], None] = lambda _model: None
    """Done to the trained model; FP32 does not notice it."""


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = (64, 512, 512, 10)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def disparate(model: nn.Module) -> None:
    """Scale each hidden channel, and undo it in the next layer: the same function, with channels of other ranges.

    It is the reverse of what Nagel et al. ("Data-free quantization through weight equalization and bias correction",
    2019) do to models whose channels are so by themselves, as those of MobileNets and large language models are.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, two in pairwise(layers):
            scales = torch.exp2((2 * torch.rand(one.out_features, generator=made) - 1) * DISPARITY)
            one.weight.mul_(scales[:, None])
            one.bias.mul_(scales)
            two.weight.div_(scales)


def normalised_mlp(seed: int) -> nn.Module:
    """With a BatchNorm at its inputs, in the place of features that are standardised beforehand."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 10))


@torch.no_grad()
def fold_first_norm(model: nn.Module) -> None:
    """The BatchNorm at the inputs as a part of the layer behind it: the same function in evaluation."""
    assert isinstance(model, nn.Sequential)
    norm: Any = model[1]
    layer: Any = model[2]
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    layer.bias.add_(layer.weight @ (norm.bias - norm.running_mean * gain))
    layer.weight.mul_(gain)
    model[1] = nn.Identity()


CASES = {
    "mlp": Case(build=mlp, data=lambda seed: digits(seed=seed), loss_fn=class_loss, lr=1e-3, epochs=15, tuning=4),
    "mlp-disparate": Case(
        build=mlp, data=lambda seed: digits(seed=seed), loss_fn=class_loss, lr=1e-3, epochs=15, tuning=25,
        change=disparate,
    ),
    "resnet": Case(
        build=lambda seed: small_resnet(seed=seed), data=lambda seed: digits(seed=seed), loss_fn=class_loss,
        lr=2e-3, epochs=10, tuning=3,
    ),
    "gpt": Case(
        build=lambda seed: byte_gpt(GPTConfig(width=128, layers=2, context=64), seed=seed),
        data=lambda seed: library_windows(batch_size=16, length=64, count=120, seed=seed),
        loss_fn=next_byte_loss, lr=2e-3, epochs=4, tuning=1, batches=(1, 16),
    ),
}  # fmt: skip


WEIGHTS = {
    "mlp int4": CASES["mlp"],
    "mlp-folded int4": Case(
        build=normalised_mlp, data=lambda seed: digits(seed=seed), loss_fn=class_loss, lr=1e-3, epochs=15, tuning=25,
        change=fold_first_norm,
    ),
    "mlp-disparate int4": CASES["mlp-disparate"],
    "gpt int4": CASES["gpt"],
}  # fmt: skip
"""Cases of weights in 4 bits."""


def adamw(case: Case, share: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.AdamW(params, lr=case.lr * share)


def trained(case: Case, model: nn.Module, data: Data, epochs: int, share: float = 1.0) -> nn.Module:
    """In FP32, and plain PyTorch again: torchao passes over layers of other classes."""
    trainer = MixedPrecisionTrainer(
        model, "fp32", optimizer=adamw(case, share), loss_fn=case.loss_fn, device=CPU, progress=False
    )
    trainer.fit(data.train, epochs=epochs)
    revert(model)
    return model.eval()


def torchao_int8(model: nn.Module, batches: Sequence[Tensor]) -> Any:
    """The graph that torchao makes of a trained model."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    sizes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (batches[0],), dynamic_shapes=sizes)
    prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)


def our_trainer(
    case: Case, model: nn.Module, batches: Sequence[Tensor], *, learned: bool = False
) -> QuantizationAwareTrainer:
    return QuantizationAwareTrainer(
        model, example_inputs=batches[0], calibration=batches, optimizer=adamw(case, SHARE), loss_fn=case.loss_fn,
        learned_step_size=learned, progress=False,
    )  # fmt: skip


def seen(data: Data) -> list[Tensor]:
    """Inputs to calibrate on; the loader stands where it did."""
    return [data.train.batch(0, index)[0] for index in range(min(CALIBRATION, len(data.train)))]


def int8_of(trainer: QuantizationAwareTrainer) -> Int8Model:
    made = trainer.convert()
    assert isinstance(made, Int8Model)
    return made


def points(call: Callable[[Tensor], Tensor], data: Data) -> float:
    """Percent of the validation's answers that are right."""
    right = count = 0
    with torch.no_grad():
        for inputs, targets in data.validation:
            right += int((call(inputs).argmax(-1) == targets).sum())
            count += targets.numel()
    return 100 * right / count


def accuracies(case: Case, seed: int, small: bool) -> dict[str, float]:
    data, epochs = case.data(seed), 1 if small else case.epochs
    start = trained(case, case.build(seed), data, epochs)
    case.change(start)
    batches, tuning = seen(data), 1 if small else case.tuning
    ours = {name: our_trainer(case, start, batches, learned=learned) for name, learned in TRAINED.items()}
    for trainer in ours.values():
        trainer.fit(case.data(seed).train, epochs=tuning)
    model = trained(case, deepcopy(start), case.data(seed), tuning, share=SHARE)
    return {
        "fp32": points(model, data),
        "torchao": points(torchao_int8(model, batches), data),
        "int8 calibrated": points(int8_of(our_trainer(case, model, batches)).reference, data),
        **{name: points(int8_of(trainer).reference, data) for name, trainer in ours.items()},
    }


def int4_trainer(case: Case, model: nn.Module, *, learned: bool = False) -> QuantizationAwareTrainer:
    return QuantizationAwareTrainer(
        model, "int4_weights", optimizer=adamw(case, SHARE), loss_fn=case.loss_fn, learned_step_size=learned,
        device=CPU, progress=False,
    )  # fmt: skip


def int4_accuracies(case: Case, seed: int, small: bool) -> dict[str, float]:
    data, epochs, tuning = case.data(seed), 1 if small else case.epochs, 1 if small else case.tuning
    start = trained(case, case.build(seed), data, epochs)
    case.change(start)
    ours = {name: int4_trainer(case, start, learned=learned) for name, learned in TRAINED4.items()}
    for trainer in ours.values():
        trainer.fit(case.data(seed).train, epochs=tuning)
    model = trained(case, deepcopy(start), case.data(seed), tuning, share=SHARE)
    arms = {"int4 rounded": int4_trainer(case, model), **ours}
    return {
        "fp32": points(model, data),
        **{name: points(_int4_of(trainer), data) for name, trainer in arms.items()},
    }


def _int4_of(trainer: QuantizationAwareTrainer) -> Callable[[Tensor], Tensor]:
    made = trainer.convert(torch.float32)
    assert isinstance(made, WeightsModel)
    return made


def measure_int4(name: str, args: Any) -> dict[str, Any]:
    by_seed = [int4_accuracies(WEIGHTS[name], seed, args.small) for seed in range(args.seeds)]
    means = {arm: statistics.mean(one[arm] for one in by_seed) for arm in by_seed[0]}
    targets = _accuracy_targets(means, TRAINED4, ["int4 rounded"])
    return {"accuracy": {"by_seed": by_seed, "mean": means}, "targets": targets, "check": "passed"}


def without_gradients(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


def compiled(call: Any) -> Callable[[Tensor], Any]:
    """By torch.compile, with frozen weights."""
    made: Any = torch.compile(call, dynamic=False)
    reset: Any = torch.compiler.reset
    reset()

    def run(x: Tensor) -> Any:
        with torch.no_grad(), inductor.patch(freezing=True):
            return made(x)

    return run


def times(case: Case, args: Any) -> dict[str, Any]:
    """Milliseconds by batch size and arm, and the ratios of those that have a target."""
    data = case.data(0)
    model = trained(case, case.build(0), data, 1)
    case.change(model)
    batches = seen(data)
    trainer = our_trainer(case, model, batches)
    simulated = trainer.model
    assert isinstance(simulated, SimulatedModel)
    narrow = compiled(deepcopy(model).bfloat16())
    arms: dict[str, Callable[[Tensor], Any]] = {
        "fp32 eager": partial(without_gradients, model),
        "fp32": compiled(deepcopy(model)),
        "bf16": lambda x: narrow(x.bfloat16() if x.is_floating_point() else x),
        "bf16 graph": FloatingModel(simulated, torch.bfloat16),
        "torchao": compiled(torchao_int8(model, batches)),
        "int8": int8_of(trainer),
    }
    exact = model(batches[0]).detach()
    found: dict[str, Any] = {}
    for size in case.batches:
        x = batches[0][:size].contiguous()
        for call in arms.values():
            for _ in range(3):
                call(x)
        found[str(size)] = _timed(arms, x, args) | {
            "error": {name: relative(call(x).float(), exact[:size]) for name, call in arms.items()},
            "compare": [trial.why for trial in trainer.compare(x).plan.trials],
        }
    return found


def _timed(arms: Mapping[str, Callable[[Tensor], Any]], x: Tensor, args: Any) -> dict[str, Any]:
    once = latencies({"fp32": partial(arms["fp32"], x)}, CPU, seconds=0.2)["fp32"].median_ms
    steps = args.steps or max(1, round(1e3 * BLOCK_S / once))
    contenders = {name: Contender(call=partial(call, x)) for name, call in arms.items()}
    ms = interleave(contenders, CPU, rounds=args.rounds, steps=steps)
    best = min(("bf16", "bf16 graph"), key=lambda name: statistics.median(ms[name]))
    return {
        "ms": {name: Spread.of(values) for name, values in ms.items()},
        "int8_over_torchao": ratio(ms, "int8", "torchao"),
        "best_bf16": best,
        "bf16_over_int8": ratio(ms, best, "int8"),
    }


def measure(name: str, args: Any) -> dict[str, Any]:
    case = CASES[name]
    start = time.perf_counter()
    by_batch = times(case, args)
    timed = time.perf_counter() - start
    by_seed = [accuracies(case, seed, args.small) for seed in range(args.seeds)]
    means = {arm: statistics.mean(one[arm] for one in by_seed) for arm in by_seed[0]}
    targets = _targets(by_batch, means)
    return {
        "times": by_batch,
        "timing_s": round(timed, 1),
        "accuracy": {"by_seed": by_seed, "mean": means},
        "targets": targets,
        "check": "passed",
    }


def _targets(by_batch: dict[str, Any], means: dict[str, float]) -> dict[str, str]:
    """What was asked, and whether it was reached."""
    targets = {}
    for size, found in by_batch.items():
        over, gain = found["int8_over_torchao"].median, found["bf16_over_int8"].median
        targets[f"batch {size}: at most {TORCHAO} of torchao's time"] = _said(over <= TORCHAO, f"{over:.3f}")
        chosen = next(why for why in found["compare"] if why.startswith("taken"))
        said = _said(gain >= BF16, f"{gain:.3f}; compare: {chosen}")
        targets[f"batch {size}: {BF16} times as fast as the best BF16"] = said
    return targets | _accuracy_targets(means, TRAINED, ["torchao", "int8 calibrated"])


def _accuracy_targets(means: dict[str, float], trained: Iterable[str], untrained: Iterable[str]) -> dict[str, str]:
    best = max(means[name] for name in trained)
    lost, won = means["fp32"] - best, best - max(means[name] for name in untrained)
    return {
        f"at most {POINTS} points below FP32": _said(lost <= POINTS, f"{lost:.2f}"),
        "better than without training": _said(won > 0, f"{won:.2f} points"),
    }


def _said(reached: bool, number: str) -> str:
    return f"{'reached' if reached else 'not reached'}: {number}"


def rows(report: Report) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("case", "what", "number")]
    for name, case in report.cases.items():
        for size, found in case.get("times", {}).items():
            lines += [(name, f"ms, batch {size}, {arm}", str(Spread(**ms))) for arm, ms in found["ms"].items()]
        means = case.get("accuracy", {}).get("mean", {})
        lines += [(name, f"points, {arm}", f"{value:.2f}") for arm, value in means.items()]
        lines += [(name, target, said) for target, said in case.get("targets", {}).items()]
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *WEIGHTS])
    parser.add_argument("--threads", type=positive, default=1, help="of PyTorch (default %(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="for accuracy (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=12, help="of A B A B (default %(default)s)")
    parser.add_argument("--steps", type=positive, help="calls in a block (default: some 50 ms)")
    parser.add_argument("--small", action="store_true", help="short training, to try the script")
    parser.add_argument("--merge", type=Path, help="a file of this benchmark whose other cases are kept")
    parser.add_argument("--out", type=Path, help="file to write (default: benchmarks/results/qat-DEVICE.json)")
    return parser.parse_args()


def main() -> int:
    warnings.simplefilter("ignore")  # of torchao and the exporter about themselves
    args = arguments()
    torch.set_num_threads(args.threads)
    report = Report("qat", CPU, vars(args))
    if args.merge:
        earlier = json.loads(args.merge.read_text(encoding="utf-8"))
        report.cases.update({name: {"commit": earlier["commit"]} | case for name, case in earlier["cases"].items()})
    for name in args.cases or (*CASES, *WEIGHTS):
        report.run(name, partial(measure_int4 if name in WEIGHTS else measure, name, args))
    return report.finish(args.out, rows(report))


if __name__ == "__main__":
    sys.exit(main())
