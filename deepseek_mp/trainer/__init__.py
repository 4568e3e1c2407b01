"""The trainer: fit, step, save and resume."""

from deepseek_mp.trainer.callbacks import Callback
from deepseek_mp.trainer.loop import MixedPrecisionTrainer
from deepseek_mp.trainer.result import FitResult, StepFacts, StepResult

__all__ = ["Callback", "FitResult", "MixedPrecisionTrainer", "StepFacts", "StepResult"]
