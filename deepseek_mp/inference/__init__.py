"""Models for serving: which form is fastest within a budget on the outputs, measured, and what it costs."""

from deepseek_mp.inference.archive import LoadedModel, load
from deepseek_mp.inference.by_shape import ServedByShape
from deepseek_mp.inference.card import Card, ServingPlan
from deepseek_mp.inference.choice import Trial, choose
from deepseek_mp.inference.fidelity import kl, relative
from deepseek_mp.inference.form import Form, baselines, candidates
from deepseek_mp.inference.layer_plan import LayerChoice, LayerPlan
from deepseek_mp.inference.measure import Energy, Latency, energy, latencies
from deepseek_mp.inference.optimize import Optimised, optimize_for_inference
from deepseek_mp.inference.optimize_shapes import OptimisedByShape, optimize_for_shapes
from deepseek_mp.inference.quantised_linear import QuantisedLinear
from deepseek_mp.inference.serve import Served

__all__ = [
    "Card",
    "Energy",
    "Form",
    "Latency",
    "LayerChoice",
    "LayerPlan",
    "LoadedModel",
    "Optimised",
    "OptimisedByShape",
    "QuantisedLinear",
    "Served",
    "ServedByShape",
    "ServingPlan",
    "Trial",
    "baselines",
    "candidates",
    "choose",
    "energy",
    "kl",
    "latencies",
    "load",
    "optimize_for_inference",
    "optimize_for_shapes",
    "relative",
]
