"""The stress scenarios: seven short trainings that break static low-precision policies while FP32 trains well.

    scenario         what is hard                                                     meant to break
    outlier_channel  one channel in 128 of an activation 1000 times as large          fp8_tensor
    tiny_gradients   gradients of one layer a millionth as large                      fp16_amp
    rate_spike       five times the learning rate, activations near FP16's largest    fp16_amp
    aligned_gate     a channel of a SwiGLU that grows to 2**18 and that none reads    fp8_tensor
    drifting_gain    activations between two layers that drift past 65504             fp16_amp
    gradient_rows    loss weights of examples over seven decades                      fp8_block
    stagnation       a schedule whose late updates are below the steps of BF16        pure_bf16

Each is a value: a model, data, a loss, an optimizer, a schedule, and the stress, a context around the steps
(`stress_hooks`). Everything follows from a seed. `calm=True` gives the same run without the stress.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp.workloads.data import Data
from deepseek_mp.workloads.stress_data import DECADES, domain_data, teacher_data, weighted_error
from deepseek_mp.workloads.stress_hooks import (
    AlignedGate,
    DriftingGain,
    OutlierChannels,
    RateSpike,
    Stress,
    TinyGradients,
)
from deepseek_mp.workloads.stress_models import ResidualConfig, residual_net


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the models and batches of the scenarios are, and how long they train."""

    width: int
    hidden: int
    layers: int
    batch_size: int
    examples: int
    steps: int
    gain: float
    """Of the activations in `rate_spike`: before the spike they use about two thirds of the range of FP16."""


SMALL = Size(width=128, hidden=256, layers=2, batch_size=128, examples=8192, steps=160, gain=13312.0)
"""Seconds for each policy on one core of a CPU."""
LARGE = Size(width=256, hidden=1024, layers=4, batch_size=512, examples=65536, steps=320, gain=4096.0)
"""For an accelerator."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A training run and what makes it hard."""

    name: str
    stresses: str
    """What is hard about it."""
    breaks: str
    """The policy that it is meant to break."""
    layers: tuple[str, ...]
    """The layers that need more precision than that policy gives them; none: the weights themselves do."""
    model: Callable[[int], nn.Module]
    """Seed to a model in fp32, on the CPU."""
    data: Callable[[int], Data]
    """Seed of the order to the batches; the examples are the same for all."""
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    schedule: Callable[[int], float]
    """Applied steps to the factor of the learning rate."""
    steps: int
    stress: Callable[[nn.Module, Optimizer], Stress]
    """Model and optimizer to the context of the steps."""


