"""Mixed-precision training for PyTorch that chooses each layer's format by measurement."""

from deepseek_mp.backends import autocast, math_mode
from deepseek_mp.controller import AdaptiveSettings, LossScalePolicy, LossScaler
from deepseek_mp.errors import MixedPrecisionError, NonFiniteError
from deepseek_mp.inference import optimize_for_inference, optimize_for_shapes
from deepseek_mp.monitor import PrecisionMonitor
from deepseek_mp.nn import convert, register_unit, revert
from deepseek_mp.ops.cast import cast
from deepseek_mp.precision import Decision, PrecisionPlan, Reason, Rule
from deepseek_mp.profiler import PrecisionProfiler, ProfileReport
from deepseek_mp.trainer import (
    AdaptivePrecision,
    Callback,
    FitResult,
    MixedPrecisionTrainer,
    ProgressiveResult,
    QuantizationAwareTrainer,
    StepResult,
    WeightStorage,
    find_batch_size,
    progressive,
)
from deepseek_mp.version import __version__

__all__ = [
    "AdaptivePrecision",
    "AdaptiveSettings",
    "Callback",
    "Decision",
    "FitResult",
    "LossScalePolicy",
    "LossScaler",
    "MixedPrecisionError",
    "MixedPrecisionTrainer",
    "NonFiniteError",
    "PrecisionMonitor",
    "PrecisionPlan",
    "PrecisionProfiler",
    "ProfileReport",
    "ProgressiveResult",
    "QuantizationAwareTrainer",
    "Reason",
    "Rule",
    "StepResult",
    "WeightStorage",
    "__version__",
    "autocast",
    "cast",
    "convert",
    "find_batch_size",
    "math_mode",
    "optimize_for_inference",
    "optimize_for_shapes",
    "progressive",
    "register_unit",
    "revert",
]
