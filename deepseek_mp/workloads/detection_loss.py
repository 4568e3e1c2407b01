"""The detector's loss: which places answer for which box, and how far their answers are off. All in fp32.

A place may answer for a box if it lies inside. Of these the box takes the `CANDIDATES` whose score and overlap
together are best (Feng et al., 2021, "TOOD: Task-aligned One-stage Object Detection"), so that class and box are
right at the same places. The score to reach there is the quality of the answer, elsewhere 0. Shapes do not depend
on the number of boxes, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_mp.workloads.boxes import complete_overlap, pairwise_overlap
from deepseek_mp.workloads.detector import Predictions, Scales, predictions

CANDIDATES = 10
"""Places that answer for a box."""
SCORE_POWER, OVERLAP_POWER = 0.5, 2.0
"""How much score and overlap count in the choice of places."""
BOX_WEIGHT = 5.0
"""Of the loss of boxes, beside that of classes."""
SMALL = 1e-9


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """For each of N x A places what it answers for."""

    boxes: Tensor
    """[N, A, 4] the box, where there is one."""
    scores: Tensor
    """[N, A, classes] what the sigmoid of the logits should be."""
    weights: Tensor
    """[N, A] the quality of the answer, in [0, 1]; 0 for places that answer for nothing."""


def detection_loss(scales: Scales, targets: Tensor) -> Tensor:
    """Binary cross entropy of the classes plus weighted 1 - CIoU of the boxes, per unit of quality assigned.

    `scales` is the model's output. `targets` is fp32 [N, K, 5]: class, left, top, right, bottom in pixels; rows of
    a negative class are padding. The quality counts as at least 1, so a batch without boxes has a finite loss.
    """
    found = predictions(scales)
    wanted = assign(found, targets)
    total = wanted.weights.sum().clamp(min=1)
    classes = F.binary_cross_entropy_with_logits(found.logits, wanted.scores, reduction="sum")
    off = (1 - complete_overlap(found.boxes, wanted.boxes)) * wanted.weights
    return (classes + BOX_WEIGHT * off.sum()) / total


@torch.no_grad()
def assign(found: Predictions, targets: Tensor) -> Assignment:
    """The places that answer for each box, of targets [N, K, 5] as `detection_loss` takes them."""
    labels, boxes = targets[..., 0].long(), targets[..., 1:]
    real = labels >= 0
    labels = labels.clamp(min=0)
    overlaps = pairwise_overlap(boxes, found.boxes)  # [N, K, A]
    by_class = found.logits.sigmoid().transpose(1, 2)  # [N, classes, A]
    scores = by_class.gather(1, labels[..., None].expand(-1, -1, by_class.shape[2]))
    allowed = _inside(found.places, boxes) & real[..., None]
    quality = scores.pow(SCORE_POWER) * overlaps.pow(OVERLAP_POWER) * allowed
    chosen = _best(quality) & allowed
    # A place answers for one box only: the one it overlaps most.
    rivals = torch.where(chosen, overlaps, -1.0)
    owner = rivals.argmax(dim=1)  # [N, A]
    chosen &= owner[:, None] == torch.arange(boxes.shape[1], device=boxes.device)[:, None]
    weights = _normalised(quality * chosen, overlaps * chosen).amax(dim=1)
    of_class = labels.gather(1, owner)[..., None] == torch.arange(by_class.shape[1], device=labels.device)
    return Assignment(
        boxes=boxes.gather(1, owner[..., None].expand(-1, -1, 4)),
        scores=of_class * weights[..., None],
        weights=weights,
    )


def _inside(places: Tensor, boxes: Tensor) -> Tensor:
    """[N, K, A]: whether each place [A, 2] lies inside each box [N, K, 4]."""
    from_top_left = places - boxes[..., None, :2]
    to_bottom_right = boxes[..., None, 2:] - places
    return torch.cat([from_top_left, to_bottom_right], dim=-1).amin(dim=-1) > 0


def _best(quality: Tensor) -> Tensor:
    """[N, K, A] to a mask of the `CANDIDATES` largest of each row."""
    count = min(CANDIDATES, quality.shape[-1])
    places = quality.topk(count, dim=-1).indices
    return torch.zeros_like(quality, dtype=torch.bool).scatter(-1, places, True)


def _normalised(quality: Tensor, overlaps: Tensor) -> Tensor:
    """Quality [N, K, A] scaled so that the best answer of each box counts as much as it overlaps the box."""
    return quality / (quality.amax(dim=-1, keepdim=True) + SMALL) * overlaps.amax(dim=-1, keepdim=True)
