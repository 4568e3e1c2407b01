"""Suppression and mean average precision, against cases computed by hand and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_mp.workloads.boxes import overlap
from deepseek_mp.workloads.detections import (
    LOWEST_SCORE,
    Detections,
    average_precision,
    detect,
    matched,
    mean_average_precision,
    unsuppressed,
)

A, B, C = [0.0, 0.0, 10.0, 10.0], [0.0, 3.0, 10.0, 13.0], [0.0, 6.0, 10.0, 16.0]
"""Neighbours overlap by 7/13, A and C by 4/16."""


def found(*rows: tuple[int, float, list[float]]) -> Detections:
    """Detections of (class, score, box), in the order of the scores."""
    rows = tuple(sorted(rows, key=lambda row: -row[1]))
    return Detections(
        boxes=torch.tensor([row[2] for row in rows]).reshape(-1, 4),
        scores=torch.tensor([row[1] for row in rows]),
        labels=torch.tensor([row[0] for row in rows], dtype=torch.int64),
    )


def targets(*rows: tuple[int, list[float]]) -> torch.Tensor:
    return torch.tensor([[float(label), *box] for label, box in rows]).reshape(-1, 5)


def test_a_box_suppressed_by_a_better_one_suppresses_none_itself() -> None:
    boxes = torch.tensor([[A, B, C]])
    labels = torch.zeros(1, 3, dtype=torch.int64)
    assert unsuppressed(boxes, labels, 0.5).tolist() == [[True, False, True]]
    assert unsuppressed(boxes, labels, 0.6).tolist() == [[True, True, True]]


def test_only_boxes_of_the_same_class_suppress_each_other() -> None:
    boxes = torch.tensor([[A, A, A]])
    assert unsuppressed(boxes, torch.tensor([[0, 1, 0]])).tolist() == [[True, True, False]]


def greedy(boxes: torch.Tensor, labels: torch.Tensor, duplicate: float) -> list[bool]:
    """Suppression as it is usually written: take the best, drop its duplicates, go on."""
    kept: list[int] = []
    for number in range(len(boxes)):
        rivals = [k for k in kept if labels[k] == labels[number]]
        if all(overlap(boxes[k], boxes[number]) <= duplicate for k in rivals):
            kept.append(number)
    return [number in kept for number in range(len(boxes))]


def random_boxes(count: int, side: float = 40.0) -> torch.Tensor:
    corner = torch.rand(count, 2) * side
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * side / 2], dim=1)


def test_suppression_agrees_with_plain_loops() -> None:
    suppressed = 0
    for _ in range(5):
        boxes, labels = random_boxes(60), torch.randint(2, (60,))
        kept = unsuppressed(boxes[None], labels[None], 0.4)[0].tolist()
        assert kept == greedy(boxes, labels, 0.4)
        suppressed += kept.count(False)
    assert suppressed > 50


@pytest.mark.parametrize(
    ("right", "objects", "expected"),
    [
        ([], 3, 0.0),
        ([False, False], 1, 0.0),
        ([True], 1, 1.0),
        ([True], 2, 0.5),
        ([True, False, True], 2, (1 + 2 / 3) / 2),
        ([False, True, True], 2, 2 / 3),  # the envelope: at recall 1/2 the precision of recall 1 is reached
        ([True, True, False, False, True, False], 4, (1 + 1 + 3 / 5) / 4),
    ],
)
def test_average_precision_of_cases_computed_by_hand(right: list[bool], objects: int, expected: float) -> None:
    assert average_precision(torch.tensor(right, dtype=torch.bool), objects) == pytest.approx(expected)


def test_an_object_is_found_once_by_the_best_scored_box() -> None:
    assert matched(torch.tensor([A, A, B]), torch.tensor([A, C]), 0.5).tolist() == [True, False, True]


def test_a_box_finds_the_free_object_it_overlaps_most() -> None:
    # B overlaps A and C alike; after A is found only C is left for it.
    assert matched(torch.tensor([B, A]), torch.tensor([C, A]), 0.5).tolist() == [True, True]
    assert matched(torch.tensor([A]), torch.tensor([C]), 0.5).tolist() == [False]


def test_the_mean_is_over_the_classes_that_occur_and_over_all_images() -> None:
    images = [
        found((0, 0.9, A), (1, 0.8, A), (4, 0.9, A)),  # class 4 is nowhere: its detections cost nothing
        found((0, 0.95, C), (0, 0.5, A)),
    ]
    truth = [targets((0, A), (1, C)), targets((0, A), (-1, C))]
    mean, by_class = mean_average_precision(images, truth)
    # Class 0 in falling order of scores: wrong (0.95), right (0.9), right (0.5), of two objects.
    assert by_class == {0: pytest.approx(2 / 3), 1: 0.0}
    assert mean == pytest.approx(1 / 3)


def test_without_objects_there_is_no_mean_and_images_must_pair_up() -> None:
    mean, by_class = mean_average_precision([found((0, 0.9, A))], [targets()])
    assert math.isnan(mean)
    assert by_class == {}
    with pytest.raises(ValueError, match="detections of 1 images with targets of 0"):
        mean_average_precision([found()], [])


def brute_force(images: list[Detections], truth: list[torch.Tensor], label: int, least: float) -> float:
    """One class by plain loops over all detections in falling order of score, and over all recalls."""
    every = sorted(
        (-float(s), n, box.tolist())
        for n, image in enumerate(images)
        for s, box, of in zip(image.scores, image.boxes, image.labels, strict=True)
        if of == label
    )
    free = {(n, k) for n, rows in enumerate(truth) for k in range(len(rows)) if rows[k, 0] == label}
    objects, points, right = len(free), [], 0
    for position, (_, n, box) in enumerate(every, start=1):
        options = [(float(overlap(torch.tensor(box), truth[n][k, 1:])), k) for m, k in free if m == n]
        best = max(options, default=(0.0, -1))
        if best[0] >= least:
            free.remove((n, best[1]))
            right += 1
        points.append((right / objects, right / position))
    reached = sorted({recall for recall, _ in points if recall > 0})
    area, before = 0.0, 0.0
    for recall in reached:
        area += (recall - before) * max(precision for r, precision in points if r >= recall)
        before = recall
    return area


def test_the_mean_agrees_with_plain_loops() -> None:
    for _ in range(5):
        truth, images = [], []
        for _ in range(6):
            boxes = random_boxes(6)
            labels = torch.randint(3, (6,))
            truth.append(torch.cat([labels[:, None].float(), boxes], dim=1))
            near = boxes[torch.randint(6, (15,))] + torch.randn(15, 4) * 2
            guessed = torch.cat([near, random_boxes(10)])
            rows = zip(torch.randint(3, (25,)).tolist(), torch.rand(25).tolist(), guessed.tolist(), strict=True)
            images.append(found(*rows))
        mean, by_class = mean_average_precision(images, truth)
        assert by_class == {c: pytest.approx(brute_force(images, truth, c, 0.5)) for c in range(3)}
        assert mean == pytest.approx(sum(by_class.values()) / 3)
        assert 0.01 < mean < 0.9


def test_detections_are_read_from_raw_output_best_first() -> None:
    scales = tuple(torch.full((2, 7, 64 // s, 64 // s), -20.0) for s in (8, 16, 32))
    side = math.log(math.expm1(0.5))
    for row, column, label, logit in ((1, 2, 0, 1.0), (5, 5, 2, 3.0), (0, 0, 1, math.log(LOWEST_SCORE) - 1)):
        scales[0][1, :4, row, column] = side
        scales[0][1, 4 + label, row, column] = logit
    nothing, some = detect(scales)  # type: ignore[arg-type]
    assert len(nothing.scores) == 0
    assert some.labels.tolist() == [2, 0]
    assert some.scores.tolist() == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1))])
    torch.testing.assert_close(some.boxes, torch.tensor([[40.0, 40.0, 48.0, 48.0], [16.0, 8.0, 24.0, 16.0]]))
