"""The trainer: fit, step, save and resume."""

from deepseek_mp.trainer.adaptive import AdaptivePrecision
from deepseek_mp.trainer.batch_size import BatchSize, find_batch_size
from deepseek_mp.trainer.callbacks import Callback
from deepseek_mp.trainer.loop import MixedPrecisionTrainer
from deepseek_mp.trainer.memory_report import MemoryReport
from deepseek_mp.trainer.progressive import progressive
from deepseek_mp.trainer.progressive_result import ProgressiveResult
from deepseek_mp.trainer.qat import QuantizationAwareTrainer
from deepseek_mp.trainer.result import FitResult, StepFacts, StepResult
from deepseek_mp.trainer.storage import WeightStorage

__all__ = [
    "AdaptivePrecision",
    "BatchSize",
    "Callback",
    "FitResult",
    "MemoryReport",
    "MixedPrecisionTrainer",
    "ProgressiveResult",
    "QuantizationAwareTrainer",
    "StepFacts",
    "StepResult",
    "WeightStorage",
    "find_batch_size",
    "progressive",
]
