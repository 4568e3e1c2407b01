"""During training: which operations ran in which formats, what layers' tensors are like, and what went wrong."""

from deepseek_mp.monitor.alarms import Alarm, Limits
from deepseek_mp.monitor.counts import Count, Fallback, OpCount
from deepseek_mp.monitor.layer_statistics import LayerStatistics, TensorStatistics, Value
from deepseek_mp.monitor.monitor import PrecisionMonitor
from deepseek_mp.monitor.sampling import Sampling
from deepseek_mp.monitor.usage import Usage, render

__all__ = [
    "Alarm",
    "Count",
    "Fallback",
    "LayerStatistics",
    "Limits",
    "OpCount",
    "PrecisionMonitor",
    "Sampling",
    "TensorStatistics",
    "Usage",
    "Value",
    "render",
]
