"""`QuantizationAwareTrainer`: trains a copy of a model as a smaller format will round it, and converts it to that."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepseek_mp.backends.detect import as_device
from deepseek_mp.errors import ConfigError, explain, suggest
from deepseek_mp.inference.fidelity import Metric
from deepseek_mp.precision import Decision, PrecisionPlan
from deepseek_mp.profiler import ProfileReport
from deepseek_mp.qat import Int8Model, SimulatedModel, calibrate, check_batches, convert, prepare
from deepseek_mp.trainer.loop import MixedPrecisionTrainer
from deepseek_mp.trainer.qat_comparison import GAIN, Compared, compare
from deepseek_mp.trainer.qat_weights import WEIGHTS, WeightsModel, deployed, with_rounded_weights
from deepseek_mp.trainer.result import StepResult
from deepseek_mp.trainer.setup import check_arguments

PRECISIONS = ("int8", *WEIGHTS)
INTEGERS = ("int8", "int8_weights", "int4_weights")
REFUSED = (
    "precision_mode", "pin", "adapt", "emulate", "kernels", "compile", "fused_loss", "activations",
    "activation_memory_budget", "memory",
)  # fmt: skip
"""Options that act on layers, which are operations of a graph here."""


class QuantizationAwareTrainer(MixedPrecisionTrainer):
    """Trains with the rounding of INT8 in the forward, straight-through gradients and FP32 weights (docs/qat.md).

    `fit`, `step`, `evaluate`, `save` and resuming are those of `MixedPrecisionTrainer`; `model` is a copy with fake
    quantisation: for 'int8' a graph that is exported, otherwise a module like the original. The model passed
    stays as it is.

    Example:
        trainer = QuantizationAwareTrainer(model, example_inputs=images, optimizer=make_optimizer)
        trainer.fit(train_loader, epochs=3)
        int8 = trainer.convert()

    Args:
        model: trained in FP32 before, as a rule; for 'int8' on the CPU, as `torch.export` can take it.
        precision: 'int8'; or weights alone of large linear layers and embeddings, 'int8_weights', 'fp8_weights' or
            'int4_weights' (embeddings in int8); or 'fp8', weights and inputs of large linear layers.
        simulate_fp32: compute around the rounding in FP32, where the integers' sums are exact; False: in BF16.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, of two samples or more; for
            'int8' only.
        calibration: for 'int8': batches to observe the ranges of activations on before training; None: example_inputs
            alone.
        keep: names of modules that stay in FP32 with all that is in them; or a profiler's report or plan, or the `Path`
            of a plan: then the layers that it raises to FP32.
        learned_step_size: the steps of integers are learned too (LSQ), by parameters named `log_step`.
        freeze_norms_at: for 'int8': share of the planned steps after which BatchNorms keep their statistics; None:
            never.
        options: of `MixedPrecisionTrainer`, but for those in `REFUSED`. The optimizer is a function of the parameters,
            which are those of the copy.

    Raises:
        ConfigError: an argument does not fit, torchao is missing, the model cannot be exported or copied or has nothing
            to quantise, or the example inputs or calibration batches are not finite or none at all.
    """

    decisions: tuple[Decision, ...]
    """Of each layer with a product: whether it is in the precision, and why not."""

    def __init__(
        self,
        model: nn.Module,
        precision: str = "int8",
        *,
        example_inputs: Any = None,
        simulate_fp32: bool = True,
        calibration: Iterable[Any] | None = None,
        keep: Collection[str] | PrecisionPlan | ProfileReport | Path | None = (),
        learned_step_size: bool = False,
        freeze_norms_at: float | None = 0.75,
        **options: Any,
    ) -> None:
        _check(precision, simulate_fp32, freeze_norms_at, options)
        _check_fit(precision, example_inputs, calibration, learned_step_size, options)
        check_arguments(model, options.get("loss_fn"))
        plan = keep.plan() if isinstance(keep, ProfileReport) else keep
        copy: nn.Module
        if precision == "int8":
            copy = simulated = prepare(model, example_inputs, keep=plan)
            if calibration is not None:
                calibrate(simulated, calibration)
            if learned_step_size:
                simulated.learn_steps()
            self.decisions, options = simulated.decisions, {"device": "cpu"} | options
        else:
            copy, self.decisions = with_rounded_weights(model, precision, keep=plan, learn_step=learned_step_size)
        super().__init__(copy, "fp32" if simulate_fp32 else "bf16", **options)
        self.freeze_norms_at = freeze_norms_at
        self.recorder.decided(self.decisions)

    def step(self, batch: Any, *, close: bool | None = None) -> StepResult:
        """As that of `MixedPrecisionTrainer`; BatchNorms are frozen when their time has come."""
        planned, share = self.planned_steps, self.freeze_norms_at
        if share is not None and planned and isinstance(self.model, SimulatedModel):
            self.model.norms_frozen = self.steps_applied >= share * planned
        return super().step(batch, close=close)

    def convert(self, dtype: torch.dtype | None = None) -> Int8Model | WeightsModel:
        """The model in the precision, with the averaged weights if there are any; this one may be trained on.

        Args:
            dtype: for all but 'int8': of activations and all other weights; None: BF16.

        Raises:
            ConfigError: for 'int8': PyTorch has no oneDNN here, or a dtype is passed; for others: one but BF16,
                FP16 or FP32.
        """
        self.settle()
        with nullcontext() if self.ema is None else self.ema.applied():
            if not isinstance(self.model, SimulatedModel):
                return deployed(self.model, self.decisions, dtype or torch.bfloat16)
            if dtype is not None:
                passed = f"convert(dtype={dtype}) to INT8"
                raise ConfigError(explain(passed, "None: outputs are in FP32", "Leave it out"))
            return convert(self.model)

    def compare(
        self,
        inputs: Any,
        *,
        budget: float = 0.1,
        metric: str | Metric = "relative",
        gain: float = GAIN,
        seconds: float = 1.0,
    ) -> Compared:
        """The model in INT8, or in FP32 or BF16 where INT8 is not worth it: all are timed in turn on the inputs.

        Example:
            model, plan, card = trainer.compare(images)
            print(card)  # each form with its time, its error, and why it was taken or not

        Args:
            inputs: a tensor, a tuple of positional or a mapping of keyword arguments, of the sizes that are served.
            budget: the largest metric allowed, to the same weights in FP32 without rounding.
            metric: 'relative' (norm of the difference), 'kl' (nats, of logits), or a function of outputs and reference,
                0 for equal ones and larger for worse.
            gain: how many times as fast as the best of FP32 and BF16 INT8 must be to be taken.
            seconds: of timing for each.

        Raises:
            ConfigError: an argument or a precision that is not allowed, a metric that gives no number or is not 0 for
                equal outputs, or PyTorch has no oneDNN here.
            BatchError: inputs that the model does not take, or for which the FP32 outputs are not finite.
        """
        if not isinstance(self.model, SimulatedModel):
            allowed = "a trainer of precision='int8'"
            change = "Convert, and time it, or see optimize_for_inference for kinds of linear layers"
            raise ConfigError(explain("compare of a trainer for another precision", allowed, change))
        self.settle()
        with nullcontext() if self.ema is None else self.ema.applied():
            return compare(self.model, inputs, budget=budget, metric=metric, gain=gain, seconds=seconds)


def _check(precision: object, simulate_fp32: object, freeze_norms_at: object, options: dict[str, Any]) -> None:
    if precision not in PRECISIONS:
        hint = suggest(precision, PRECISIONS) if isinstance(precision, str) else ""
        change = f"Use one of these, or MixedPrecisionTrainer for floating-point formats.{hint}"
        passed = repr(precision) if isinstance(precision, str) else type(precision).__name__
        raise ConfigError(explain(f"precision={passed}", ", ".join(map(repr, PRECISIONS)), change))
    if not isinstance(simulate_fp32, bool):
        raise ConfigError(explain(f"simulate_fp32={simulate_fp32!r}", "True or False", "Change simulate_fp32"))
    number = isinstance(freeze_norms_at, int | float) and not isinstance(freeze_norms_at, bool)
    if freeze_norms_at is not None and not (number and 0 <= freeze_norms_at <= 1):  # type: ignore[operator]
        passed = f"freeze_norms_at={freeze_norms_at!r}"
        raise ConfigError(explain(passed, "None or a share of the steps, 0 to 1", "Change freeze_norms_at"))
    if refused := [name for name in REFUSED if name in options]:
        passed = f"{', '.join(refused)} beside quantisation-aware training"
        raise ConfigError(explain(passed, "the other options of MixedPrecisionTrainer", "Leave it out"))


def _check_fit(
    precision: str, example_inputs: object, calibration: object, learned_step_size: object, options: dict[str, Any]
) -> None:
    """What one precision takes and another does not."""
    if not isinstance(learned_step_size, bool):
        passed = f"learned_step_size={learned_step_size!r}"
        raise ConfigError(explain(passed, "True or False", "Change learned_step_size"))
    if learned_step_size and precision not in INTEGERS:
        passed, allowed = f"learned_step_size with precision={precision!r}", ", ".join(map(repr, INTEGERS))
        raise ConfigError(explain(passed, f"it with {allowed}", "Leave it out, or change the precision"))
    if precision != "int8" and (example_inputs is not None or calibration is not None):
        passed = f"example_inputs or calibration with precision={precision!r}"
        raise ConfigError(explain(passed, "none: no ranges are observed", "Leave them out"))
    if precision == "int8" and as_device(options.get("device") or "cpu").type != "cpu":
        passed = f"device={options['device']!r}"
        raise ConfigError(explain(passed, "'cpu', where INT8 is computed", "Leave it out"))
    if calibration is not None:
        check_batches(calibration)  # before a preparation of seconds
