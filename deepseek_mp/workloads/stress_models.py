"""The model of the stress scenarios: a small residual network of feed-forward blocks, plain or gated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """Sizes of the network; multiples of 128, so that blocks of FP8 fit."""

    features: int = 128
    width: int = 128
    hidden: int = 256
    outputs: int = 16
    layers: int = 2
    gated: bool = False
    """SwiGLU instead of ReLU."""
    gain: float = 1.0
    """How much larger the hidden activations of plain blocks are than they need to be."""


class FeedForward(nn.Module):
    """[N, width] to the same: normed, up, activation, down, around a shortcut. No biases: gains pass through it."""

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.gate = nn.Linear(config.width, config.hidden, bias=False) if config.gated else None
        self.down = nn.Linear(config.hidden, config.width, bias=False)
        self.gain = config.gain

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        hidden = self.up(normed)
        hidden = F.relu(hidden) if self.gate is None else F.silu(self.gate(normed)) * hidden
        update: Tensor = self.down(hidden * self.gain) / self.gain
        return x + update


class ResidualNet(nn.Module):
    """[N, features] to [N, outputs]: a linear layer, `layers` feed-forward blocks, a norm and a head."""

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__()
        self.enter = nn.Linear(config.features, config.width)
        self.blocks = nn.ModuleList(FeedForward(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden)
        outputs: Tensor = self.head(self.norm(hidden))
        return outputs


def residual_net(config: ResidualConfig, *, seed: int = 0) -> ResidualNet:
    """The network with weights drawn from `seed`; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ResidualNet(config)