class Build(Protocol):
    """Makes a scenario of a size; `calm` leaves its stress out."""

    def __call__(self, size: Size = SMALL, *, calm: bool = False) -> Scenario: ...


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What scenarios differ in beside their stress."""

    gated: bool = False
    gain: float = 1.0
    lr: float = 2e-3
    eps: float = 1e-8
    last: float = 0.02
    """Factor that the learning rate ends at."""
    weight: float = 1.0
    """Of every example in the loss."""


def outlier_channel(size: Size = SMALL, *, calm: bool = False) -> Scenario:
    """One channel in 128 of a layer's input becomes 1000 times as large; BF16 can round it well enough, FP8 cannot."""
    stress = partial(OutlierChannels, layer="blocks.0.up", every=128, factor=1000.0, start=size.steps // 4)
    return replace(
        _scenario(size, Stress if calm else stress),
        name="outlier_channel",
        stresses="one channel in 128 of an activation that is 1000 times as large from a quarter of the steps on",
        layers=("blocks.0.up",),
        breaks="fp8_tensor",
    )


def tiny_gradients(size: Size = SMALL, *, calm: bool = False) -> Scenario:
    """Gradients at one layer are a millionth of the others', which are those of a large batch: in FP16 they are zero.

    A loss scale that would save them exists, but doubling every 2000 steps does not find it; `predictive` does.
    """
    stress = partial(TinyGradients, layer="blocks.0.down", bits=20, start=size.steps // 10, end=size.steps)
    return replace(
        _scenario(size, Stress if calm else stress, _Recipe(weight=2.0**-10, eps=1e-16)),
        name="tiny_gradients",
        stresses="gradients of one layer's output that are a millionth of the others'",
        layers=("blocks.0.up", "blocks.0.down"),
        breaks="fp16_amp",
    )


def rate_spike(size: Size = SMALL, *, calm: bool = False) -> Scenario:
    """Activations use two thirds of the range of FP16; a quarter of the steps at five times the rate double them."""
    start, end = size.steps // 4, size.steps // 2
    return replace(
        _scenario(
            size,
            Stress if calm else partial(RateSpike, factor=5.0, start=start, end=end),
            _Recipe(gain=size.gain, lr=3e-3),
        ),
        name="rate_spike",
        stresses="a learning rate that is five times as high for a quarter of the steps, near FP16's largest number",
        layers=tuple(f"blocks.{block}.{name}" for block in range(size.layers) for name in ("up", "down")),
        breaks="fp16_amp",
    )


def aligned_gate(size: Size = SMALL, *, calm: bool = False) -> Scenario:
    """A channel of a SwiGLU grows as the square of its weights; with one scale for all, other channels become zero."""
    growth = partial(AlignedGate, block="blocks.1", channel=3, growth=2.0 ** (18 / size.steps), limit=2.0**9)
    return replace(
        _scenario(size, Stress if calm else growth, _Recipe(gated=True)),
        name="aligned_gate",
        stresses="a channel of a SwiGLU whose activations grow as the square of its growing weights",
        layers=("blocks.1.down",),
        breaks="fp8_tensor",
    )


def drifting_gain(size: Size = SMALL, *, calm: bool = False) -> Scenario:
    """Activations double every thirty-second of the steps, until FP16 has infinities."""
    drift = partial(DriftingGain, first="blocks.1.up", second="blocks.1.down", every=max(size.steps // 32, 1), bits=20)
    return replace(
        _scenario(size, Stress if calm else drift),
        name="drifting_gain",
        stresses="activations between two layers that drift past 65504",
        layers=("blocks.1.up", "blocks.1.down"),
        breaks="fp16_amp",
    )


def gradient_rows(size: Size = SMALL, *, calm: bool = False) -> Scenario:
    """Each domain of the data has features of its own, so its weights learn from gradients that no other row exceeds.

    Their products sum over examples: with E4M3 scales over 128 examples all but the heaviest domains become zero.
    """
    data = partial(domain_data, decades=0.0 if calm else DECADES)
    return replace(
        _scenario(size, Stress, _Recipe(eps=1e-16), data),
        name="gradient_rows",
        stresses="loss weights of examples, and with them rows of gradients, over seven decades",
        layers=("enter",),
        breaks="fp8_block",
    )


def stagnation(size: Size = SMALL, *, calm: bool = False) -> Scenario:
    """Updates of BF16 weights are lost once the rate has decayed. Calm, it does not decay."""
    return replace(
        _scenario(size, Stress, _Recipe(lr=1e-3, last=1.0 if calm else 0.02)),
        name="stagnation",
        stresses="a schedule whose late updates are smaller than half a step between two BF16 numbers",
        breaks="pure_bf16",
    )


SCENARIOS: Mapping[str, Build] = MappingProxyType(
    {
        "outlier_channel": outlier_channel,
        "tiny_gradients": tiny_gradients,
        "rate_spike": rate_spike,
        "aligned_gate": aligned_gate,
        "drifting_gain": drifting_gain,
        "gradient_rows": gradient_rows,
        "stagnation": stagnation,
    }
)
"""By name."""


def _scenario(
    size: Size,
    stress: Callable[[nn.Module, Optimizer], Stress],
    recipe: _Recipe = _Recipe(),
    data: Callable[..., Data] | None = None,
) -> Scenario:
    """What all scenarios share; each gives it its own name."""
    config = ResidualConfig(
        width=size.width, hidden=size.hidden, layers=size.layers, gated=recipe.gated, gain=recipe.gain
    )
    batches = data or partial(teacher_data, weight=recipe.weight)
    return Scenario(
        name="",
        stresses="",
        layers=(),
        breaks="",
        model=lambda seed: residual_net(config, seed=seed),
        data=lambda seed: batches(
            features=config.features,
            outputs=config.outputs,
            batch_size=size.batch_size,
            examples=size.examples,
            seed=seed,
        ),
        loss_fn=weighted_error,
        optimizer=partial(_adamw, lr=recipe.lr, eps=recipe.eps),
        schedule=partial(_cosine, steps=size.steps, last=recipe.last),
        steps=size.steps,
        stress=stress,
    )


def _adamw(parameters: Iterable[nn.Parameter], *, lr: float, eps: float) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, eps=eps, weight_decay=0.0)


def _cosine(step: int, *, steps: int, last: float) -> float:
    """From 1 down to `last` over the steps, and there it stays."""
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
