"""Quantisation-aware training: a copy of a model that computes as INT8 will, and its conversion to INT8."""

from deepseek_mp.qat.calibration import calibrate, check_batches
from deepseek_mp.qat.conversion import convert
from deepseek_mp.qat.floating import FloatingModel
from deepseek_mp.qat.int8 import Int8Model
from deepseek_mp.qat.preparation import prepare
from deepseek_mp.qat.simulated import SimulatedModel

__all__ = ["FloatingModel", "Int8Model", "SimulatedModel", "calibrate", "check_batches", "convert", "prepare"]
