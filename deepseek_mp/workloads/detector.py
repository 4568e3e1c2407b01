"""An object detector of YOLO's shape: a CSP backbone, a feature pyramid of three scales, decoupled anchor-free heads.

Backbone of convolution, BatchNorm and SiLU with cross-stage partial blocks (Wang et al., 2020, "CSPNet"), pyramid
with a path down and a path up again (Liu et al., 2018, "Path Aggregation Network"), separate branches for classes
and boxes without anchor boxes (Ge et al., 2021, "YOLOX"). Every place of a feature map predicts one box, as its
distances from the place to the four sides (Tian et al., 2019, "FCOS"), and a score for each class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_mp.errors import ConfigError, explain

STRIDES = (8, 16, 32)
"""Pixels of the image per place of each feature map."""
PRIOR = 0.01
"""The probability of each class that an untrained head gives everywhere: most places hold nothing."""

Scales = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Sizes of the model. The defaults (11 million parameters) are for images of 640 x 640."""

    width: int = 32
    """Channels after the first convolution; the five stages have 1, 2, 4, 8 and 16 times as many."""
    depths: tuple[int, int, int, int] = (1, 2, 2, 1)
    """Bottlenecks in the blocks of the backbone's last four stages; blocks of the pyramid have `depths[0]`."""
    classes: int = 6

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4 or self.classes < 1 or len(self.depths) != 4 or min(self.depths) < 1:
            raise ConfigError(
                explain(
                    f"width={self.width}, depths={self.depths}, classes={self.classes}",
                    "a width that is a multiple of 4, four depths and one class or more",
                    "Change the sizes",
                )
            )


TINY_DETECTOR = DetectorConfig(width=8, depths=(1, 1, 1, 1))
"""For a CPU and images of 96 x 96: 0.7 million parameters."""


class ConvNormAct(nn.Module):
    """Convolution, BatchNorm, SiLU: [N, channels_in, H, W] to [N, channels_out, H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels_out: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, features: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(features)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, around a shortcut where asked for; shapes stay."""

    def __init__(self, channels: int, *, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, channels)
        self.conv2 = ConvNormAct(channels, channels)
        self.shortcut = shortcut

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = self.conv2(self.conv1(features))
        return features + changed if self.shortcut else changed


class PartialBlock(nn.Module):
    """Half of the channels go through bottlenecks; all their outputs and the other half are mixed by a 1x1 layer."""

    def __init__(self, channels_in: int, channels_out: int, *, depth: int, shortcut: bool) -> None:
        super().__init__()
        half = channels_out // 2
        self.split = ConvNormAct(channels_in, channels_out, 1)
        self.bottlenecks = nn.ModuleList(Bottleneck(half, shortcut=shortcut) for _ in range(depth))
        self.mix = ConvNormAct((2 + depth) * half, channels_out, 1)

    def forward(self, features: Tensor) -> Tensor:
        parts = list(self.split(features).chunk(2, dim=1))
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        mixed: Tensor = self.mix(torch.cat(parts, dim=1))
        return mixed


class PooledContext(nn.Module):
    """Maxima over windows of 5, 9 and 13 places beside the features themselves; shapes stay."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = ConvNormAct(channels, channels // 2, 1)
        self.mix = ConvNormAct(2 * channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        parts = [self.reduce(features)]
        for _ in range(3):  # windows of 5 after each other reach as far as ones of 5, 9 and 13
            parts.append(F.max_pool2d(parts[-1], 5, stride=1, padding=2))
        mixed: Tensor = self.mix(torch.cat(parts, dim=1))
        return mixed


class Backbone(nn.Module):
    """[N, 3, H, W] images to features of strides 8, 16 and 32 with 4, 8 and 16 times `width` channels."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        width = config.width
        self.stem = ConvNormAct(3, width, stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                ConvNormAct(width << number, width << (number + 1), stride=2),
                PartialBlock(width << (number + 1), width << (number + 1), depth=depth, shortcut=True),
            )
            for number, depth in enumerate(config.depths)
        )
        self.context = PooledContext(16 * width)

    def forward(self, image: Tensor) -> Scales:
        features = self.stem(image)
        found = []
        for stage in self.stages:
            features = stage(features)
            found.append(features)
        return found[1], found[2], self.context(found[3])


