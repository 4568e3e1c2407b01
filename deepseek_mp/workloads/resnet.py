"""A small residual network for 8x8 grey images, written out.

The shape of ResNet (He et al., 2016, "Deep Residual Learning for Image Recognition"): a stem, three
stages that halve the image and double the channels, pooling and a classifier. At the default width
it has 0.3 million parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: [N, channels_in, H, W] to [N, channels_out, H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(image)))
        hidden = self.norm2(self.conv2(hidden))
        return F.relu(hidden + self.shortcut(image))


class SmallResNet(nn.Module):
    """[N, 1, 8, 8] images in [0, 1] to [N, classes] scores; `width` channels in the first stage."""

    def __init__(self, *, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stage1 = ResidualBlock(width, width, stride=1)
        self.stage2 = ResidualBlock(width, 2 * width, stride=2)
        self.stage3 = ResidualBlock(2 * width, 4 * width, stride=2)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.stem(image)))
        hidden = self.stage3(self.stage2(self.stage1(hidden)))
        scores: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return scores


def class_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats, computed in fp32: scores [N, classes], target [N] int64."""
    return F.cross_entropy(scores.float(), target)


def small_resnet(*, width: int = 32, seed: int = 0) -> SmallResNet:
    """The network with weights drawn from `seed`; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SmallResNet(width=width)
