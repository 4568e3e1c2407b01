"""Places answer for the right boxes, and the loss is the one computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_mp.workloads.detection_loss import BOX_WEIGHT, CANDIDATES, OVERLAP_POWER, assign, detection_loss
from deepseek_mp.workloads.detector import Predictions

CLASSES = 3
NOTHING = [-1.0, 0.0, 0.0, 32.0, 32.0]
"""Padding, whose box must not count."""
SURE = 20.0


def answers(places: list[tuple[float, float]], boxes: list[list[float]], logits: list[list[float]]) -> Predictions:
    """One image's predictions."""
    return Predictions(boxes=torch.tensor([boxes]), logits=torch.tensor([logits]), places=torch.tensor(places))


def raw(side: int = 32, logit: float = -SURE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw output for one image: boxes of some size, and `logit` for every class."""
    scales = tuple(torch.zeros(1, 4 + CLASSES, side // s, side // s) for s in (8, 16, 32))
    for scale in scales:
        scale[:, 4:] = logit
    return scales  # type: ignore[return-value]


def distance(strides: float) -> float:
    """The raw value of a distance: softplus, inverted."""
    return math.log(math.expm1(strides))


def test_only_places_inside_a_box_answer_for_it_with_its_class() -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    found = answers([(5, 5), (15, 5), (10, 5)], [box] * 3, [[0.0] * CLASSES] * 3)
    wanted = assign(found, torch.tensor([[[2.0, *box], NOTHING]]))
    assert wanted.weights[0].tolist() == pytest.approx([1, 0, 0])
    assert wanted.scores[0, 0].tolist() == pytest.approx([0, 0, 1])
    assert (wanted.scores[0, 1:] == 0).all()
    assert wanted.boxes[0, 0].tolist() == box


def test_the_best_answers_take_part_and_their_score_is_their_quality() -> None:
    box = [0.0, 0.0, 100.0, 100.0]
    places = [(float(10 + n), 50.0) for n in range(CANDIDATES + 2)]
    # The overlap with the box is 0.5 for the first and less for each next.
    boxes = [[0.0, 0.0, 100.0, 50.0 - n] for n in range(CANDIDATES + 2)]
    found = answers(places, boxes, [[0.0] * CLASSES] * len(places))
    weights = assign(found, torch.tensor([[[0.0, *box]]])).weights[0]
    assert (weights > 0).tolist() == [True] * CANDIDATES + [False] * 2
    assert weights[0].item() == pytest.approx(0.5, abs=1e-5)
    assert weights[3].item() == pytest.approx(0.5 * (47 / 50) ** OVERLAP_POWER, abs=1e-4)


def test_of_equal_boxes_the_one_surer_of_the_class_is_the_better_answer() -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    found = answers([(4, 4), (6, 6)], [box, box], [[-4.0, 0, 4.0], [4.0, 0, -4.0]])
    weights = assign(found, torch.tensor([[[2.0, *box]]])).weights[0]
    assert weights[0].item() == pytest.approx(1, abs=1e-5)
    assert weights[1].item() == pytest.approx(math.sqrt(1 / (1 + math.exp(4)) / (1 / (1 + math.exp(-4)))), abs=1e-4)


def test_a_place_in_two_boxes_answers_for_the_one_it_overlaps_more() -> None:
    large, small = [0.0, 0.0, 20.0, 20.0], [5.0, 5.0, 15.0, 15.0]
    found = answers([(10, 10), (2, 2)], [[5.0, 5.0, 15.0, 16.0], large], [[0.0] * CLASSES] * 2)
    wanted = assign(found, torch.tensor([[[0.0, *large], [1.0, *small]]]))
    assert wanted.boxes[0].tolist() == [small, large]
    assert (wanted.scores[0] > 0).tolist() == [[False, True, False], [True, False, False]]


def test_padding_is_answered_by_nothing_and_changes_nothing() -> None:
    scales = raw(logit=0.0)
    rows = [[1.0, 4.0, 4.0, 20.0, 20.0]]
    alone = detection_loss(scales, torch.tensor([rows]))
    padded = detection_loss(scales, torch.tensor([[NOTHING, *rows, NOTHING]]))
    torch.testing.assert_close(alone, padded)


def test_without_boxes_the_loss_is_that_of_scores_where_nothing_is() -> None:
    scales = raw(logit=0.0)
    for scale in scales:
        scale.requires_grad_()
    loss = detection_loss(scales, torch.tensor([[NOTHING]]))
    assert loss.item() == pytest.approx((16 + 4 + 1) * CLASSES * math.log(2), rel=1e-5)
    loss.backward()
    for scale in scales:
        assert scale.grad is not None
        assert (scale.grad[:, :4] == 0).all()
        assert (scale.grad[:, 4:] > 0).all()


def test_the_right_answer_costs_nothing() -> None:
    scales = raw()
    scales[0][0, :4, 1, 1] = distance(0.5)  # the place at (12, 12), 4 pixels to each side
    scales[0][0, 5, 1, 1] = SURE
    assert detection_loss(scales, torch.tensor([[[1.0, 8.0, 8.0, 16.0, 16.0]]])).item() == pytest.approx(0, abs=1e-4)


def test_a_box_twice_too_wide_costs_what_is_computed_by_hand() -> None:
    scales = raw()
    scales[0][0, :4, 1, 1] = distance(0.5)
    scales[0][0, 2, 1, 1] = distance(1.5)  # the box is (8, 8, 24, 16): overlap 1/2
    scales[0][0, 5, 1, 1] = SURE
    shape = 4 / math.pi**2 * (math.atan(1) - math.atan(2)) ** 2
    box = 1 - (1 / 2 - 4**2 / (16**2 + 8**2) - shape**2 / (1 / 2 + shape))
    score = SURE * 0.5  # binary cross entropy of a sure answer where one half is wanted
    expected = score + BOX_WEIGHT * 0.5 * box  # qualities sum to 0.5, which counts as 1
    assert detection_loss(scales, torch.tensor([[[1.0, 8.0, 8.0, 16.0, 16.0]]])).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_the_loss_is_that_per_unit_of_quality_whatever_the_batch() -> None:
    torch.manual_seed(0)
    scales = tuple(torch.randn(1, 4 + CLASSES, 96 // s, 96 // s) + 2 for s in (8, 16, 32))
    target = torch.tensor([[[1.0, 8.0, 8.0, 56.0, 56.0], [0.0, 50.0, 60.0, 90.0, 90.0]]])
    twice = tuple(torch.cat([scale, scale]) for scale in scales)
    torch.testing.assert_close(
        detection_loss(twice, torch.cat([target, target])),  # type: ignore[arg-type]
        detection_loss(scales, target),  # type: ignore[arg-type]
    )


def test_raw_output_of_bf16_is_widened_before_anything_is_computed() -> None:
    scales = tuple((torch.randn(2, 4 + CLASSES, 96 // s, 96 // s)).bfloat16() for s in (8, 16, 32))
    target = torch.tensor([[[1.0, 8.0, 8.0, 56.0, 56.0]]] * 2)
    loss = detection_loss(scales, target)  # type: ignore[arg-type]
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(detection_loss(scales, target), loss)  # type: ignore[arg-type]
    assert torch.equal(detection_loss(tuple(s.float() for s in scales), target), loss)  # type: ignore[arg-type]
