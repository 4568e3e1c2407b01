"""Measured time of units and of whole steps by format, kept on disk, and the choice they lead to."""

from deepseek_mp.costs.cache import CostCache
from deepseek_mp.costs.decide import Candidate, Trial, Verdict, decide, next_trial
from deepseek_mp.costs.layers import LayerTimes, measure_layers
from deepseek_mp.costs.timing import Timing, is_out_of_memory, time_call
from deepseek_mp.costs.units import UnitCall, measure_unit, record_units

__all__ = [
    "Candidate",
    "CostCache",
    "LayerTimes",
    "Timing",
    "Trial",
    "UnitCall",
    "Verdict",
    "decide",
    "is_out_of_memory",
    "measure_layers",
    "measure_unit",
    "next_trial",
    "record_units",
    "time_call",
]
