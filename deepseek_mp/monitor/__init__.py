"""During training: which operations ran, in which formats, and why some did not run in the low one."""

from deepseek_mp.monitor.counts import Count, Fallback, OpCount
from deepseek_mp.monitor.monitor import PrecisionMonitor
from deepseek_mp.monitor.usage import Usage, render

__all__ = ["Count", "Fallback", "OpCount", "PrecisionMonitor", "Usage", "render"]
