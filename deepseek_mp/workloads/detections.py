"""From predictions to detections, and from detections to mean average precision (mAP).

`detect` keeps the best-scored boxes that do not overlap a better one of their class (non-maximum suppression).
`mean_average_precision` matches detections with objects and takes, for each class, the area under the curve of
precision over recall (Everingham et al., 2010, "The Pascal Visual Object Classes Challenge", with the
interpolation at all points that it has used since 2010).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_mp.workloads.boxes import pairwise_overlap
from deepseek_mp.workloads.detector import Scales, predictions

LOWEST_SCORE = 0.01
DUPLICATE = 0.6
"""Overlap from which two detections of a class are one."""
LOOKED_AT, KEPT = 300, 100
"""Detections of an image before and after duplicates are removed."""


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What was found in one image, in falling order of the scores."""

    boxes: Tensor
    """[D, 4] corners in pixels."""
    scores: Tensor
    """[D] in [0, 1]."""
    labels: Tensor
    """[D] int64."""


@torch.no_grad()
def detect(scales: Scales) -> list[Detections]:
    """The detections of each image, on the CPU, from the model's output."""
    found = predictions(scales)
    count, _, classes = found.logits.shape
    scores = found.logits.sigmoid().flatten(1)
    scores, index = scores.topk(min(LOOKED_AT, scores.shape[1]), dim=1)
    labels = index % classes
    boxes = found.boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    kept = unsuppressed(boxes, labels) & (scores >= LOWEST_SCORE)
    boxes, scores, labels, kept = boxes.cpu(), scores.cpu(), labels.cpu(), kept.cpu()
    return [
        Detections(boxes=boxes[n, kept[n]][:KEPT], scores=scores[n, kept[n]][:KEPT], labels=labels[n, kept[n]][:KEPT])
        for n in range(count)
    ]


def unsuppressed(boxes: Tensor, labels: Tensor, duplicate: float = DUPLICATE) -> Tensor:
    """[N, D]: which of the boxes [N, D, 4], best first, survive greedy non-maximum suppression within their class.

    A box survives if no surviving better one of its class overlaps it by more than `duplicate`. The mask is the fixed
    point of that sentence: each round settles at least the first box not yet settled, so it ends, mostly after a few.
    """
    rivals = (pairwise_overlap(boxes, boxes) > duplicate) & (labels[:, :, None] == labels[:, None])
    better = rivals.tril(diagonal=-1)  # [n, d, e]: e is better than d and a duplicate of it
    kept = torch.ones_like(labels, dtype=torch.bool)
    while True:
        settled = ~(better & kept[:, None]).any(dim=2)
        if torch.equal(settled, kept):
            return kept
        kept = settled


def mean_average_precision(
    found: Sequence[Detections], targets: Iterable[Tensor], *, overlap: float = 0.5
) -> tuple[float, dict[int, float]]:
    """The mean over the classes that occur in the targets, and the average precision of each of them; all in [0, 1].

    `targets` has one tensor [K, 5] per image: class, left, top, right, bottom; rows of a negative class are padding.
    Detections of a class are taken in falling order of score over all images; each finds the object of its class
    that it overlaps most among those not found before, and is right if they overlap by at least `overlap`. Without
    any object, the mean is NaN.
    """
    truth = [rows[rows[:, 0] >= 0].cpu() for rows in targets]
    if len(truth) != len(found):
        raise ValueError(f"detections of {len(found)} images with targets of {len(truth)}; give one of each per image")
    classes = sorted({int(label) for rows in truth for label in rows[:, 0].tolist()})
    by_class = {label: _class_precision(found, truth, label, overlap) for label in classes}
    return sum(by_class.values()) / len(by_class) if by_class else float("nan"), by_class


def _class_precision(found: Sequence[Detections], truth: Sequence[Tensor], label: int, overlap: float) -> float:
    """The average precision of one class."""
    scores, right, objects = [], [], 0
    for detections, rows in zip(found, truth, strict=True):
        of_class = detections.labels == label
        boxes = rows[rows[:, 0] == label, 1:]
        objects += len(boxes)
        scores.append(detections.scores[of_class])
        # Images are matched one by one: within one, the order of scores is that over all images.
        right.append(matched(detections.boxes[of_class], boxes, overlap))
    order = torch.cat(scores).argsort(descending=True, stable=True)
    return average_precision(torch.cat(right)[order], objects)


def matched(boxes: Tensor, objects: Tensor, overlap: float) -> Tensor:
    """[D] bool: which of the boxes [D, 4], best first, find one of the objects [K, 4] that none before has found."""
    overlaps = pairwise_overlap(boxes.double(), objects.double())
    free = torch.ones(len(objects), dtype=torch.bool)
    right = torch.zeros(len(boxes), dtype=torch.bool)
    for number in range(len(boxes) if len(objects) else 0):
        candidates = torch.where(free, overlaps[number], -1.0)
        best = int(candidates.argmax())
        if candidates[best] >= overlap:
            right[number], free[best] = True, False
    return right


def average_precision(right: Tensor, objects: int) -> float:
    """The area under precision over recall: `right` [D] bool in falling order of scores, of `objects` > 0 to find.

    At every recall the precision is the best that is reached there or later (interpolation at all points).
    """
    found = right.double().cumsum(0)
    precision = found / torch.arange(1, len(right) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float(envelope[right].sum() / objects)
