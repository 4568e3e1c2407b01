"""AdamW on the host for a model on a device: schedule, copies, the step as a transaction."""

from deepseek_mp.optim.offload.arena import HostMemory
from deepseek_mp.optim.offload.calibrate import calibrate
from deepseek_mp.optim.offload.compressed_down import compressed_gradients
from deepseek_mp.optim.offload.compression import HostPlacement, Placement, compressed_activations
from deepseek_mp.optim.offload.optimizer import OffloadedOptimizer
from deepseek_mp.optim.offload.schedule import Prediction, Rates, Split, Work, predict
from deepseek_mp.optim.offload.settings import OffloadSettings, StepReport
from deepseek_mp.optim.offload.share import free_within

__all__ = [
    "HostMemory",
    "HostPlacement",
    "OffloadSettings",
    "OffloadedOptimizer",
    "Placement",
    "Prediction",
    "Rates",
    "Split",
    "StepReport",
    "Work",
    "calibrate",
    "compressed_activations",
    "compressed_gradients",
    "free_within",
    "predict",
]
