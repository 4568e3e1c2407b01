"""Scenes to detect objects in: coloured shapes of many sizes on textured noise, with their boxes, from a seed.

Class, place, size and colour are drawn independently, so that only the outline tells the class. Everything is
computed for a whole batch at once, on any device. What is where is drawn on the CPU and so the same everywhere;
the noise is drawn on the device, and differs between kinds of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.workloads.boxes import areas, intersections
from deepseek_mp.workloads.data import Batches, Pair, seeded

SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ellipse": lambda x, y: x.square() + y.square() <= 1,
    "rectangle": lambda x, y: torch.maximum(x.abs(), y.abs()) <= 1,
    "triangle": lambda x, y: (x.abs() <= (y + 1) / 2) & (y <= 1),
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) <= 0.35) & (torch.maximum(x.abs(), y.abs()) <= 1),
    "ring": lambda x, y: (x.square() + y.square() <= 1) & (x.square() + y.square() >= 0.4),
    "hourglass": lambda x, y: (x.abs() <= y.abs()) & (y.abs() <= 1),
}
"""What is inside each shape, whose box is from -1 to 1 in both directions (y points down)."""
CLASSES = tuple(SHAPES)
STRETCH = 1.4
"""The largest ratio of a box's sides."""
COVERED = 0.25
"""How much of an object an earlier one may share."""
OCTAVES = (1, 4, 16)
"""Pixels per grain of the background's noise."""
CONTRAST = 0.35
"""How far the colour of an object is from that of the ground, in the channel where it is farthest."""


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What scenes look like. The defaults suit the detector's; `TINY_SCENES` a CPU."""

    side: int = 640
    """Pixels of the square image."""
    objects: int = 12
    """The most objects of a scene; those that would cover others are left out."""
    smallest: float = 0.05
    largest: float = 0.5
    """Root of the area of an object's box, as a part of the image's side; drawn evenly on a logarithmic scale."""

    def __post_init__(self) -> None:
        sizes = 0 < self.smallest <= self.largest < 1 / STRETCH
        if self.side < 1 or self.objects < 1 or not sizes:
            raise ConfigError(
                explain(
                    f"side={self.side}, objects={self.objects}, smallest={self.smallest}, largest={self.largest}",
                    f"positive sizes, with smallest at most largest and largest below {1 / STRETCH:.2f}",
                    "Change the sizes",
                )
            )


TINY_SCENES = SceneConfig(side=96, objects=4, smallest=0.17, largest=0.5)


class Scenes(Batches):
    """`count` batches of scenes: images [B, 3, side, side] fp32 about [0, 1], targets [B, objects, 5] fp32.

    A row of the targets is class, left, top, right, bottom in pixels; rows of class -1 are padding, and come last.
    With `fixed=True` every epoch has the same scenes, as validation needs; `seed` tells the two apart.
    """

    def __init__(
        self,
        config: SceneConfig,
        *,
        batch_size: int,
        count: int,
        seed: int,
        fixed: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(count)
        self.config, self.batch_size, self.seed, self.fixed = config, batch_size, seed, fixed
        self.device = torch.device(device)

    def batch(self, epoch: int, index: int) -> Pair:
        generator = seeded(self.seed, 0 if self.fixed else epoch, index)
        targets = layout(self.config, self.batch_size, generator)
        colours = torch.rand(self.batch_size, 1 + self.config.objects, 3, generator=generator)
        grains = torch.Generator(self.device).manual_seed(generator.initial_seed())
        targets, colours = targets.to(self.device), colours.to(self.device)
        return paint(targets, colours, self.config.side, grains), targets


def layout(config: SceneConfig, count: int, generator: torch.Generator) -> Tensor:
    """Targets [count, objects, 5] of scenes, drawn from a CPU generator; at least one object in each."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, config.objects, generator=generator)

    size = config.side * uniform(math.log(config.smallest), math.log(config.largest)).exp()
    stretch = uniform(-math.log(STRETCH) / 2, math.log(STRETCH) / 2).exp()
    sides = torch.stack([size * stretch, size / stretch], dim=-1)
    corner = torch.stack([uniform(0, 1), uniform(0, 1)], dim=-1) * (config.side - sides)
    boxes = torch.cat([corner, corner + sides], dim=-1)
    labels = torch.randint(len(CLASSES), (count, config.objects), generator=generator)
    kept = _apart(boxes)
    rows = torch.cat([torch.where(kept, labels, -1)[..., None].float(), boxes * kept[..., None]], dim=-1)
    order = (~kept).int().argsort(dim=1, stable=True)
    return rows.gather(1, order[..., None].expand_as(rows))


def _apart(boxes: Tensor) -> Tensor:
    """[N, K]: which boxes share at most `COVERED` of the smaller of the two with every one kept before."""
    shared = intersections(boxes[:, :, None], boxes[:, None]) / torch.minimum(
        areas(boxes)[:, :, None], areas(boxes)[:, None]
    )
    kept = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for number in range(boxes.shape[1]):
        kept[:, number] = ~((shared[:, number] > COVERED) & kept).any(dim=1)
    return kept


def paint(targets: Tensor, colours: Tensor, side: int, grains: torch.Generator) -> Tensor:
    """Images [N, 3, side, side] of targets [N, K, 5]; `colours` [N, 1 + K, 3] in [0, 1], that of the ground first."""
    count = len(targets)
    ground = colours[:, :1]
    # A colour too near the ground's is moved away from it, in the channel where it already is the farthest.
    away = colours[:, 1:] - ground
    farthest = away.abs() == away.abs().amax(dim=-1, keepdim=True)
    least = torch.where(ground > 0.5, -CONTRAST, CONTRAST)
    inks = torch.where(farthest & (away.abs() < CONTRAST), ground + least, colours[:, 1:])
    image = ground[:, 0, :, None, None].expand(-1, -1, side, side) + _noise(count, 3, side, grains)
    texture = 0.5 * _noise(count, 1, side, grains)
    centres = torch.arange(side, device=targets.device) + 0.5
    for number in range(targets.shape[1]):
        inside = _outline(targets[:, number], centres)
        image = torch.where(inside[:, None], inks[:, number, :, None, None] + texture, image)
    return image


def _outline(rows: Tensor, centres: Tensor) -> Tensor:
    """[N, side, side]: which pixels belong to one object [N, 5] of each image; to padding none."""
    label, left, top, right, bottom = (column[:, None, None] for column in rows.unbind(-1))
    half_width, half_height = (right - left).clamp(min=1) / 2, (bottom - top).clamp(min=1) / 2
    x = (centres[None, None, :] - left) / half_width - 1
    y = (centres[None, :, None] - top) / half_height - 1
    inside = torch.zeros_like(x * y, dtype=torch.bool)
    for index, shape in enumerate(SHAPES.values()):
        inside |= shape(x, y) & (label == index)
    return inside


def _noise(count: int, channels: int, side: int, grains: torch.Generator) -> Tensor:
    """[count, channels, side, side]: noise of grains of several sizes, of standard deviation about 0.1."""
    total = torch.zeros(count, channels, side, side, device=grains.device)
    for grain in OCTAVES:
        small = torch.randn(
            count, channels, -(-side // grain), -(-side // grain), generator=grains, device=grains.device
        )
        total += 0.06 * (small if grain == 1 else F.interpolate(small, size=(side, side), mode="bilinear"))
    return total
