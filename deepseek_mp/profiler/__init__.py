"""Before training: what each precision would do to each layer, and the plan that follows."""

from deepseek_mp.profiler.profiler import PrecisionProfiler
from deepseek_mp.profiler.report import ProfileReport
from deepseek_mp.profiler.search import MetricReport, lowest_precision
from deepseek_mp.profiler.unit_profile import UnitProfile

__all__ = ["MetricReport", "PrecisionProfiler", "ProfileReport", "UnitProfile", "lowest_precision"]
