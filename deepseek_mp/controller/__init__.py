"""Decides while training runs: the loss scale, and whether a step is applied."""

from deepseek_mp.controller.loss_scale import (
    DynamicLossScale,
    LossScalePolicy,
    NoLossScale,
    PredictiveLossScale,
    StaticLossScale,
    make_policy,
)
from deepseek_mp.controller.scaler import LossScaler, Verdict

__all__ = [
    "DynamicLossScale",
    "LossScalePolicy",
    "LossScaler",
    "NoLossScale",
    "PredictiveLossScale",
    "StaticLossScale",
    "Verdict",
    "make_policy",
]
