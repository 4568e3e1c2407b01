"""Images to classify that are learnt within hundreds of steps: a wave in noise, whose direction is the class.

Frequency, phase and colour are drawn independently, so that only the direction tells the class; it is drawn with a
scatter, so that no model is right about all of them. Drawn on the CPU from a seed, painted on any device; the noise is
the device's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepseek_mp.workloads.data import Batches, Pair, seeded

CLASSES = 16
SCATTER = 0.35
"""Standard deviation of a direction, in steps between classes."""
NOISE = 0.7
"""Standard deviation of a pixel; a wave has 0.7 times its colour's length."""
CYCLES = (4.0, 12.0)
"""Waves across an image; drawn evenly."""


class Gratings(Batches):
    """`count` batches: images [B, 3, side, side] fp32 around 0, classes [B] int64 from 0 to 15.

    With `fixed=True` every epoch has the same images.
    """

    def __init__(
        self,
        *,
        side: int,
        batch_size: int,
        count: int,
        seed: int,
        fixed: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(count)
        self.side, self.batch_size, self.seed, self.fixed = side, batch_size, seed, fixed
        self.device = torch.device(device)

    def batch(self, epoch: int, index: int) -> Pair:
        generator, size = seeded(self.seed, 0 if self.fixed else epoch, index), self.batch_size
        labels = torch.randint(CLASSES, (size,), generator=generator)
        turn = (labels + SCATTER * torch.randn(size, generator=generator)) * (math.pi / CLASSES)
        cycles = CYCLES[0] + (CYCLES[1] - CYCLES[0]) * torch.rand(size, generator=generator)
        phase = 2 * math.pi * torch.rand(size, generator=generator)
        colour = torch.randn(size, 3, generator=generator)
        noise = torch.Generator(self.device).manual_seed(generator.initial_seed())
        about = torch.stack([turn, cycles, phase], dim=1).to(self.device)
        return self._painted(about, colour.to(self.device), noise), labels.to(self.device)

    def _painted(self, about: Tensor, colour: Tensor, noise: torch.Generator) -> Tensor:
        turn, cycles, phase = (column[:, None, None] for column in about.unbind(1))
        places = (torch.arange(self.side, device=self.device) + 0.5) / self.side
        along = turn.cos() * places[None, None, :] + turn.sin() * places[None, :, None]
        wave = (2 * math.pi * cycles * along + phase).sin()
        shape = (len(about), 3, self.side, self.side)
        grains = torch.randn(shape, generator=noise, device=self.device)
        return colour[:, :, None, None] * wave[:, None] + NOISE * grains
