"""What an activation's result and gradients are computed of, so that a cast can compute them itself.

With f an activation and f' its slope, a source is named by the activation and what is made of it:

    source          inputs       value
    A               (x,)         f(x)
    A_gate          (x, up)      f(x) * up
    A_grad          (x, g)       f'(x) * g
    A_gate_grad     (x, up, g)   f'(x) * up * g

The last two are gradients with respect to x, of A and of A_gate; that of A_gate with respect to up is
A_gate of (x, g). `gelu` is the exact one, with erf; `gelu_tanh` its approximation. The slope of relu at 0 is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.errors import ConfigError, explain

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
_MADE_IN_ONE_PASS = frozenset({"1x128", "128x128", "delayed"})
"""Granularities whose scales are there when a tile has been computed: "delayed" is a scale known beforehand."""


class Source(NamedTuple):
    """A value that is computed elementwise of its inputs."""

    activation: str
    gate: bool
    grad: bool
    inputs: int


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        activation + "_gate" * gate + "_grad" * grad: Source(activation, gate, grad, 1 + gate + grad)
        for activation in ACTIVATIONS
        for gate in (False, True)
        for grad in (False, True)
    }
)


def find_source(name: str) -> Source:
    """The source of that name; `ConfigError` when there is none."""
    if name not in SOURCES:
        raise ConfigError(explain(f"source {name!r}", ", ".join(SOURCES), "Use one of these"))
    return SOURCES[name]


def can_make(granularity: str, implementation: str) -> bool:
    """Whether an implementation casts what it computes itself.

    Args:
        granularity: of the scales; "delayed" for one scale that is known beforehand.
        implementation: reference, which always does, or triton.
    """
    return implementation == "reference" or (implementation == "triton" and granularity in _MADE_IN_ONE_PASS)


def compute(source: str, inputs: Sequence[Tensor]) -> Tensor:
    """The values of a source, not rounded in between.

    Args:
        source: a name of `SOURCES`.
        inputs: its tensors, in the order of the table above and of one shape.

    Returns:
        fp32; fp64 where the inputs are.

    Raises:
        ConfigError: there is no source of that name, or it reads another number of tensors.
    """
    found = find_source(source)
    check_count(source, len(inputs))
    wide = [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in inputs]
    if found.grad:
        return _backward(found.activation, wide[1] * wide[2] if found.gate else wide[1], wide[0])
    value = _forward(found.activation, wide[0])
    return value * wide[1] if found.gate else value


def check_count(source: str, count: int) -> None:
    """`ConfigError` if a source, which is known, does not read that many tensors."""
    if count != SOURCES[source].inputs:
        passed = f"{count} tensors for the source {source!r}"
        raise ConfigError(explain(passed, str(SOURCES[source].inputs), "Pass what `ops.sources` says it reads"))


def _forward(activation: str, x: Tensor) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.relu(x) if activation == "relu" else F.gelu(x, approximate=_APPROXIMATE[activation])


def _backward(activation: str, g: Tensor, x: Tensor) -> Tensor:
    aten = torch.ops.aten
    if activation == "silu":
        made: Tensor = aten.silu_backward(g, x)
    elif activation == "relu":
        made = aten.threshold_backward(g, x, 0)
    else:
        made = aten.gelu_backward(g, x, approximate=_APPROXIMATE[activation])
    return made
