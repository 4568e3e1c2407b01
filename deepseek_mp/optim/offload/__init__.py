"""AdamW on the host for a model on a device: schedule, copies, the step as a transaction."""

from deepseek_mp.optim.offload.optimizer import OffloadedOptimizer
from deepseek_mp.optim.offload.settings import OffloadSettings, StepReport

__all__ = ["OffloadSettings", "OffloadedOptimizer", "StepReport"]
