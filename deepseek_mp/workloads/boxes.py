"""Boxes as corners (left, top, right, bottom), in pixels: how much two of them overlap.

All in the dtype of the boxes, which should be fp32: products of coordinates lose what bf16 cannot hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-7
"""Keeps the ratio of two empty boxes finite."""


def areas(boxes: Tensor) -> Tensor:
    """[..., 4] boxes to [...] areas; a box whose sides are negative has none."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] and others [..., 4], one by one; leading dimensions broadcast."""
    shared = intersections(boxes, others)
    return shared / (areas(boxes) + areas(others) - shared + EPSILON)


def pairwise_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union [..., N, M] of every one of the boxes [..., N, 4] with every other [..., M, 4]."""
    return overlap(boxes.unsqueeze(-2), others.unsqueeze(-3))


def intersections(boxes: Tensor, others: Tensor) -> Tensor:
    """Areas [...] that boxes [..., 4] and others [..., 4] share."""
    top_left = torch.maximum(boxes[..., :2], others[..., :2])
    bottom_right = torch.minimum(boxes[..., 2:], others[..., 2:])
    return areas(torch.cat([top_left, bottom_right], dim=-1))


def complete_overlap(boxes: Tensor, targets: Tensor) -> Tensor:
    """CIoU of boxes [..., 4] with targets [..., 4], one by one: in (-2, 1], 1 where they are equal.

    Intersection over union, less the distance of the centres relative to the diagonal of the box around both,
    less the difference of the aspect ratios, whose weight is a constant of the gradient (Zheng et al., 2020,
    "Distance-IoU Loss: Faster and Better Learning for Bounding Box Regression").
    """
    ratio = overlap(boxes, targets)
    around = torch.maximum(boxes[..., 2:], targets[..., 2:]) - torch.minimum(boxes[..., :2], targets[..., :2])
    between = (boxes[..., :2] + boxes[..., 2:] - targets[..., :2] - targets[..., 2:]) / 2
    distance = between.square().sum(-1) / (around.square().sum(-1) + EPSILON)
    shape = (4 / math.pi**2) * (_angle(targets) - _angle(boxes)).square()
    weight = (shape / (1 - ratio + shape + EPSILON)).detach()
    return ratio - distance - weight * shape


def _angle(boxes: Tensor) -> Tensor:
    """The angle of the diagonal, which tells the aspect ratio: atan(width / height)."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return torch.atan(sides[..., 0] / (sides[..., 1] + EPSILON))
