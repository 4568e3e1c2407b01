"""What a lower precision of one layer would do to the loss and to the gradients, estimated during a backward."""

from deepseek_mp.sensitivity.outputs import can_estimate, why_not_estimated
from deepseek_mp.sensitivity.probe import Arrived, Measured, Probe, Sent
from deepseek_mp.sensitivity.reading import Effect, UnitReading
from deepseek_mp.sensitivity.sampling import BatchLayout, Terms

__all__ = [
    "Arrived",
    "BatchLayout",
    "Effect",
    "Measured",
    "Probe",
    "Sent",
    "Terms",
    "UnitReading",
    "can_estimate",
    "why_not_estimated",
]
