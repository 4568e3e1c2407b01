"""Decides while training runs: the loss scale, whether a step is applied, and which layers run in which recipe."""

from deepseek_mp.controller.adaptive import AdaptiveController
from deepseek_mp.controller.adaptive_units import AdaptiveUnit, Comparison
from deepseek_mp.controller.loss_scale import (
    DynamicLossScale,
    LossScalePolicy,
    NoLossScale,
    PredictiveLossScale,
    StaticLossScale,
    make_policy,
)
from deepseek_mp.controller.scaler import LossScaler, Verdict
from deepseek_mp.controller.settings import AdaptiveSettings

__all__ = [
    "AdaptiveController",
    "AdaptiveSettings",
    "AdaptiveUnit",
    "Comparison",
    "DynamicLossScale",
    "LossScalePolicy",
    "LossScaler",
    "NoLossScale",
    "PredictiveLossScale",
    "StaticLossScale",
    "Verdict",
    "make_policy",
]
