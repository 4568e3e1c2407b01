"""`QuantizationAwareTrainer`: trains a copy of a model as INT8 will round it, and converts it to INT8."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from deepseek_mp.errors import ConfigError, explain, suggest
from deepseek_mp.inference.fidelity import Metric
from deepseek_mp.precision import Decision
from deepseek_mp.qat import Int8Model, SimulatedModel, calibrate, convert, prepare
from deepseek_mp.trainer.loop import MixedPrecisionTrainer
from deepseek_mp.trainer.qat_comparison import GAIN, Compared, compare
from deepseek_mp.trainer.result import StepResult
from deepseek_mp.trainer.setup import check_arguments

PRECISIONS = ("int8",)
REFUSED = (
    "precision_mode", "pin", "adapt", "emulate", "kernels", "compile", "fused_loss", "activations",
    "activation_memory_budget", "memory",
)  # fmt: skip
"""Options that act on layers, which are operations of a graph here."""


class QuantizationAwareTrainer(MixedPrecisionTrainer):
    """Trains with the rounding of INT8 in the forward, straight-through gradients and FP32 weights (docs/qat.md).

    `fit`, `step`, `evaluate`, `save` and resuming are those of `MixedPrecisionTrainer`; `model` is a copy with fake
    quantisation, exported as a graph. The model passed stays as it is.

    Example:
        trainer = QuantizationAwareTrainer(model, example_inputs=images, optimizer=make_optimizer)
        trainer.fit(train_loader, epochs=3)
        int8 = trainer.convert()

    Args:
        model: on the CPU, as `torch.export` can take it; trained in FP32 before, as a rule.
        precision: 'int8'.
        simulate_fp32: compute around the rounding in FP32, where the integers' sums are exact; False: in BF16.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, of two samples or more.
        calibration: batches to observe the ranges of activations on before training; None: example_inputs alone.
        keep: names of modules that stay in FP32 with all that is in them.
        freeze_norms_at: share of the planned steps after which BatchNorms keep their statistics; None: never.
        options: of `MixedPrecisionTrainer`, but for those in `REFUSED`. The optimizer is a function of the parameters,
            which are those of the copy.

    Raises:
        ConfigError: an argument does not fit, torchao is missing, the model cannot be exported or copied or has nothing
            to quantise, or the example inputs or calibration batches are not finite or none at all.
    """

    model: SimulatedModel

    def __init__(
        self,
        model: nn.Module,
        precision: str = "int8",
        *,
        example_inputs: Any,
        simulate_fp32: bool = True,
        calibration: Iterable[Any] | None = None,
        keep: Collection[str] = (),
        freeze_norms_at: float | None = 0.75,
        **options: Any,
    ) -> None:
        _check(precision, simulate_fp32, freeze_norms_at, options)
        check_arguments(model, options.get("loss_fn"))
        simulated = prepare(model, example_inputs, keep=keep)
        if calibration is not None:
            calibrate(simulated, calibration)
        super().__init__(simulated, "fp32" if simulate_fp32 else "bf16", **({"device": "cpu"} | options))
        self.freeze_norms_at = freeze_norms_at
        self.recorder.decided(simulated.decisions)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Of each layer with a product: whether it is in INT8, and why not."""
        return self.model.decisions

    def step(self, batch: Any, *, close: bool | None = None) -> StepResult:
        """As that of `MixedPrecisionTrainer`; BatchNorms are frozen when their time has come."""
        planned, share = self.planned_steps, self.freeze_norms_at
        if share is not None and planned:
            self.model.norms_frozen = self.steps_applied >= share * planned
        return super().step(batch, close=close)

    def convert(self) -> Int8Model:
        """The model in INT8 for a CPU, with the averaged weights if there are any; this one may be trained on.

        Raises:
            ConfigError: PyTorch has no oneDNN here.
        """
        self.settle()
        with nullcontext() if self.ema is None else self.ema.applied():
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
            metric: 'relative' (norm of the difference), 'kl' (nats, of logits), or a function of outputs and reference.
            gain: how many times as fast as the best of FP32 and BF16 INT8 must be to be taken.
            seconds: of timing for each.

        Raises:
            ConfigError: an argument that is not allowed, or PyTorch has no oneDNN here.
            BatchError: inputs for which the FP32 outputs are not finite.
        """
        self.settle()
        with nullcontext() if self.ema is None else self.ema.applied():
            return compare(self.model, inputs, budget=budget, metric=metric, gain=gain, seconds=seconds)


def _check(precision: object, simulate_fp32: object, freeze_norms_at: object, options: dict[str, Any]) -> None:
    if precision not in PRECISIONS:
        hint = suggest(precision, PRECISIONS) if isinstance(precision, str) else ""
        change = f"Use 'int8', or MixedPrecisionTrainer for floating-point formats.{hint}"
        raise ConfigError(explain(f"precision={precision!r}", "'int8'", change))
    if not isinstance(simulate_fp32, bool):
        raise ConfigError(explain(f"simulate_fp32={simulate_fp32!r}", "True or False", "Change simulate_fp32"))
    number = isinstance(freeze_norms_at, int | float) and not isinstance(freeze_norms_at, bool)
    if freeze_norms_at is not None and not (number and 0 <= freeze_norms_at <= 1):  # type: ignore[operator]
        passed = f"freeze_norms_at={freeze_norms_at!r}"
        raise ConfigError(explain(passed, "None or a share of the steps, 0 to 1", "Change freeze_norms_at"))
    if refused := [name for name in REFUSED if name in options]:
        passed = f"{', '.join(refused)} beside quantisation-aware training"
        raise ConfigError(explain(passed, "the other options of MixedPrecisionTrainer", "Leave it out"))
    if torch.device(options.get("device") or "cpu").type != "cpu":
        passed = f"device={options['device']!r}"
        raise ConfigError(explain(passed, "'cpu', where INT8 is computed", "Leave it out"))