class Pyramid(nn.Module):
    """Features of three scales to as many of the same shapes, each of which has seen the other two."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        fine, middle, coarse = (factor * config.width for factor in (4, 8, 16))
        depth = config.depths[0]
        self.down_middle = PartialBlock(coarse + middle, middle, depth=depth, shortcut=False)
        self.down_fine = PartialBlock(middle + fine, fine, depth=depth, shortcut=False)
        self.shrink_fine = ConvNormAct(fine, fine, stride=2)
        self.up_middle = PartialBlock(fine + middle, middle, depth=depth, shortcut=False)
        self.shrink_middle = ConvNormAct(middle, middle, stride=2)
        self.up_coarse = PartialBlock(middle + coarse, coarse, depth=depth, shortcut=False)

    def forward(self, scales: Scales) -> Scales:
        fine, middle, coarse = scales
        middle = self.down_middle(torch.cat([_doubled(coarse), middle], dim=1))
        fine = self.down_fine(torch.cat([_doubled(middle), fine], dim=1))
        middle = self.up_middle(torch.cat([self.shrink_fine(fine), middle], dim=1))
        coarse = self.up_coarse(torch.cat([self.shrink_middle(middle), coarse], dim=1))
        return fine, middle, coarse


class Head(nn.Module):
    """[N, channels, H, W] to [N, 4 + classes, H, W]: raw distances to the four sides, then class logits."""

    def __init__(self, channels: int, hidden: int, config: DetectorConfig) -> None:
        super().__init__()
        self.box = nn.Sequential(ConvNormAct(channels, hidden), ConvNormAct(hidden, hidden), nn.Conv2d(hidden, 4, 1))
        self.score = nn.Sequential(
            ConvNormAct(channels, hidden), ConvNormAct(hidden, hidden), nn.Conv2d(hidden, config.classes, 1)
        )
        for branch, start in ((self.box, 2.0), (self.score, math.log(PRIOR / (1 - PRIOR)))):
            last = branch[-1]
            assert isinstance(last, nn.Conv2d)
            assert last.bias is not None
            nn.init.constant_(last.bias, start)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([self.box(features), self.score(features)], dim=1)


class Detector(nn.Module):
    """[N, 3, H, W] images, sides multiples of 32, to raw predictions [N, 4 + classes, H/s, W/s] for s = 8, 16, 32.

    `detection_loss.detection_loss` trains them, `detections.detect` reads boxes from them.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.pyramid = Pyramid(config)
        self.heads = nn.ModuleList(Head(factor * config.width, 4 * config.width, config) for factor in (4, 8, 16))

    def forward(self, image: Tensor) -> Scales:
        fine, middle, coarse = self.pyramid(self.backbone(image))
        return self.heads[0](fine), self.heads[1](middle), self.heads[2](coarse)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions of all places of all scales, in fp32: A = H*W/64 + H*W/256 + H*W/1024 places per image."""

    boxes: Tensor
    """[N, A, 4] corners in pixels."""
    logits: Tensor
    """[N, A, classes]."""
    places: Tensor
    """[A, 2] centres (x, y) of the places in pixels."""


def predictions(scales: Scales) -> Predictions:
    """What the model's output stands for; everything from here on is fp32, whatever the heads ran in.

    Raw distances become positive by softplus, in units of the scale's stride.
    """
    boxes, logits, places = [], [], []
    for raw, stride in zip(scales, STRIDES, strict=True):
        flat = raw.float().flatten(2).transpose(1, 2)
        place = _places(raw, stride)
        distances = F.softplus(flat[..., :4]) * stride
        boxes.append(torch.cat([place - distances[..., :2], place + distances[..., 2:]], dim=-1))
        logits.append(flat[..., 4:])
        places.append(place)
    return Predictions(boxes=torch.cat(boxes, dim=1), logits=torch.cat(logits, dim=1), places=torch.cat(places))


def _places(raw: Tensor, stride: int) -> Tensor:
    """Centres [H*W, 2] of the places of a feature map, in pixels of the image."""
    rows, columns = raw.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(rows, device=raw.device), torch.arange(columns, device=raw.device), indexing="ij"
    )
    return (torch.stack([x, y], dim=-1).reshape(-1, 2).float() + 0.5) * stride


def _doubled(features: Tensor) -> Tensor:
    """Each place becomes four."""
    return F.interpolate(features, scale_factor=2.0, mode="nearest")


def detector(config: DetectorConfig | None = None, *, seed: int = 0) -> Detector:
    """The model with weights drawn from `seed`; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Detector(config or DetectorConfig())
