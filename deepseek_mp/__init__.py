"""Mixed-precision training for PyTorch that chooses each layer's format by measurement."""

from deepseek_mp.backends import autocast
from deepseek_mp.controller import LossScalePolicy, LossScaler
from deepseek_mp.monitor import PrecisionMonitor
from deepseek_mp.nn import convert, register_unit, revert
from deepseek_mp.precision import Decision, PrecisionPlan, Reason, Rule
from deepseek_mp.trainer import Callback, FitResult, MixedPrecisionTrainer, StepResult
from deepseek_mp.version import __version__

__all__ = [
    "Callback",
    "Decision",
    "FitResult",
    "LossScalePolicy",
    "LossScaler",
    "MixedPrecisionTrainer",
    "PrecisionMonitor",
    "PrecisionPlan",
    "Reason",
    "Rule",
    "StepResult",
    "__version__",
    "autocast",
    "convert",
    "register_unit",
    "revert",
]
